"""Optimiser steps of SFT against TRL's SFTTrainer, and against an nn.Module with torch.compile."""

from pathlib import Path
from typing import Any

from benchmarks import material, ours, roofline
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all

_TARGETS = {
    ("small", "fp32"): 1.8,
    ("small", "best"): 3.6,
    ("gpt2", "fp32"): 1.6,
    ("gpt2", "best"): 3.3,
    ("smollm2", "fp32"): 1.5,
    ("smollm2", "best"): 3.0,
    ("tiny", "fp32"): 0.0,
}
_MODULE_TARGETS = {("gpt2", "fp32"): 1.0, ("gpt2", "best"): 1.1, ("gpt2-gpu", "best"): 0.95, ("tiny", "fp32"): 0.0}
FP32: tuple[dict[str, Any], ...] = ({}, {"compiled": True})
"""The trainers' settings in IEEE fp32."""
BEST: tuple[dict[str, Any], ...] = (
    *FP32,
    {"matmul": "medium"},
    {"precision": "bf16"},
    {"precision": "bf16", "compiled": True},
)
"""All their settings."""
_PACKED = {"packing": True}
_LAYOUTS: dict[str, tuple[float, tuple[dict[str, Any], ...]]] = {
    "padded": (4.0, ({},)),
    "packed": (4.0, (_PACKED, _PACKED | {"parts": 3})),
    "packed, attention across sequences": (4.0, (_PACKED | {"packing_strategy": "wrapped"},)),
    "grouped by length": (0.0, ({"train_sampling_strategy": "group_by_length"},)),
}
"""Ways to lay out lengths that vary, with targets: in random order, or, where that may be given up, by length."""


def run(bench: Bench) -> list[Path]:
    """Measure every row."""
    return compare_all("sft", works(bench), bench)


def works(bench: Bench) -> list[Work]:
    """Full sequences in fp32 and at best, then lengths that vary."""
    full = [_full(bench, kind) for size, kind in _TARGETS if size == bench.size]
    modules = [_module(bench, kind) for size, kind in _MODULE_TARGETS if size == bench.size]
    return [*full, *modules, *(_varied(bench, way) for way in _LAYOUTS)]


def _full(bench: Bench, kind: str) -> Work:
    settings: dict[str, Any] = {"model": str(bench.made.model), "varied": False}
    return Work(
        f"SFT step, {_shape(bench)}, {kind}",
        "TRL SFTTrainer",
        bench.ours("sft", ours.COMPILED_FP32 if kind == "fp32" else ours.COMPILED_BEST, **settings),
        bench.theirs("trl_trainers:sft", FP32 if kind == "fp32" else BEST, **settings),
        _TARGETS[bench.size, kind],
        _least(bench),
        exact=kind == "fp32",
    )


def _module(bench: Bench, kind: str) -> Work:
    precision = "fp32" if kind == "fp32" else "bf16"
    settings: dict[str, Any] = {"model": str(bench.made.model)}
    return Work(
        f"SFT step, {_shape(bench)}, {precision}",
        "nn.Module with torch.compile",
        bench.ours("sft", ({"precision": precision, "compile": "on"},), varied=False, **settings),
        bench.theirs("module_gpt2:run", ({"precision": precision},), **settings),
        _MODULE_TARGETS[bench.size, kind],
        _least(bench),
        exact=kind == "fp32",
    )


def _varied(bench: Bench, way: str) -> Work:
    """Sequences of many lengths; ours are packed in random order."""
    target, layouts = _LAYOUTS[way]
    size = material.SIZES[bench.size]
    count, longest = size.sft
    mean = sum(material.varied_lengths(64 * count, longest)) / (64 * count)
    rows = max(1, round(count * mean / longest))
    layouts = tuple(layout | ({"rows": rows} if "packing" in layout else {}) for layout in layouts)
    settings: dict[str, Any] = {"model": str(bench.made.model), "varied": True}
    return Work(
        f"SFT, {bench.size}, {count} sequences of up to {longest} tokens, {mean:.0f} on average, fp32",
        f"TRL SFTTrainer, {way}",
        bench.ours("sft", ours.COMPILED_FP32, **settings),
        bench.theirs("trl_trainers:sft", layouts, **settings),
        target,
        lambda number: size.steps * roofline.step(size.shape, count * mean, mean, count * mean),
        same_tokens=False,
    )


def _shape(bench: Bench) -> str:
    rows, length = material.SIZES[bench.size].sft
    return f"{bench.size}, {rows} x {length} tokens"


def _least(bench: Bench) -> Any:
    size = material.SIZES[bench.size]
    rows, length = size.sft
    return lambda number: size.steps * roofline.step(size.shape, rows * length, length, rows * length)
