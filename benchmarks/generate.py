"""Completions against transformers' generate."""

from pathlib import Path
from typing import Any

from benchmarks import material, ours, roofline
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all

_TARGETS = {
    ("small", 1, "fp32"): 3.2,
    ("small", 8, "fp32"): 2.4,
    ("small", 64, "fp32"): 2.2,
    ("small", 64, "best"): 3.5,
    ("gpt2", 8, "best"): 2.0,
    ("gpt2", 64, "fp32"): 1.3,
    ("gpt2", 64, "best"): 2.2,
    ("smollm2", 64, "fp32"): 1.5,
    ("smollm2", 64, "best"): 2.2,
    ("gpt2-gpu", 8, "bf16"): 0.0,
    ("gpt2-gpu", 512, "bf16"): 10.0,
    ("tiny", 2, "fp32"): 0.0,
}
_TARGET_QUEUE = 5.0
_FP32: tuple[dict[str, Any], ...] = ({"cache": "dynamic"}, {"cache": "static"})
_BEST: tuple[dict[str, Any], ...] = (*_FP32, {"matmul": "medium"}, {"precision": "bf16"})
_GPU: tuple[dict[str, Any], ...] = ({"precision": "bf16"},)
"""The peer's static cache would be compiled for minutes."""
_QUEUE_BATCHES = (32, 64, 128, 256)


def run(bench: Bench) -> list[Path]:
    """Measure every row."""
    return compare_all("generate", works(bench), bench)


def works(bench: Bench) -> list[Work]:
    """Full completions at every batch size, then a queue of prompts whose completions end by themselves."""
    full = [_full(bench, batch, kind) for size, batch, kind in _TARGETS if size == bench.size]
    return [*full, _queue(bench)] if material.SIZES[bench.size].queue else full


def _full(bench: Bench, batch: int, kind: str) -> Work:
    size = material.SIZES[bench.size]
    settings: dict[str, Any] = {"model": str(bench.made.model), "prompts": batch, "batch": batch, "stops": []}
    mine, theirs = (ours.COMPILED_FP32, _FP32) if kind == "fp32" else (ours.COMPILED_BEST, _BEST)
    if kind == "bf16":
        mine, theirs = ours.COMPILED_BF16, _GPU
    return Work(
        f"generate, {bench.size}, {size.prompt}+{size.completion} tokens, batch {batch}, {kind}",
        "transformers generate",
        bench.ours("generate", mine, **settings),
        bench.theirs("transformers_generate:run", theirs, **settings),
        _TARGETS[bench.size, batch, kind],
        lambda number: roofline.generation(size.shape, batch, size.prompt, size.completion, number),
        exact=kind == "fp32",
    )


def _queue(bench: Bench) -> Work:
    """Each side takes as many at once as is fastest for it; the draws differ, so rates of drawn tokens are compared."""
    size = material.SIZES[bench.size]
    batches = tuple(batch for batch in _QUEUE_BATCHES if batch <= size.queue) or (size.queue,)
    variants: tuple[dict[str, Any], ...] = tuple({"batch": batch} for batch in batches)
    settings: dict[str, Any] = {
        "model": str(bench.made.model),
        "prompts": size.queue,
        "stops": material.stop_tokens(size),
    }
    mean = size.completion // 3
    return Work(
        f"generate, {bench.size}, {size.queue} prompts, lengths that vary up to {size.completion}, fp32",
        "transformers generate",
        bench.ours(
            "generate", tuple(setting | variant for setting in ours.COMPILED_FP32 for variant in variants), **settings
        ),
        bench.theirs("transformers_generate:run", variants, **settings),
        _TARGET_QUEUE,
        lambda number: roofline.generation(size.shape, size.queue, size.prompt, mean, number),
        same_tokens=False,
    )
