"""What the hardware allows: a memory copy and a large matrix product, and the least time that a piece of work needs.

A phase needs at least its arithmetic at the product's rate and its traffic at the copy's, whichever is longer; phases
follow each other. Counted is what the algorithm must do: no recomputation, no padding. Weights that stay in a cache can
beat the copy's rate, so the share of a small model at small batches may come out too high.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.material import LlamaShape, Shape

_SIDE = {"cpu": 2048, "cuda": 8192}
_NUMBERS = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Large enough for each device to reach its rate."""


class Phase(NamedTuple):
    """Part of a piece of work."""

    flops: float
    """Floating-point operations in matrix products."""
    bytes: float
    """Read and written in main memory, at least."""


def product_flops(device: str) -> int:
    """Operations of the product."""
    return 2 * _SIDE[device] ** 3


def copy_bytes(device: str) -> int:
    """Read and written by the copy."""
    return 2 * 4 * _NUMBERS[device]


def measures(device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """What is timed beside the two sides: the copy (256 MB; on a GPU 4 GB) and the product (2048 or 8192 wide)."""
    source = torch.ones(_NUMBERS[device], device=device)
    copied = torch.empty_like(source)
    factor = torch.linspace(-1, 1, _SIDE[device] ** 2, device=device).view(_SIDE[device], -1).to(dtype)

    def timed(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return {"copy": timed(lambda: copied.copy_(source)), "product": timed(lambda: factor @ factor)}


def least_seconds(phases: list[Phase], *, flops: float, bandwidth: float) -> float:
    """The roofline's time.

    Args:
        phases: of the work.
        flops: per second, of the product.
        bandwidth: bytes per second, of the copy.
    """
    return sum(max(phase.flops / flops, phase.bytes / bandwidth) for phase in phases)


def forward_flops(shape: Shape | LlamaShape, tokens: float, length: float, predicted: float) -> float:
    """A pass over `tokens` tokens in sequences of `length`, with logits at `predicted` of them."""
    attention = 4 * shape.n_layer * shape.n_embd * tokens * (length + 1) / 2
    products = 2 * shape.n_layer * shape.block_matrices * tokens
    return products + attention + 2 * shape.vocab_size * shape.n_embd * predicted


def step(shape: Shape | LlamaShape, tokens: float, length: float, predicted: float) -> list[Phase]:
    """Forward, backward (twice the forward's products), and AdamW: four arrays read, three written."""
    weights = 4 * shape.parameters
    return [Phase(3 * forward_flops(shape, tokens, length, predicted), 3 * weights), Phase(0, 7 * weights)]


def generation(
    shape: Shape | LlamaShape, rows: int, prompt: int, completion: int, number_bytes: int, samples: int = 1
) -> list[Phase]:
    """Prefill, then a phase for every token: the weights once, and every row's keys and values so far.

    Args:
        shape: of the model.
        rows: completions.
        prompt: tokens before each.
        completion: tokens of each.
        number_bytes: bytes of a number.
        samples: completions of a prompt, which is read once.
    """
    weights, prompts = number_bytes * shape.parameters, rows // samples
    phases = [Phase(forward_flops(shape, prompts * prompt, prompt, prompts), weights)]
    for context in range(prompt + 1, prompt + completion):
        flops = rows * (forward_flops(shape, 1, 2 * context - 1, 1))  # attention over the whole context, not half
        cache = rows * shape.n_layer * shape.cache_width * context * number_bytes
        phases.append(Phase(flops, weights + cache))
    return phases
