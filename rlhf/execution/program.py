"""A stage's work as pure functions over micro-batches: objectives, optimiser steps and evaluations by name."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.field_docs import documented
from rlhf.optim import Optimizer
from rlhf.types import FrozenParams, MetricSums, Params, Tree

Objective = Callable[[Params, FrozenParams, Any], tuple[Tensor, MetricSums]]
"""(params, frozen, micro-batch) -> (loss sum, metric sums with `count`)."""


@documented
@dataclass(frozen=True)
class SumOfLosses:
    """A sum of objectives, each with its own forward pass; they may share parameters.

    The eager gradient differentiates the parts one after the other, which saves memory.
    """

    parts: tuple[Objective, ...]

    def __call__(self, params: Params, frozen: FrozenParams, batch: Any) -> tuple[Tensor, MetricSums]:
        """Return the sum of the losses and the metrics of all parts."""
        return add_results([part(params, frozen, batch) for part in self.parts])


def add_results(results: Sequence[tuple[Tensor, MetricSums]]) -> tuple[Tensor, MetricSums]:
    """Return the sum of the losses and all metrics; a metric of several parts, such as `count`, is equal in each."""
    losses, metrics = zip(*results, strict=True)
    return functools.reduce(torch.add, losses), {name: value for part in metrics for name, value in part.items()}


@documented
class MetricLimit(NamedTuple):
    """The largest mean of a metric at which a step is still applied."""

    metric: str
    most: float


@documented
class StepSpec(NamedTuple):
    """The specification of one kind of optimiser step."""

    objective: Objective
    """Its gradient is summed over the micro-batches."""
    optimizer: Optimizer
    """Element-wise; all steps of a program share its state."""
    max_grad_norm: float
    """Of the mean gradient; inf disables clipping."""
    limit: MetricLimit | None = None
    """A step beyond it is skipped."""


@documented
class Program(NamedTuple):
    """A stage's work as pure functions; every process makes its own, so it holds no tensors."""

    steps: dict[str, StepSpec]
    """Optimiser steps by name."""
    eval_fns: dict[str, Callable[[Params, FrozenParams, Any], Tree]]
    """(params, frozen, micro-batch) -> any tree of tensors, by name."""
    frozen_updates: dict[str, Callable[[Params, Params], Params]]
    """(frozen model, params) -> updated frozen model, by its name, such as a reference that follows the policy."""
    prepare_frozen: Callable[[str, Params], Params] = lambda name, model: model
    """(name, frozen model) -> the form that functions compute with, such as another dtype; once in each process."""
    compile_to: Path | None = None
    """The folder of compiled code, if the steps' gradients are compiled; None runs them eagerly."""

    @property
    def optimizer(self) -> Optimizer:
        """The first step's optimiser, whose state all steps share; without steps (evaluation) a stateless one."""
        for spec in self.steps.values():
            return spec.optimizer
        return Optimizer(lambda params: (), lambda grads, state, params: (params, state))

    def check_optimizers(self) -> None:
        """Raise ValueError if an optimiser needs whole leaves, which executors split."""
        for name, spec in self.steps.items():
            _, update, elementwise, _ = spec.optimizer
            if not elementwise:
                function = f"{update.__module__}.{getattr(update, '__qualname__', update)}"
                raise ValueError(
                    f"step {name!r}: its optimizer ({function}) has elementwise=False, but executors keep "
                    "parameters in shards, which hold parts of matrices; take an element-wise one, such as "
                    "rlhf.adamw, or call its update on whole trees in a loop of your own"
                )


@documented
class ModelState(NamedTuple):
    """The initial state of a program."""

    params: Params
    """Initial parameters, float32."""
    frozen: FrozenParams
    """Constant models by name."""
