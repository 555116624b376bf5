"""Fast forms of `rlhf.remat`: functions that are recomputed in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from rlhf.transforms import is_transformed, reference_needed

Function = Callable[..., Any]


def remat(reference: Function, function: Function) -> Function:
    """Store only the arguments of `function`, and recompute everything else in the backward pass."""

    def again(*arguments: Any) -> Any:
        leaves, structure = pytree.tree_flatten(arguments)
        if reference_needed(*leaves):
            return reference(function)(*arguments)
        return _Remat.apply(function, structure, *leaves)  # type: ignore[no-untyped-call]

    return again


def in_chunks(reference: Function, function: Function, size: int) -> Function:
    """Run `function` chunk by chunk, and recompute each chunk in the backward pass."""

    def chunked(shared: Any, *columns: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or len(columns[0]) <= size:
            return reference(function, size)(shared, *columns)
        again = remat(lambda function: function, function)
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
        if is_transformed() or not torch.is_grad_enabled():  # nobody differentiates this pass: kernels may be fused
            leaves = [leaf.detach() for leaf in leaves]
        places = [place for place, needed in enumerate(wanted) if needed]

        def weighted(*some: Tensor) -> Tensor:
            """Return a scalar with the required gradients; `vjp` would not let `remat` be nested."""
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
