"""A stage's work as pure functions over micro-batches: objectives, optimiser steps and evaluations by name."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.optim import Optimizer
from rlhf.types import FrozenParams, MetricSums, Params, Tree

Objective = Callable[[Params, FrozenParams, Any], tuple[Tensor, MetricSums]]
"""(params, frozen, micro-batch) -> (loss sum, metric sums with `count`)."""


@dataclass(frozen=True)
class SumOfLosses:
    """A sum of objectives, each with a forward pass of its own, which may share parameters.

    Where memory counts, each is differentiated by itself, and the gradients are added up.
    """

    parts: tuple[Objective, ...]

    def __call__(self, params: Params, frozen: FrozenParams, batch: Any) -> tuple[Tensor, MetricSums]:
        """All parts together, as any objective."""
        return add_results([part(params, frozen, batch) for part in self.parts])


def add_results(results: Sequence[tuple[Tensor, MetricSums]]) -> tuple[Tensor, MetricSums]:
    """The sum of losses, and all metrics; those that several have, such as `count`, are the same in each."""
    losses, metrics = zip(*results, strict=True)
    return functools.reduce(torch.add, losses), {name: of for some in metrics for name, of in some.items()}


class MetricLimit(NamedTuple):
    """The largest mean of a metric with which a step is still applied."""

    metric: str
    most: float


class StepSpec(NamedTuple):
    """How one kind of optimiser step is made."""

    objective: Objective
    """Its gradient is summed over the micro-batches."""
    optimizer: Optimizer
    """Element-wise; all steps of a program share its state."""
    max_grad_norm: float
    """Of the mean gradient; inf is off."""
    limit: MetricLimit | None = None
    """A step beyond it changes nothing."""


class Program(NamedTuple):
    """A stage's work as pure functions; any process can make it, so it holds no tensors."""

    steps: dict[str, StepSpec]
    """Optimiser steps by name."""
    eval_fns: dict[str, Callable[[Params, FrozenParams, Any], Tree]]
    """(params, frozen, micro-batch) -> any tree of tensors, by name."""
    frozen_updates: dict[str, Callable[[Params, Params], Params]]
    """(frozen model, params) -> its new value, by the frozen model's name (a reference that follows the policy)."""
    prepare_frozen: Callable[[str, Params], Params] = lambda name, model: model
    """(name, frozen model) -> what it is computed with, as in another dtype; made once in each process."""
    compile_to: Path | None = None
    """Where compiled code is kept, if the steps' gradients are to be compiled; None runs them as they are."""

    @property
    def optimizer(self) -> Optimizer:
        """Whose state all steps share: the first's; without steps (evaluation) one without state."""
        for spec in self.steps.values():
            return spec.optimizer
        return Optimizer(lambda params: (), lambda grads, state, params: (params, state))

    def check_optimizers(self) -> None:
        """Raise ValueError if an optimiser needs whole leaves, which executors do not have."""
        for name, spec in self.steps.items():
            _, update, elementwise, _ = spec.optimizer
            if not elementwise:
                function = f"{update.__module__}.{getattr(update, '__qualname__', update)}"
                raise ValueError(
                    f"step {name!r}: its optimizer ({function}) has elementwise=False, but executors keep "
                    "parameters in shards, which hold parts of matrices; take an element-wise one, such as "
                    "rlhf.adamw, or call its update on whole trees in a loop of your own"
                )


class ModelState(NamedTuple):
    """What a program starts from."""

    params: Params
    """Where training starts, float32."""
    frozen: FrozenParams
    """Constant models by name."""
