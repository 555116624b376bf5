"""Figures about a model from tensors already computed: pure, no model in sight."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_same_shape, check_value

_ROUNDING = 1e-4
"""Relative differences that the same text may have between two batches, with room to spare; float32 has 1e-7."""


def spread(std: float, size: float, dtype: torch.dtype = torch.float32) -> float:
    """A standard deviation, or 0 where it is no more than rounding.

    Args:
        std: of values that a model gives.
        size: their typical absolute value.
        dtype: in which the model computes.
    """
    return std if std > max(_ROUNDING, torch.finfo(dtype).eps / 4) * size else 0.0


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """[] Pearson's correlation of two [n] float tensors; NaN where one varies by rounding alone, or not at all.

    Raises:
        ValueError: shapes differ.
    """
    check_rank("correlation", 1, x=x)
    check_same_shape("correlation", x=x, y=y)
    x, y = _centred(x), _centred(y)
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def _centred(values: Tensor) -> Tensor:
    """[n] float64 values minus their mean; zeros where they differ by rounding alone."""
    shifted = values.double() - values.double()[:1]
    rounding = 8 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    varies = shifted.abs().max() > rounding * values.double().abs().max()
    return torch.where(varies, shifted - shifted.mean(), 0.0)


def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, float]:
    """Metrics of how well scores order preference pairs, and of how far they follow length.

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


class Reliability(NamedTuple):
    """The correctness of a preference model by its confidence; see `reliability`."""

    bin: Tensor
    """[B] int64: the bin of each pair."""
    confidence: Tensor
    """[B] float64: sigma(|margin|), in [0.5, 1]."""
    correct: Tensor
    """[B] float64: 1 where the margin is positive, 0.5 at a tie, else 0."""


def reliability(margins: Tensor, *, bins: int = 10) -> Reliability:
    """Sort pairs into equal bins of the model's confidence, for a reliability curve.

    By Bradley and Terry the preferred member is the better one with probability sigma(|margin|). A bin holds its upper
    edge, as in scikit-learn's `calibration_curve`; the bins here cover [0.5, 1], since nobody is less sure than that.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, https://arxiv.org/abs/1706.04599.

    Args:
        margins: [B] float, score of the chosen minus that of the rejected, reward units.
        bins: how many.

    Raises:
        ValueError: margins has not one dimension, or bins is not positive.
    """
    check_rank("reliability", 1, margins=margins)
    check_value("reliability", bins > 0, "at least 1", bins=bins)
    margins = margins.double()
    confidence = torch.sigmoid(margins.abs())
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=torch.float64, device=margins.device)[1:-1]
    correct = (margins > 0).double() + 0.5 * (margins == 0).double()
    return Reliability(torch.bucketize(confidence, edges), confidence, correct)


def expected_calibration_error(margins: Tensor, *, bins: int = 10) -> float:
    """Mean distance of a preference model's confidence from how often it is right, over the bins of `reliability`.

        sum_b n_b / n |accuracy_b - confidence_b|

    Source, arguments and errors: as `reliability`, eq. 3.
    """
    place, confidence, correct = reliability(margins, bins=bins)
    gaps = torch.zeros(bins, dtype=torch.float64, device=margins.device).index_add(0, place, correct - confidence)
    return float(gaps.abs().sum() / max(len(margins), 1))


def token_repetition(tokens: Sequence[int], *, n: int = 4) -> float:
    """Share of a text's n-grams that the text has before: 1 - distinct / all; 0 for a text shorter than n tokens.

    Source: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", eq. 8,
    https://arxiv.org/abs/1908.04319.
    """
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class Diversity(NamedTuple):
    """Distinct n-grams of many texts, and what each text adds to them; see `diversity`."""

    distinct: int
    """Different n-grams in all."""
    totals: list[int]
    """N-grams of each text."""
    sole: list[int]
    """Different n-grams that only this text has."""


def diversity(texts: Sequence[Sequence[Sequence[int]]], *, n: int) -> Diversity:
    """Count distinct n-grams.

        distinct-n = distinct / sum(totals),   and without text i  (distinct - sole[i]) / (sum(totals) - totals[i])

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.3,
    https://arxiv.org/abs/1510.03055.

    Args:
        texts: the token ids of each text; a text may have several pieces, which n-grams do not cross.
        n: tokens of an n-gram.
    """
    grams = [[gram for piece in text for gram in ngrams(piece, n)] for text in texts]
    holders = Counter(gram for own in grams for gram in set(own))
    return Diversity(len(holders), list(map(len, grams)), [sum(holders[g] == 1 for g in set(own)) for own in grams])


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
