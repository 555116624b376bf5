"""Optimiser steps of the reward model against TRL's RewardTrainer."""

from pathlib import Path
from typing import Any

from benchmarks import material, ours, roofline
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all
from benchmarks.sft import BEST

_TARGET = 2.5


def run(bench: Bench) -> list[Path]:
    """Measure every row."""
    return compare_all("reward", works(bench), bench)


def works(bench: Bench) -> list[Work]:
    """Preference pairs at best."""
    size = material.SIZES[bench.size]
    pairs, length = size.pairs
    settings: dict[str, Any] = {"model": str(bench.made.reward)}
    return [
        Work(
            f"reward-model step, {bench.size}, {pairs} pairs of {length} tokens, best",
            "TRL RewardTrainer",
            bench.ours("reward", ours.COMPILED_BEST, **settings),
            bench.theirs("trl_trainers:reward", BEST, **settings),
            _TARGET,
            lambda number: size.steps * roofline.step(size.shape, 2 * pairs * length, length, 0),
            exact=False,
        )
    ]
