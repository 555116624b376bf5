"""Where the time of our PPO iteration goes: the phases that its log tells apart, compiled and in bf16."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks import material, ours, ppo
from benchmarks.bench import Bench
from benchmarks.sides import Side
from benchmarks.timing import interleave, report, spread

_WARMUP = 2
"""Iterations that are not counted: compilation, caches."""


def run(bench: Bench) -> list[Path]:
    """Measure both kinds of critic, one after the other."""
    rows = [row for critic in ppo.CRITICS for row in _phases(bench, critic)]
    return [report(f"phases-{bench.size}-{bench.device}", rows, bench.output)] if rows else []


def _phases(bench: Bench, critic: str) -> list[dict[str, Any]]:
    """A row for each phase, and one for what lies between them."""
    what = f"{ppo.rolled_out('PPO', bench, material.SIZES[bench.size].ppo)}, {critic} critic, bf16"
    if bench.only not in what:
        return []
    (setting,) = bench.ours("ppo", ours.COMPILED_BF16, critic=critic, **ppo.files(bench))
    with Side(setting, bench.logs / f"phases-{critic}.log") as side:
        seconds = interleave({"all": side.round}, bench.rounds, warmup=_WARMUP)["all"]
    parts = {name: [facts[name] for facts in side.rounds[_WARMUP:]] for name in ours.PHASES}
    parts["the rest"] = [whole - sum(some) for whole, *some in zip(seconds, *parts.values(), strict=True)]
    total = statistics.median(seconds)
    return [
        {"iteration": what, "phase": name, "ms": spread(times), "share": statistics.median(times) / total}
        for name, times in (parts | {"all": seconds}).items()
    ]
