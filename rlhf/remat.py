"""Memory for time: results computed again in the backward pass instead of kept, and large ones made in chunks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf.accelerate import accelerated

_CHUNK = 1 << 26
"""Logits that are there at once. Each chunk adds a whole gradient of the embedding: smaller ones would cost time."""


@accelerated("recomputation.remat")
def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, of which the backward pass keeps the arguments alone and computes everything else again.

    Values and gradients are the same bits. Eager code only: a compiler would see that a result is computed twice, and
    keep the first. Where it is differentiated more than once or forward, or mapped, it is the plain function.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174, as
    `jax.checkpoint` (also `jax.remat`); torch.utils.checkpoint does not work under `torch.func`.

    Args:
        function: pure; any pytrees of tensors in, a floating tensor or a tuple of them out. What it closes over gets no
            gradient.

    Returns:
        A function of the same arguments.
    """
    return function


def chunk_size(vocab_size: int) -> int:
    """Tokens whose float32 logits take at most 256 MB, for `in_chunks`."""
    return max(1, _CHUNK // vocab_size)


@accelerated("recomputation.in_chunks")
def in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return `function` of per-token columns, at most `size` tokens at once, computed again in the backward pass.

    So what a token needs in between, such as the logits over a large vocabulary, is never there for all of them. Up to
    `size` tokens, and in compiled code, it is the plain function. Gradients of `shared` are sums over chunks, and equal
    the plain function's but for rounding.

    Args:
        function: (shared, *columns) -> tuple of per-token tensors [C, ...]; pure.
        size: at least 1.

    Returns:
        A function of (shared, *columns): any pytree, then tensors [C, ...].
    """
    return function
