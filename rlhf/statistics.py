"""Statistics of scores, log-probs and texts, from values already computed."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_same_shape, check_value
from rlhf.field_docs import documented

_ROUNDING = 1e-4
"""Relative difference that the same text may have in two batches, generously; that of float32 is 1e-7."""


def spread(std: float, size: float, dtype: torch.dtype = torch.float32) -> float:
    """Return a standard deviation, or 0 where it is no more than rounding.

    Args:
        std: of values computed by a model.
        size: their typical absolute value.
        dtype: of the model's computation.

    Example:
        >>> spread(0.5, 1.0), spread(1e-6, 1.0)
        (0.5, 0.0)
    """
    return std if std > max(_ROUNDING, torch.finfo(dtype).eps / 4) * size else 0.0


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the [] Pearson correlation of two [n] float tensors; NaN if one is constant but for rounding.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0]))
        tensor(-1., dtype=torch.float64)
    """
    check_rank("correlation", 1, x=x)
    check_same_shape("correlation", x=x, y=y)
    x, y = _centred(x), _centred(y)
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def _centred(values: Tensor) -> Tensor:
    """Return [n] float64 values minus their mean; zeros where they differ by rounding alone."""
    shifted = values.double() - values.double()[:1]
    rounding = 8 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    varies = shifted.abs().max() > rounding * values.double().abs().max()
    return torch.where(varies, shifted - shifted.mean(), 0.0)


def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, float]:
    """Return metrics of the order that scores give to preference pairs, and of their correlation with length.

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

    Example:
        >>> chosen, rejected, lengths = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([3, 5])
        >>> preference_metrics(chosen, rejected, lengths, lengths)["reward/accuracy"]
        0.75
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
    """Return (mean, half-width of its 95% confidence interval) of [n] values, normal: 1.96 s / sqrt(n).

    Raises:
        ValueError: there are fewer than two values.

    Example:
        >>> mean, half_width = mean_interval(torch.tensor([1.0, 3.0]))
        >>> mean, round(half_width, 2)
        (2.0, 1.96)
    """
    check_rank("mean_interval", 1, values=values)
    if values.numel() < 2:
        raise ValueError(f"mean_interval: values has shape {tuple(values.shape)}, expected at least 2 values")
    values = values.double()
    return float(values.mean()), float(1.96 * values.std() / values.numel() ** 0.5)


@documented
class Reliability(NamedTuple):
    """The correctness of a preference model by its confidence; see `reliability`."""

    bin: Tensor
    """[B] int64: the bin of each pair."""
    confidence: Tensor
    """[B] float64: sigma(|margin|), in [0.5, 1]."""
    correct: Tensor
    """[B] float64: 1 where the margin is positive, 0.5 at a tie, else 0."""


def reliability(margins: Tensor, *, bins: int = 10) -> Reliability:
    """Return pairs in bins of equal width of the model's confidence, for a reliability curve.

    In the Bradley-Terry model the member with the higher score is better with probability sigma(|margin|). A bin
    includes its upper edge, as in scikit-learn's `calibration_curve`; the bins cover [0.5, 1], the range of confidence.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, https://arxiv.org/abs/1706.04599.

    Args:
        margins: [B] float, score of the chosen minus that of the rejected, reward units.
        bins: number of bins.

    Raises:
        ValueError: margins has not one dimension, or bins is not positive.

    Example:
        >>> reliability(torch.tensor([0.0, 9.0]), bins=10).bin
        tensor([0, 9])
    """
    check_rank("reliability", 1, margins=margins)
    check_value("reliability", bins > 0, "at least 1", bins=bins)
    margins = margins.double()
    confidence = torch.sigmoid(margins.abs())
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=torch.float64, device=margins.device)[1:-1]
    correct = (margins > 0).double() + 0.5 * (margins == 0).double()
    return Reliability(torch.bucketize(confidence, edges), confidence, correct)


def expected_calibration_error(margins: Tensor, *, bins: int = 10) -> float:
    """Return the mean distance between a preference model's confidence and accuracy, over the bins of `reliability`.

        sum_b n_b / n |accuracy_b - confidence_b|

    Source, arguments and errors: as `reliability`, eq. 3.

    Example:
        >>> expected_calibration_error(torch.zeros(4))
        0.0
    """
    index, confidence, correct = reliability(margins, bins=bins)
    gaps = torch.zeros(bins, dtype=torch.float64, device=margins.device).index_add(0, index, correct - confidence)
    return float(gaps.abs().sum() / max(len(margins), 1))


def token_repetition(tokens: Sequence[int], *, n: int = 4) -> float:
    """Return the share of a text's n-grams that repeat earlier ones: 1 - distinct / all; 0 below n tokens.

    Source: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", eq. 8,
    https://arxiv.org/abs/1908.04319.

    Example:
        >>> token_repetition([1, 2, 1, 2], n=2) == 1 - 2 / 3
        True
    """
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@documented
class Diversity(NamedTuple):
    """Distinct n-grams of many texts, and each text's part in them; see `diversity`."""

    distinct: int
    """Distinct n-grams of all texts together."""
    totals: list[int]
    """N-grams of each text."""
    sole: list[int]
    """Distinct n-grams of each text that no other text has."""


def diversity(texts: Sequence[Sequence[Sequence[int]]], *, n: int) -> Diversity:
    """Return the counts of distinct n-grams.

        distinct-n = distinct / sum(totals),   and without text i  (distinct - sole[i]) / (sum(totals) - totals[i])

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.3,
    https://arxiv.org/abs/1510.03055.

    Args:
        texts: the token ids of each text; a text may have several pieces, which n-grams do not cross.
        n: tokens of an n-gram.

    Example:
        >>> diversity([[[1, 2, 3]], [[1, 2]]], n=2)
        Diversity(distinct=2, totals=[2, 1], sole=[1, 0])
    """
    grams = [[gram for piece in text for gram in ngrams(piece, n)] for text in texts]
    texts_with = Counter(gram for text in grams for gram in set(text))
    sole = [sum(texts_with[gram] == 1 for gram in set(text)) for text in grams]
    return Diversity(len(texts_with), list(map(len, grams)), sole)


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return all runs of n tokens, in order.

    Example:
        >>> ngrams([1, 2, 3], 2)
        [(1, 2), (2, 3)]
    """
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
