"""The decision about an optimiser step: the same wherever it is taken, because it depends on the same numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.errors import NonFiniteError
from rlhf.execution.program import StepSpec
from rlhf.execution.shard import update_scale
from rlhf.field_docs import documented
from rlhf.ops import mean_metrics
from rlhf.tree import all_finite, tree_sum


@documented
class Update(NamedTuple):
    """The decision about the summed gradient of a step's micro-batches."""

    scale: float
    """The factor that turns the sum into the clipped mean gradient."""
    grad_norm: float
    """The norm of the mean gradient before clipping."""
    is_finite: bool
    """True if every loss and the gradient are finite; otherwise the step raises an error."""
    within_limit: bool
    """True if the step is within its `MetricLimit`; otherwise it is skipped."""


def sums_of_results(results: Sequence[Any], spec: StepSpec) -> Tensor:
    """Return [M, 3] float64 on the CPU: each micro-batch's loss, count and limited metric (0 without a limit).

    Args:
        results: (loss sum, metric sums with `count`) of each micro-batch.
        spec: the step's specification.
    """
    rows = []
    for loss, metrics in results:
        limited = float(metrics[spec.limit.metric]) if spec.limit else 0.0
        rows.append([float(loss), float(metrics["count"]), limited])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def plan_update(table: Tensor, squares: Tensor, spec: StepSpec) -> Update:
    """Decide what to do with a step. Every owner of a shard calls this with the same numbers.

    Args:
        table: [M, 3], `sums_of_results` of all micro-batches.
        squares: [chunks] float64, `rlhf.tree.chunked_squared_norms` of the summed gradient.
        spec: the step's specification.
    """
    _, count, limited = tree_sum(table).tolist()
    scale, norm = update_scale(squares, count, spec.max_grad_norm)
    within_limit = spec.limit is None or limited / (count or 1.0) <= spec.limit.most
    return Update(scale, norm, math.isfinite(norm) and all_finite(table), within_limit)


def step_metrics(results: Sequence[Any], update: Update) -> dict[str, float]:
    """Return the means of the micro-batches' metric sums, and `grad_norm`."""
    _, sums = tree_sum(results)
    return {name: float(mean) for name, mean in mean_metrics(sums).items()} | {"grad_norm": update.grad_norm}


def nonfinite_error(
    name: str, batches: Sequence[Any], results: Sequence[Any], update: Update, is_finite: Callable[[Any], bool]
) -> NonFiniteError:
    """Return the error of a refused step, with the offending micro-batch.

    Args:
        name: the step's name.
        batches: its micro-batches.
        results: (loss sum, metric sums) of each micro-batch.
        update: the decision about the step.
        is_finite: returns True if loss, metrics and gradient of a micro-batch are finite.
    """
    loss, _ = tree_sum(results)
    offender = next((number for number, batch in enumerate(batches) if not is_finite(batch)), 0)
    message = f"{name}: loss {float(loss):g}, gradient norm {update.grad_norm:g} in micro-batch {offender}"
    return NonFiniteError(message, batches[offender])
