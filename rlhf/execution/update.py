"""The decision about an optimiser step, which is the same in every process because it depends on the same numbers."""

import itertools
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
from rlhf.optim import clip_scale
from rlhf.tree import CHUNK, FlatLayout, all_finite, tree_sum


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
    model_norms: dict[str, float] = {}  # noqa: RUF012
    """Norms of the mean gradients of models that are clipped apart, by name."""
    model_factors: dict[str, float] = {}  # noqa: RUF012
    """Factors that clip the gradients of these models, by name."""


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


def plan_update(table: Tensor, squares: Tensor, spec: StepSpec, layout: FlatLayout) -> Update:
    """Return the decision about a step. Every owner of a shard calls this function with the same numbers.

    Args:
        table: [M, 3] float64, `sums_of_results` of all micro-batches.
        squares: [chunks] float64, `rlhf.tree.chunked_squared_norms` of the summed gradient.
        spec: specification of the step.
        layout: layout of the parameters (`Program.layout`).

    Example:
        >>> from rlhf.tree import flat_layout
        >>> spec = StepSpec(lambda params, frozen, batch: None, rlhf.adamw(rlhf.constant_schedule(0.1)), 1.0)
        >>> layout = flat_layout({"w": torch.ones(2)})
        >>> table = torch.tensor([[2.0, 4.0, 0.0]], dtype=torch.float64)
        >>> plan_update(table, torch.tensor([4.0], dtype=torch.float64), spec, layout)[:4]
        (0.25, 0.5, True, True)
    """
    _, count, limited = tree_sum(table).tolist()
    max_norm = spec.max_grad_norm
    limits, joint = (max_norm, math.inf) if isinstance(max_norm, dict) else ({}, max_norm)
    scale, norm = update_scale(squares, count, joint)
    ranges = model_ranges(layout) if limits else {}
    norms = {name: squares[low // CHUNK : high // CHUNK].sum().sqrt() * scale for name, (low, high) in ranges.items()}
    return Update(
        scale,
        norm,
        is_finite=math.isfinite(norm) and all_finite(table),
        within_limit=spec.limit is None or limited / (count or 1.0) <= spec.limit.most,
        model_norms={name: float(norm) for name, norm in norms.items()},
        model_factors={name: float(clip_scale(norm, limits[name])) for name, norm in norms.items()},
    )


def clip_models(gradient: Tensor, update: Update, layout: FlatLayout, *, start: int = 0) -> None:
    """Multiply in place the gradients of models that are clipped apart by their factors.

    Args:
        gradient: [n] float32, the elements [start, start + n) of the summed gradient (donated buffer).
        update: the decision about the step.
        layout: layout of the parameters (`Program.layout`).
        start: first element of the range.

    Example:
        >>> from rlhf.tree import flat_layout
        >>> layout = flat_layout({"critic": torch.ones(1), "policy": torch.ones(1)}, chunk_models=True)
        >>> gradient = torch.ones(2 * CHUNK)
        >>> clip_models(gradient, Update(1.0, 2.0, True, True, model_factors={"critic": 0.5}), layout)
        >>> gradient[0], gradient[CHUNK]
        (tensor(0.5000), tensor(1.))
    """
    ranges = model_ranges(layout)
    for name, factor in update.model_factors.items():
        low, high = (min(max(bound - start, 0), len(gradient)) for bound in ranges[name])
        gradient[low:high].mul_(factor)


def model_ranges(layout: FlatLayout) -> dict[str, tuple[int, int]]:
    """Return the elements [first, end) of each top-level key of the parameters in the flat buffer.

    Args:
        layout: layout of the parameters.

    Example:
        >>> from rlhf.tree import flat_layout
        >>> model_ranges(flat_layout({"critic": torch.ones(1), "policy": torch.ones(1)}, chunk_models=True))
        {'critic': (0, 4096), 'policy': (4096, 8192)}
    """
    starts: dict[str, int] = {}
    for name, offset in zip(layout.names, layout.offsets, strict=True):
        starts.setdefault(name.partition(".")[0], offset)
    return dict(zip(starts, itertools.pairwise([*starts.values(), layout.size]), strict=True))


def step_metrics(results: Sequence[Any], update: Update) -> dict[str, float]:
    """Return the means of the metric sums of all micro-batches, `grad_norm`, and norms of models clipped apart.

    Args:
        results: (loss sum, metric sums) of each micro-batch.
        update: the decision about the step.

    Example:
        >>> results = [(torch.tensor(2.0), {"loss/sft_sum": torch.tensor(2.0), "count": torch.tensor(4)})]
        >>> step_metrics(results, Update(0.25, 0.5, is_finite=True, within_limit=True))
        {'loss/sft': 0.5, 'grad_norm': 0.5}
    """
    _, sums = tree_sum(results)
    norms = {f"grad_norm/{name}": norm for name, norm in update.model_norms.items()}
    means = {name: float(mean) for name, mean in mean_metrics(sums).items()}
    return means | {"grad_norm": update.grad_norm} | norms


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
