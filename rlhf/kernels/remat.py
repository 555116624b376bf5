"""Memory for time: results computed again in the backward pass instead of being kept, and large ones made in chunks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from rlhf.types import Tree

_CHUNK = 1 << 26
"""Logits that are there at once. Each chunk adds a whole gradient of the embedding: smaller ones would cost time."""


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps the arguments alone and computes everything in between again.

    Values and gradients are the same bits. Eager code only: a compiler would see that a result is computed twice, and
    keep the first.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174, as
    `jax.checkpoint` (also `jax.remat`); torch.utils.checkpoint does not work under `torch.func`.

    Args:
        function: pure; any pytrees of tensors in, a floating tensor or a tuple of them out. What it closes over gets no
            gradient.

    Returns:
        A function of the same arguments.
    """

    def again(*arguments: Tree) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        return _Remat.apply(function, structure, *leaves)  # type: ignore[no-untyped-call]

    return again


def chunk_size(vocab_size: int) -> int:
    """Tokens whose float32 logits take at most 256 MB, for `in_chunks`."""
    return max(1, _CHUNK // vocab_size)


def in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int) -> Callable[..., tuple[Tensor, ...]]:
    """`function` of per-token columns, at most `size` tokens at once, each chunk computed again in the backward pass.

    So what a token needs in between, such as the logits over a large vocabulary, is never there for all of them. Up to
    `size` tokens, and in compiled code, it is the plain function. Gradients of `shared` are sums over chunks, and equal
    the plain function's but for rounding.

    Args:
        function: (shared, *columns) -> tuple of per-token tensors [C, ...]; pure.
        size: at least 1.

    Returns:
        A function of (shared, *columns): any pytree, then tensors [C, ...].
    """

    def chunked(shared: Tree, *columns: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or len(columns[0]) <= size:
            return function(shared, *columns)
        again = remat(function)
        chunks = zip(*(torch.split(column, size) for column in columns), strict=True)
        pieces = [again(shared, *chunk) for chunk in chunks]
        return tuple(torch.cat(outputs) for outputs in zip(*pieces, strict=True))

    return chunked


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Any], structure: Any, *leaves: Tensor) -> Any:
        return function(*pytree.tree_unflatten(leaves, structure))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.structure, *leaves = inputs
        ctx.save_for_backward(*leaves)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves, wanted = list(ctx.saved_tensors), ctx.needs_input_grad[2:]
        places = [place for place, needed in enumerate(wanted) if needed]

        def weighted(*some: Tensor) -> Tensor:
            """A scalar with the wanted gradients; `vjp` would not let `remat` be nested."""
            everything = list(leaves)
            for place, leaf in zip(places, some, strict=True):
                everything[place] = leaf
            outputs = ctx.function(*pytree.tree_unflatten(everything, ctx.structure))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sums = [(output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)]
            return functools.reduce(torch.add, sums)

        found = grad(weighted, argnums=tuple(range(len(places))))(*(leaves[place] for place in places))
        by_place = dict(zip(places, found, strict=True))
        return None, None, *(by_place.get(place) for place in range(len(leaves)))
