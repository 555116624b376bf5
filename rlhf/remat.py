"""Rematerialisation: results recomputed in the backward pass instead of stored, and large ones made in chunks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf.accelerate import accelerated

_CHUNK = 1 << 26
"""Logits in memory at once. Each chunk adds a whole gradient of the embedding: smaller ones would cost time."""


@accelerated("recomputation.remat")
def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a backward pass that stores the arguments alone and recomputes everything else.

    Values and gradients are the same bits. Eager code only: a compiler would see that a result is computed twice, and
    keep the first. Under `vmap`, forward mode or repeated differentiation it is the plain function.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174, as
    `jax.checkpoint` (also `jax.remat`); torch.utils.checkpoint does not work under `torch.func`.

    Args:
        function: pure; any pytrees of tensors in, a floating tensor or a tuple of them out. What it closes over gets no
            gradient.

    Returns:
        A function of the same arguments.

    Example:
        >>> torch.func.grad(remat(lambda x: (x * x).sum()))(torch.tensor([3.0]))
        tensor([6.])
    """
    return function


def chunk_size(vocab_size: int) -> int:
    """Return the number of tokens whose float32 logits take at most 256 MB, for `in_chunks`.

    Example:
        >>> chunk_size(50_257)
        1335
    """
    return max(1, _CHUNK // vocab_size)


@accelerated("recomputation.in_chunks")
def in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return `function` of per-token columns, run on at most `size` tokens at once and recomputed in the backward pass.

    Intermediate results, such as the logits over a large vocabulary, never exist for all tokens at once. Up to
    `size` tokens, and in compiled code, it is the plain function. Gradients of `shared` are sums over chunks, and equal
    the plain function's but for rounding.

    Args:
        function: (shared, *columns) -> tuple of per-token tensors [C, ...]; pure.
        size: at least 1.

    Returns:
        A function of (shared, *columns): any pytree, then tensors [C, ...].

    Example:
        >>> in_chunks(lambda shared, x: (shared * x,), 2)(torch.tensor(2.0), torch.ones(3))
        (tensor([2., 2., 2.]),)
    """
    return function
