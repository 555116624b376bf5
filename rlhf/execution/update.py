"""The decision about an optimiser step, which is the same in every process because it depends on the same numbers."""

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
    """Decision about the summed gradient of the micro-batches of a step."""

    scale: float
    """Factor that turns the sum into the clipped mean gradient."""
    grad_norm: float
    """Norm of the mean gradient before clipping."""
    is_finite: bool
    """True if every loss and the gradient are finite. Otherwise the step raises an error."""
    within_limit: bool
    """True if the step is within its `MetricLimit`. Otherwise it is skipped."""


def sums_of_results(results: Sequence[Any], spec: StepSpec) -> Tensor:
    """Return loss, count and limited metric of each micro-batch, [M, 3] float64 on the CPU.

    Args:
        results: (loss sum, metric sums with `count`) of each micro-batch.
        spec: specification of the step. Without a limit, the limited metric is 0.

    Example:
        >>> spec = StepSpec(lambda params, frozen, batch: None, rlhf.adamw(rlhf.constant_schedule(0.1)), 1.0)
        >>> sums_of_results([(torch.tensor(2.0), {"count": torch.tensor(4)})], spec)
        tensor([[2., 4., 0.]], dtype=torch.float64)
    """
    rows = []
    for loss, metrics in results:
        limited = float(metrics[f"{spec.limit.metric}_sum"]) if spec.limit else 0.0
        rows.append([float(loss), float(metrics["count"]), limited])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def plan_update(table: Tensor, squares: Tensor, spec: StepSpec) -> Update:
    """Return the decision about a step. Every owner of a shard calls this function with the same numbers.

    Args:
        table: [M, 3] float64, `sums_of_results` of all micro-batches.
        squares: [chunks] float64, `rlhf.tree.chunked_squared_norms` of the summed gradient.
        spec: specification of the step.

    Example:
        >>> spec = StepSpec(lambda params, frozen, batch: None, rlhf.adamw(rlhf.constant_schedule(0.1)), 1.0)
        >>> table = torch.tensor([[2.0, 4.0, 0.0]], dtype=torch.float64)
        >>> plan_update(table, torch.tensor([4.0], dtype=torch.float64), spec)
        Update(scale=0.25, grad_norm=0.5, is_finite=True, within_limit=True)
    """
    _, count, limited = tree_sum(table).tolist()
    scale, norm = update_scale(squares, count, spec.max_grad_norm)
    within_limit = spec.limit is None or limited / (count or 1.0) <= spec.limit.most
    return Update(scale, norm, math.isfinite(norm) and all_finite(table), within_limit)


def step_metrics(results: Sequence[Any], update: Update) -> dict[str, float]:
    """Return the means of the metric sums of all micro-batches, and `grad_norm`.

    Args:
        results: (loss sum, metric sums) of each micro-batch.
        update: the decision about the step.

    Example:
        >>> results = [(torch.tensor(2.0), {"loss/sft_sum": torch.tensor(2.0), "count": torch.tensor(4)})]
        >>> step_metrics(results, Update(0.25, 0.5, is_finite=True, within_limit=True))
        {'loss/sft': 0.5, 'grad_norm': 0.5}
    """
    _, sums = tree_sum(results)
    return {name: float(mean) for name, mean in mean_metrics(sums).items()} | {"grad_norm": update.grad_norm}


def nonfinite_error(
    name: str, batches: Sequence[Any], results: Sequence[Any], update: Update, is_finite: Callable[[Any], bool]
) -> NonFiniteError:
    """Return the error of a refused step, with the offending micro-batch.

    Args:
        name: name of the step.
        batches: micro-batches of the step.
        results: (loss sum, metric sums) of each micro-batch.
        update: the decision about the step.
        is_finite: function that returns True if loss, metrics and gradient of a micro-batch are finite.

    Example:
        >>> batches, results = ["good", "bad"], [(torch.tensor(1.0), {}), (torch.tensor(torch.inf), {})]
        >>> update = Update(1.0, 2.0, is_finite=False, within_limit=True)
        >>> nonfinite_error("sft", batches, results, update, lambda batch: batch == "good")
        NonFiniteError('sft: loss inf, gradient norm 2 in micro-batch 1')
    """
    loss, _ = tree_sum(results)
    offender = next((number for number, batch in enumerate(batches) if not is_finite(batch)), 0)
    message = f"{name}: loss {float(loss):g}, gradient norm {update.grad_norm:g} in micro-batch {offender}"
    return NonFiniteError(message, batches[offender])
