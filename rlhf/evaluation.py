"""Figures about a model from tensors already computed: pure, no model in sight."""

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_same_shape


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """[] Pearson's correlation of two [n] float tensors; NaN where one of them does not vary.

    Raises:
        ValueError: shapes differ.
    """
    check_rank("correlation", 1, x=x)
    check_same_shape("correlation", x=x, y=y)
    x, y = x.double() - x.double()[:1], y.double() - y.double()[:1]
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, float]:
    """How well scores order preference pairs, and whether they follow length.

    Args:
        chosen: [B] float, scores in reward units.
        rejected: [B] float.
        chosen_lengths: [B] tokens of the completions.
        rejected_lengths: [B].

    Returns:
        `reward/accuracy` (a tie counts half), `reward/margin`, `reward/min`, `reward/mean`, `reward/max`, and
        `reward/length_correlation` over all completions.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(
        "preference_metrics",
        chosen=chosen,
        rejected=rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    scores = torch.cat([chosen, rejected])
    lengths = torch.cat([chosen_lengths, rejected_lengths])
    return {
        "reward/accuracy": float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()),
        "reward/margin": float((chosen - rejected).mean()),
        "reward/min": float(scores.min()),
        "reward/mean": float(scores.mean()),
        "reward/max": float(scores.max()),
        "reward/length_correlation": float(correlation(scores, lengths)),
    }


def mean_interval(values: Tensor) -> tuple[float, float]:
    """(mean, half-width of its 95% confidence interval) of [n] values, by the normal approximation: 1.96 s / sqrt(n).

    Raises:
        ValueError: there are fewer than two values.
    """
    check_rank("mean_interval", 1, values=values)
    if values.numel() < 2:
        raise ValueError(f"mean_interval: values has shape {tuple(values.shape)}, expected at least 2 values")
    values = values.double()
    return float(values.mean()), float(1.96 * values.std() / values.numel() ** 0.5)
