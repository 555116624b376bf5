"""From the command to the first optimiser step of SFT, against a script around transformers' Trainer.

Whole processes, started in turn and ended once the step is done. Both read the same file of demonstrations with the
same tokenizer and train a new model of the same shape. Caches are warm: a first start of each is not counted.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.peers.environment import python_of
from benchmarks.sides import ENVIRONMENT, ROOT, SideError
from benchmarks.timing import interleave, ratio, report, spread

_TARGET = 0.5
_LIMIT = 600.0
"""Seconds after which a start has failed."""


def run(bench: Bench) -> list[Path]:
    """Measure and write the one row."""
    with tempfile.TemporaryDirectory(prefix="rlhf-startup-") as folder:
        starts = {"ours": lambda: _ours(bench, Path(folder)), "peer": lambda: _peer(bench)}
        times = interleave(starts, bench.rounds, warmup=2)
    row = {
        "work": f"from the command to the first SFT step, {bench.size}, warm cache",
        "peer": "transformers Trainer",
        "ours, ms": spread(times["ours"]),
        "peer, ms": spread(times["peer"]),
        "ratio": ratio(times["ours"], times["peer"]),
        "target": _TARGET,
        "seconds": times,
    }
    return [report(f"startup-{bench.size}-{bench.device}", [row], bench.output)]


def _ours(bench: Bench, folder: Path) -> None:
    work = material.SIZES[bench.size]
    output = Path(tempfile.mkdtemp(dir=folder))
    command = [str(Path(sys.executable).with_name("rlhf-train")), "sft", "--sft-data", str(bench.made.demonstrations)]
    command += ["--sft.model-path", str(bench.made.model), "--sft.batch-size", str(work.sft[0])]
    command += ["--output-dir", str(output), "--cache-dir", str(folder / "cache")]
    command += ["--device", bench.device, "--threads", str(bench.threads)]
    log = output / "logs" / "metrics.jsonl"
    _start(command, bench.logs / "ours.log", lambda: log.is_file() and '"loss/sft"' in log.read_text())


def _peer(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": str(bench.made.model),
            "data": str(bench.made.demonstrations),
            "output": folder,
            "rows": material.SIZES[bench.size].sft[0],
            "device": bench.device,
            "threads": bench.threads,
        }
        script = ROOT / "benchmarks" / "peers" / "trainer_script.py"
        command = [str(python_of(bench.peers)), str(script), json.dumps(settings)]
        _start(command, bench.logs / "peer.log", (Path(folder) / "first step").is_file)


def _start(command: list[str], log: Path, done: Callable[[], bool]) -> None:
    """Start a program and end it as soon as its first step is done."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | ENVIRONMENT, start_new_session=True
        )
        begun = time.monotonic()
        try:
            while not done():
                if process.poll() is not None or time.monotonic() > begun + _LIMIT:
                    raise SideError(f"{command[0]} made no step: " + " | ".join(log.read_text().splitlines()[-6:]))
                time.sleep(0.005)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
