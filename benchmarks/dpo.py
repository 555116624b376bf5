"""Optimiser steps of DPO against TRL's DPOTrainer."""

from pathlib import Path
from typing import Any

from benchmarks import material, ours, roofline
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all
from benchmarks.sft import BEST, FP32

_TARGETS = {
    ("small", "fp32"): 2.0,
    ("small", "best"): 3.0,
    ("gpt2", "fp32"): 2.0,
    ("gpt2", "best"): 3.0,
    ("tiny", "fp32"): 0.0,
}


def run(bench: Bench) -> list[Path]:
    """Measure every row."""
    return compare_all("dpo", works(bench), bench)


def works(bench: Bench) -> list[Work]:
    """Preference pairs in fp32 and at best."""
    return [_work(bench, kind) for size, kind in _TARGETS if size == bench.size]


def _work(bench: Bench, kind: str) -> Work:
    size = material.SIZES[bench.size]
    pairs, length = size.pairs
    tokens, predicted = 2 * pairs * length, 2 * pairs * (length - material.pair_prompt(size))
    settings: dict[str, Any] = {"model": str(bench.made.model)}
    return Work(
        f"DPO step, {bench.size}, {pairs} pairs of {length} tokens, {kind}",
        "TRL DPOTrainer",
        bench.ours("dpo", ours.COMPILED_FP32 if kind == "fp32" else ours.COMPILED_BEST, **settings),
        bench.theirs("trl_trainers:dpo", FP32 if kind == "fp32" else BEST, **settings),
        _TARGETS[bench.size, kind],
        lambda number: size.steps * roofline.step(size.shape, tokens, length, predicted),
        exact=kind == "fp32",
    )
