"""All three stages on Ray workers: the bytes of one process, for any number of them and whatever happens to them."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf.config import (
    CheckpointConfig,
    DistConfig,
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf.distributed import connected
from rlhf.distributed.reaper import processes_of
from rlhf.errors import WorkersLostError
from rlhf.train.pipeline import run_stages

STAGES = ("sft", "reward", "ppo")
FOLDERS = ("sft", "reward", "policy")


def config(folder, **dist):
    """Small, but with everything that has state: a moving reference, adaptive KL, the critic's warm-up."""
    return PipelineRun(
        output_dir=folder,
        cache_dir=folder / "cache",
        threads=1,
        dist=DistConfig(snapshot_every=3, heartbeat_s=3, timeout_s=30, **dist),
        model=ModelConfig(preset="tiny"),
        log=LogConfig(tensorboard=False),
        checkpoint=CheckpointConfig(every=3),
        sft=SFTConfig(max_steps=10, batch_size=16, micro_batch_size=1, eval_every=5, dropout=0.1),
        reward=RewardConfig(max_steps=8, batch_size=16, micro_batch_size=2, eval_every=4),
        ppo=PPOConfig(
            num_iterations=4, batch_size=16, minibatch_size=8, num_epochs=2, rollout_batch_size=4, micro_batch_size=1,
            max_new_tokens=12, ref_ema=0.9, kl_adaptive=True, critic_warmup=1,
        ),
    )  # fmt: skip


def outcome(folder):
    """The bytes of every model and the metrics of every step; what depends on clocks and faults is left out."""
    models = {
        str(path.relative_to(folder)): path.read_bytes()
        for name in FOLDERS
        for path in (folder / name).rglob("*.safetensors")
    }
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    left_out = ("time", "timing_s/", "perf/", "fault/")
    metrics = [
        {name: value for name, value in line.items() if not name.startswith(left_out)}
        for line in lines
        if "step" in line and "event" not in line
    ]
    return models, metrics


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    run_stages(config(folder))
    models, metrics = outcome(folder)
    assert len(models) > len(STAGES)
    assert {line["stage"] for line in metrics} == set(STAGES)
    return models, metrics


@pytest.fixture(scope="module")
def one_ray():
    with connected(DistConfig(num_workers=6)):
        yield


def test_the_bytes_are_those_of_one_process(one_ray, expected, tmp_path):
    run_stages(config(tmp_path, num_workers=3, num_servers=1))
    assert outcome(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "servers"), [(1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (2, 2), (4, 2)])
def test_the_bytes_are_those_of_one_process_for_any_topology(one_ray, expected, tmp_path, workers, servers):
    run_stages(config(tmp_path, num_workers=workers, num_servers=servers))
    assert outcome(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_bytes_of_other_families_are_those_of_one_process(one_ray, tmp_path, family):
    """Llama shares key-value heads and ties its output layer; GPT-NeoX does neither."""

    def run(folder, **dist):
        whole = config(folder, **dist)
        short = dataclasses.replace(
            whole,
            model=ModelConfig(family=family, preset="tiny", n_layer=1),
            sft=dataclasses.replace(whole.sft, max_steps=4, eval_every=2, dropout=0.0),
            reward=dataclasses.replace(whole.reward, max_steps=4, eval_every=2),
            ppo=dataclasses.replace(whole.ppo, num_iterations=2),
        )
        run_stages(short)
        return outcome(folder)

    models, metrics = run(tmp_path / "here")
    assert len(models) > len(STAGES)
    assert json.loads((tmp_path / "here" / "policy" / "config.json").read_text())["model_type"] == family
    assert run(tmp_path / "there", num_workers=2) == (models, metrics)


def members():
    """Process numbers of all Ray workers that have a program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::Process"):
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


class Chaos(threading.Thread):
    """Sends signals to random members at random moments, a given number of times."""

    def __init__(self, seed, count):
        super().__init__(daemon=True)
        self.sent, self._draw, self._count, self._ends = [], random.Random(seed), count, threading.Event()

    def run(self):
        while len(self.sent) < self._count and not self._ends.wait(self._draw.uniform(0.5, 2.5)):
            if found := members():
                number = self._draw.choice([signal.SIGKILL, signal.SIGSTOP])
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(self._draw.choice(found), number)
                    self.sent.append(number)

    def stop(self):
        self._ends.set()
        self.join()


def events(folder):
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "fault"], lines


def survive(expected, folder, seed, count, **dist):
    chaos = Chaos(seed, count)
    chaos.start()
    try:
        run_stages(config(folder, **dist))
    finally:
        chaos.stop()
    assert outcome(folder) == expected
    faults, lines = events(folder)
    recorded = sum(line.get("fault/restarts", 0) for line in lines)
    assert recorded == sum("step" in fault for fault in faults)  # the others came after a stage's last step
    return chaos.sent, faults


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_signals_at_random_moments_change_no_byte(one_ray, expected, tmp_path, seed):
    """Three signals each, and four topologies, with replacement and shrinking: at least twenty in all."""
    workers, servers = [(2, 0), (3, 0), (2, 1), (2, 2)][seed % 4]
    on_failure = "shrink" if seed >= 4 else "replace"
    sent, faults = survive(expected, tmp_path, seed, 3, num_workers=workers, num_servers=servers, on_failure=on_failure)
    assert len(sent) == 3
    assert faults, "at least one of them met a stage at work"


@pytest.mark.slow
def test_when_no_restart_is_left_the_step_is_finished_saved_and_the_run_ends(one_ray, expected, tmp_path):
    chaos = Chaos(0, 1000)  # until one of them meets a stage at work
    chaos.start()
    try:
        with pytest.raises(WorkersLostError, match=r"stopped after .* and saved; continue with --resume.* lost worker"):
            run_stages(config(tmp_path, num_workers=2, max_restarts=0))
    finally:
        chaos.stop()
    faults, _ = events(tmp_path)
    assert faults[-1]["final"]
    run_stages(dataclasses.replace(config(tmp_path, num_workers=3), resume=True))
    assert outcome(tmp_path)[0] == expected[0]


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_and_resumes_to_the_same_bytes(expected, tmp_path):
    """kill -9 of the program itself: no process and no folder of its cluster is left; --resume gives the bytes."""
    import yaml

    from rlhf.io.presets import dump_config

    settings = yaml.safe_load(dump_config(config(tmp_path / "run", num_workers=2)))
    for key in ("output_dir", "resume", "config", "dist_config"):
        settings.pop(key, None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    program = Path(sys.executable).with_name("rlhf-train")
    command = [program, "pipeline", "--config", tmp_path / "run.yaml", "--output-dir", tmp_path / "run"]
    draw = random.Random(0)
    folders, others = set(), set(Path("/tmp").glob("rlhf-*"))
    for _ in range(2):
        process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(8, 14))
        folders |= set(Path("/tmp").glob("rlhf-*")) - others
        process.kill()
        process.wait()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    models, _ = outcome(tmp_path / "run")
    assert models == expected[0]
    time.sleep(3)
    assert folders
    assert not any(folder.exists() for folder in folders)
    assert not any(processes_of(str(folder)) for folder in folders)
