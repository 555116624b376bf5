"""The most memory that the process of a PPO run ever holds, against TRL's; and ours where it has to fit."""

from contextlib import ExitStack
from typing import Any

from benchmarks import ppo
from benchmarks.bench import Bench
from benchmarks.sides import Side
from benchmarks.timing import report

_TARGET = 0.5
_ITERATIONS = 2
"""Each side's memory grows no more after the second."""
_CRITICS = ("separate", "shared")


def run(bench: Bench) -> None:
    """Measure every row; each process has the machine's memory to itself, so they run one after the other."""
    rows = []
    for critic in _CRITICS:
        work = ppo.work(bench, critic, "fp32", _TARGET)
        if bench.only not in work.what:
            continue
        peaks: dict[str, Any] = {}
        for name, setting in (("ours", work.ours[0]), ("peer", work.peers[0])):
            with ExitStack() as stack:
                side = stack.enter_context(Side(setting, bench.logs / f"{name}.log"))
                for _ in range(_ITERATIONS):
                    side.round()
            peaks[name] = side.rounds[-1]["peak_bytes"]
        rows.append(
            {
                "work": work.what,
                "peer": work.peer,
                "ours, MB": peaks["ours"] / 1e6,
                "peer, MB": peaks["peer"] / 1e6,
                "ratio": peaks["ours"] / peaks["peer"],
                "target": _TARGET,
                "conditions": side.facts,
            }
        )
    if rows:
        report(f"memory-{bench.size}-{bench.device}", rows, bench.output)
