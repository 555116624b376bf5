"""Rematerialisation: results that are recomputed in the backward pass, and large results computed in chunks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf.accelerate import accelerated

_CHUNK = 1 << 26
"""Number of logits in memory at once. Each chunk adds a whole gradient of the embedding; smaller ones are slower."""


@accelerated("recomputation.remat")
def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that stores only its arguments for the backward pass and recomputes everything else.

    Values and gradients have the same bits. In compiled code, under `vmap`, in forward mode and under repeated
    differentiation, the plain function runs: a compiler would notice that a result is computed twice and store it.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174;
    `jax.checkpoint` is the same transform. torch.utils.checkpoint does not work under `torch.func`.

    Args:
        function: pure function from pytrees of tensors to a floating-point tensor or a tuple of them. Tensors that it
            closes over get no gradient.

    Returns:
        A function of the same arguments.

    Example:
        >>> torch.func.grad(remat(lambda x: (x * x).sum()))(torch.tensor([3.0]))
        tensor([6.])
    """
    return function


def chunk_size(vocab_size: int) -> int:
    """Return the number of tokens whose float32 logits take at most 256 MB, as the `size` of `in_chunks`.

    Args:
        vocab_size: number of logits per token.

    Example:
        >>> chunk_size(50_257)
        1335
    """
    return max(1, _CHUNK // vocab_size)


@accelerated("recomputation.in_chunks")
def in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that runs on at most `size` tokens at once and recomputes each chunk in the backward pass.

    Intermediate results, such as the logits over a large vocabulary, never exist for all tokens at once. For up to
    `size` tokens, and in compiled code, the plain function runs. Gradients of `shared` are summed over chunks and equal
    those of the plain function up to rounding.

    Args:
        function: pure function (shared, *columns) -> tuple of per-token tensors [C, ...].
        size: maximum number of tokens in a chunk, at least 1.

    Returns:
        A function of (shared, *columns): any pytree, followed by tensors [C, ...].

    Example:
        >>> in_chunks(lambda shared, x: (shared * x,), 2)(torch.tensor(2.0), torch.ones(3))
        (tensor([2., 2., 2.]),)
    """
    return function
