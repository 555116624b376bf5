"""Learning-rate schedules: functions from a step to a rate. Both are [] tensors, so that code compiles only once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.checks import check_value

Schedule = Callable[[Tensor], Tensor]
"""Function from the number of updates made ([] int64) to the rate of the next update ([] float64)."""


def constant_schedule(value: float, *, warmup_steps: int = 0) -> Schedule:
    """Return a schedule that is constant after a linear warm-up.

    Update k of the warm-up, counted from 0, has the rate value (k + 1) / (warmup_steps + 1).

    Args:
        value: rate after the warm-up.
        warmup_steps: number of updates of the warm-up.

    Raises:
        ValueError: warmup_steps is negative.

    Example:
        >>> constant_schedule(1.0, warmup_steps=3)(torch.tensor(0))
        tensor(0.2500, dtype=torch.float64)
    """
    check_value("constant_schedule", warmup_steps >= 0, "at least 0", warmup_steps=warmup_steps)
    return lambda step: value * _warmup(step, warmup_steps)


def linear_schedule(value: float, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Return a schedule that decays linearly after a linear warm-up.

    The rate reaches `final` at the update after the last one, so that no update has the rate 0.

    Args:
        value: rate at the end of the warm-up.
        total_steps: number of updates, the warm-up included.
        warmup_steps: number of updates of the warm-up.
        final: rate at step `total_steps`.

    Raises:
        ValueError: warmup_steps is not below total_steps, or negative.

    Example:
        >>> linear_schedule(1.0, 4)(torch.tensor(1))
        tensor(0.7500, dtype=torch.float64)
    """
    _check_steps("linear_schedule", warmup_steps, total_steps)

    def schedule(step: Tensor) -> Tensor:
        progress = _progress(step, warmup_steps, total_steps)
        return (value + (final - value) * progress) * _warmup(step, warmup_steps)

    return schedule


def cosine_schedule(value: float, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Return a schedule that decays along half a cosine after a linear warm-up.

    Source: Loshchilov and Hutter 2017, eq. 5 without restarts, https://arxiv.org/abs/1608.03983.

    Args:
        value: rate at the end of the warm-up.
        total_steps: number of updates, the warm-up included.
        warmup_steps: number of updates of the warm-up.
        final: rate at step `total_steps`.

    Raises:
        ValueError: warmup_steps is not below total_steps, or negative.

    Example:
        >>> cosine_schedule(1.0, 4)(torch.tensor(2))
        tensor(0.5000, dtype=torch.float64)
    """
    _check_steps("cosine_schedule", warmup_steps, total_steps)

    def schedule(step: Tensor) -> Tensor:
        progress = _progress(step, warmup_steps, total_steps)
        return (final + (value - final) * 0.5 * (1.0 + torch.cos(math.pi * progress))) * _warmup(step, warmup_steps)

    return schedule


def _warmup(step: Tensor, warmup_steps: int) -> Tensor:
    return ((step.double() + 1.0) / (warmup_steps + 1.0)).clamp(max=1.0)


def _progress(step: Tensor, warmup_steps: int, total_steps: int) -> Tensor:
    return ((step.double() - warmup_steps) / (total_steps - warmup_steps)).clamp(0.0, 1.0)


def _check_steps(function: str, warmup_steps: int, total_steps: int) -> None:
    check_value(function, 0 <= warmup_steps < total_steps, f"in [0, {total_steps})", warmup_steps=warmup_steps)
