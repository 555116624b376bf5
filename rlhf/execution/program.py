"""The work of a stage as pure functions over micro-batches: objectives, optimiser steps and evaluations by name."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.field_docs import documented
from rlhf.optim import Optimizer
from rlhf.tree import FlatLayout, flat_layout
from rlhf.types import FrozenParams, MetricSums, Params, Tree

Objective = Callable[[Params, FrozenParams, Any], tuple[Tensor, MetricSums]]
"""Function (params, frozen, micro-batch) -> (loss sum, metric sums with `count`)."""


@documented
@dataclass(frozen=True)
class SumOfLosses:
    """A sum of objectives, each with its own forward pass. They may share parameters.

    The eager gradient differentiates the parts one after the other, which saves memory.
    """

    parts: tuple[Objective, ...]
    """The objectives to add."""

    def __call__(self, params: Params, frozen: FrozenParams, batch: Any) -> tuple[Tensor, MetricSums]:
        """Return the sum of the losses and the metrics of all parts."""
        return add_results([part(params, frozen, batch) for part in self.parts])


def add_results(results: Sequence[tuple[Tensor, MetricSums]]) -> tuple[Tensor, MetricSums]:
    """Return the sum of the losses and all metrics. A metric of several parts, such as `count`, must be equal in each.

    Args:
        results: (loss sum, metric sums) of each part.

    Example:
        >>> count = torch.tensor(2)
        >>> results = [(torch.tensor(1.0), {"a": 3, "count": count}), (torch.tensor(2.0), {"b": 4, "count": count})]
        >>> add_results(results)
        (tensor(3.), {'a': 3, 'count': tensor(2), 'b': 4})
    """
    losses, metrics = zip(*results, strict=True)
    return functools.reduce(torch.add, losses), {name: value for part in metrics for name, value in part.items()}


@documented
class MetricLimit(NamedTuple):
    """Upper bound of the mean of a metric, beyond which a step is skipped."""

    metric: str
    """Name of the metric."""
    most: float
    """Largest mean at which the step is applied."""


@documented
class StepSpec(NamedTuple):
    """Specification of one kind of optimiser step."""

    objective: Objective
    """Function whose gradient is summed over the micro-batches."""
    optimizer: Optimizer
    """Element-wise optimiser. All steps of a program share its state."""
    max_grad_norm: float | dict[str, float]
    """Maximum norm of the mean gradient; inf disables clipping. A dict clips models apart, each by its own norm: it has
    the limit of every top-level key of the parameters."""
    limit: MetricLimit | None = None
    """Limit beyond which the step is skipped; None never skips it."""


@documented
class Program(NamedTuple):
    """The work of a stage as pure functions. Every process makes its own program, so it holds no tensors."""

    steps: dict[str, StepSpec]
    """Optimiser steps by name."""
    eval_fns: dict[str, Callable[[Params, FrozenParams, Any], Tree]]
    """Functions (params, frozen, micro-batch) -> any tree of tensors, by name."""
    frozen_updates: dict[str, Callable[[Params, Params], Params]]
    """Functions (frozen model, params) -> updated frozen model, by the model's name, such as a reference that follows
    the policy."""
    prepare_frozen: Callable[[str, Params], Params] = lambda name, model: model
    """(name, frozen model) -> the form that functions compute with, such as another dtype. Called once in each
    process."""
    compile_to: Path | None = None
    """Folder of compiled code, if the gradients of steps are compiled. None runs them eagerly."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser of the first step, whose state all steps share. Without steps it has no state."""
        for spec in self.steps.values():
            return spec.optimizer
        return Optimizer(lambda params: (), lambda grads, state, params: (params, state))

    def layout(self, params: Params) -> FlatLayout:
        """Return the layout of the flat buffer. If models are clipped apart, each begins at a chunk.

        Raises:
            ValueError: a step's limits are not those of the top-level keys of `params`.
        """
        limits = [spec.max_grad_norm for spec in self.steps.values() if isinstance(spec.max_grad_norm, dict)]
        for by_model in limits:
            if by_model.keys() != params.keys():
                raise ValueError(f"max_grad_norm has the keys {sorted(by_model)}, expected {sorted(params)}")
        return flat_layout(params, chunk_models=bool(limits))

    def check_optimizers(self) -> None:
        """Raise ValueError if an optimiser needs whole leaves, because executors split them."""
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
    """Initial state of a program."""

    params: Params
    """Initial parameters, float32."""
    frozen: FrozenParams
    """Constant models by name."""
