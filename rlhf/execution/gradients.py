"""The gradient of a step's loss: compiled, or by a backward pass that frees what it has used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from rlhf.execution.compiled import compiled
from rlhf.execution.program import Objective, Program, SumOfLosses, add_results
from rlhf.tree import FlatLayout, flatten, leaves, tree_map, unflatten
from rlhf.types import MetricSums, Params

Gradient = Callable[[Params, dict[str, Params], Any], tuple[Tensor, tuple[Tensor, MetricSums]]]
"""(params, frozen, micro-batch) -> (flat gradient [layout.size] float32, (loss sum, metric sums))."""


def make_gradient(objective: Objective, layout: FlatLayout, compile_to: Path | None) -> Gradient:
    """The gradient of `objective` with respect to its first argument.

    Args:
        objective: pure.
        layout: of the parameters, and of the gradient.
        compile_to: where compiled code is kept; None runs the functions as they are.
    """
    return _eager(objective, layout) if compile_to is None else compiled(_traceable(objective, layout), compile_to)


def make_gradients(program: Program, layout: FlatLayout) -> dict[str, Gradient]:
    """The gradient of each step's objective, with the parameters laid out as `layout`."""
    return {name: make_gradient(spec.objective, layout, program.compile_to) for name, spec in program.steps.items()}


def _traceable(objective: Objective, layout: FlatLayout) -> Gradient:
    differentiate = grad_and_value(objective, has_aux=True)

    def gradient(params: Params, frozen: dict[str, Params], batch: Any) -> tuple[Tensor, tuple[Tensor, MetricSums]]:
        gradients, result = differentiate(params, frozen, batch)
        return flatten(gradients, layout), result

    return gradient


def _eager(objective: Objective, layout: FlatLayout) -> Gradient:
    """The same bits without `torch.func`, which keeps all that a second derivative would need: twice the memory.

    Each leaf's gradient is laid into the flat buffer, and freed, as soon as it is complete. What one part of the
    objective kept is gone before the next begins; gradients of a leaf that several parts read add up.
    """
    parts = objective.parts if isinstance(objective, SumOfLosses) else (objective,)

    def gradient(params: Params, frozen: dict[str, Params], batch: Any) -> tuple[Tensor, tuple[Tensor, MetricSums]]:
        own = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
        flat = torch.zeros(layout.size, device=leaves(params)[0].device)
        tree_map(_lay_into, own, unflatten(flat, layout))
        results = []
        for part in parts:
            with torch.enable_grad():
                result = part(own, frozen, batch)
                if result[0].requires_grad:
                    result[0].backward(inputs=leaves(own))  # type: ignore[no-untyped-call]
            results.append(tree_map(Tensor.detach, result))
            del result  # with what its metrics may still hold
        return flat, add_results(results)

    return gradient


def _lay_into(leaf: Tensor, place: Tensor) -> None:
    """Let the backward pass put the leaf's gradient there, and later ones add to it."""
    empty = True

    def lay(leaf: Tensor) -> None:
        nonlocal empty
        if empty:
            place.copy_(leaf.grad)  # type: ignore[arg-type]  # it has just been made
        else:
            place.add_(leaf.grad)  # type: ignore[arg-type]
        leaf.grad, empty = None, False

    leaf.register_post_accumulate_grad_hook(lay)  # type: ignore[no-untyped-call]
