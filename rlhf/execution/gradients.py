"""Gradients of the losses of steps: compiled, or by a backward pass that frees memory as early as possible."""

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
"""Function (params, frozen, micro-batch) -> (flat gradient [layout.size] float32, (loss sum, metric sums))."""


def make_gradient(objective: Objective, layout: FlatLayout, compile_to: Path | None) -> Gradient:
    """Return the gradient function of `objective` with respect to its first argument.

    Args:
        objective: pure function.
        layout: layout of the parameters and of the gradient.
        compile_to: folder of compiled code. None runs eagerly.

    Example:
        >>> from rlhf.tree import flat_layout
        >>> params = {"w": torch.tensor([3.0])}
        >>> layout = flat_layout(params)
        >>> gradient = make_gradient(lambda params, frozen, batch: (params["w"].square().sum(), {}), layout, None)
        >>> flat, (loss, metrics) = gradient(params, {}, None)
        >>> unflatten(flat, layout), loss
        ({'w': tensor([6.])}, tensor(9.))
    """
    return _eager(objective, layout) if compile_to is None else compiled(_traceable(objective, layout), compile_to)


def make_gradients(program: Program, layout: FlatLayout) -> dict[str, Gradient]:
    """Return the gradient functions of the objectives of all steps, by the name of the step.

    Args:
        program: the program with the steps.
        layout: layout of the parameters and of the gradients.

    Example:
        >>> from rlhf.execution.program import StepSpec
        >>> from rlhf.tree import flat_layout
        >>> def loss(params, frozen, batch):
        ...     return (params["w"] * batch).sum(), {}
        >>> program = Program({"main": StepSpec(loss, rlhf.adamw(rlhf.constant_schedule(0.1)), 1.0)}, {}, {})
        >>> params = {"w": torch.ones(1)}
        >>> layout = flat_layout(params)
        >>> flat, _ = make_gradients(program, layout)["main"](params, {}, torch.tensor(2.0))
        >>> unflatten(flat, layout)
        {'w': tensor([2.])}
    """
    return {name: make_gradient(spec.objective, layout, program.compile_to) for name, spec in program.steps.items()}


def _traceable(objective: Objective, layout: FlatLayout) -> Gradient:
    differentiate = grad_and_value(objective, has_aux=True)

    def gradient(params: Params, frozen: dict[str, Params], batch: Any) -> tuple[Tensor, tuple[Tensor, MetricSums]]:
        gradients, result = differentiate(params, frozen, batch)
        return flatten(gradients, layout), result

    return gradient


def _eager(objective: Objective, layout: FlatLayout) -> Gradient:
    """Return the gradient function without `torch.func`, which takes twice the memory for second derivatives.

    The gradient of a leaf is added to the flat buffer and freed as soon as it is complete. The graph of one part of
    the objective is freed before the next part begins. Gradients of a leaf that several parts read are added.
    """
    parts = objective.parts if isinstance(objective, SumOfLosses) else (objective,)

    def gradient(params: Params, frozen: dict[str, Params], batch: Any) -> tuple[Tensor, tuple[Tensor, MetricSums]]:
        inputs = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
        flat = torch.zeros(layout.size, device=leaves(params)[0].device)
        tree_map(_accumulate_into, inputs, unflatten(flat, layout))
        results = []
        for part in parts:
            with torch.enable_grad():
                result = part(inputs, frozen, batch)
                if result[0].requires_grad:
                    result[0].backward(inputs=leaves(inputs))  # type: ignore[no-untyped-call]
            results.append(tree_map(Tensor.detach, result))
            del result  # and the graph that its metrics may hold
        return flat, add_results(results)

    return gradient


def _accumulate_into(leaf: Tensor, buffer: Tensor) -> None:
    """Make the first backward pass write the leaf's gradient to `buffer`, and later ones add to it."""
    empty = True

    def accumulate(leaf: Tensor) -> None:
        nonlocal empty
        if empty:
            buffer.copy_(leaf.grad)  # type: ignore[arg-type]  # set just before the hook
        else:
            buffer.add_(leaf.grad)  # type: ignore[arg-type]
        leaf.grad, empty = None, False

    leaf.register_post_accumulate_grad_hook(accumulate)  # type: ignore[no-untyped-call]
