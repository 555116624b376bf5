"""Statistics of scores, preferences and texts."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_same_shape, check_value
from rlhf.field_docs import documented

_ROUNDING = 1e-4
"""Generous bound of the relative difference between scores of the same text in two batches; float32 has 1e-7."""


def spread(std: float, size: float, dtype: torch.dtype = torch.float32) -> float:
    """Return a standard deviation, or 0 if it is no larger than rounding errors.

    Args:
        std: standard deviation of values that a model computed.
        size: typical absolute value.
        dtype: dtype of the computation.

    Example:
        >>> spread(0.5, 1.0), spread(1e-6, 1.0)
        (0.5, 0.0)
    """
    return std if std > max(_ROUNDING, torch.finfo(dtype).eps / 4) * size else 0.0


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the [] Pearson correlation of two [n] tensors, or NaN if one of them is constant up to rounding.

    Args:
        x: [n] numbers.
        y: [n] numbers.

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


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the [] rank correlation of two [n] tensors, or NaN if one of them is constant or has a NaN.

    It is the Pearson correlation of the ranks, where equal numbers share the mean of their ranks.

    Source: Spearman 1904, https://doi.org/10.2307/1412159, as `scipy.stats.spearmanr`.

    Args:
        x: [n] numbers.
        y: [n] numbers.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([5.0, 6.0, 7.0]))
        tensor(1., dtype=torch.float64)
    """
    check_rank("rank_correlation", 1, x=x)
    check_same_shape("rank_correlation", x=x, y=y)
    undefined = x.isnan().any() | y.isnan().any()
    return torch.where(undefined, torch.nan, correlation(_ranks(x), _ranks(y)))


def _ranks(values: Tensor) -> Tensor:
    """Return [n] float64 ranks from 1; equal numbers share the mean of theirs."""
    lower, equal = values < values.unsqueeze(-1), values == values.unsqueeze(-1)
    return lower.double().sum(dim=-1) + (equal.double().sum(dim=-1) + 1.0) / 2.0


def _centred(values: Tensor) -> Tensor:
    """Return [n] float64 values minus their mean, or zeros if they differ only by rounding."""
    shifted = values.double() - values.double()[:1]
    rounding = 8 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    varies = shifted.abs().max() > rounding * values.double().abs().max()
    return torch.where(varies, shifted - shifted.mean(), 0.0)


def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, float]:
    """Return metrics of scored preference pairs: accuracy, margin, range and correlation with length.

    Args:
        chosen: [B] float, scores of the chosen completions, in reward units.
        rejected: [B] float, scores of the rejected completions.
        chosen_lengths: [B] numbers of tokens of the chosen completions.
        rejected_lengths: [B] numbers of tokens of the rejected completions.

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
    """Return the mean of values and the half-width of its 95% confidence interval, 1.96 s / sqrt(n).

    Args:
        values: [n] numbers, whose mean is taken as normally distributed.

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
    """Confidence and correctness of a preference model, pair by pair, as `reliability` returns them."""

    bin: Tensor
    """[B] int64: bin of each pair."""
    confidence: Tensor
    """[B] float64: confidence sigma(|margin|), in [0.5, 1]."""
    correct: Tensor
    """[B] float64: 1 where the margin is positive, 0.5 at a tie, 0 otherwise."""


def reliability(margins: Tensor, *, bins: int = 10) -> Reliability:
    """Return preference pairs in bins of equal width of the model's confidence, for a reliability curve.

    In the Bradley-Terry model, the completion with the higher score is better with probability sigma(|margin|), which
    is the confidence. The bins cover its range, [0.5, 1]. A bin includes its upper edge, as in `calibration_curve` of
    scikit-learn.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, https://arxiv.org/abs/1706.04599.

    Args:
        margins: [B] float, score of the chosen minus score of the rejected completion, in reward units.
        bins: number of bins.

    Raises:
        ValueError: margins does not have one dimension, or bins is not positive.

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
    """Return the mean distance between confidence and accuracy of a preference model, over the bins of `reliability`.

        sum_b n_b / n |accuracy_b - confidence_b|

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3, https://arxiv.org/abs/1706.04599.

    Args:
        margins: [B] float, score of the chosen minus score of the rejected completion, in reward units.
        bins: number of bins.

    Raises:
        ValueError: margins does not have one dimension, or bins is not positive.

    Example:
        >>> expected_calibration_error(torch.zeros(4))
        0.0
    """
    index, confidence, correct = reliability(margins, bins=bins)
    gaps = torch.zeros(bins, dtype=torch.float64, device=margins.device).index_add(0, index, correct - confidence)
    return float(gaps.abs().sum() / max(len(margins), 1))


def token_repetition(tokens: Sequence[int], *, n: int = 4) -> float:
    """Return the fraction of n-grams of a text that repeat earlier ones: 1 - distinct / all.

    Source: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", eq. 8,
    https://arxiv.org/abs/1908.04319.

    Args:
        tokens: token ids of the text. A text of fewer than n tokens gives 0.
        n: number of tokens in an n-gram.

    Example:
        >>> token_repetition([1, 2, 1, 2], n=2) == 1 - 2 / 3
        True
    """
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@documented
class Diversity(NamedTuple):
    """Counts of distinct n-grams of several texts, as `diversity` returns them."""

    distinct: int
    """Number of distinct n-grams of all texts together."""
    totals: list[int]
    """Number of n-grams of each text."""
    sole: list[int]
    """Number of distinct n-grams of each text that occur in no other text."""


def diversity(texts: Sequence[Sequence[Sequence[int]]], *, n: int) -> Diversity:
    """Return counts of distinct n-grams of texts, from which distinct-n is computed.

        distinct-n                 = distinct / sum(totals)
        distinct-n without text i  = (distinct - sole[i]) / (sum(totals) - totals[i])

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.3,
    https://arxiv.org/abs/1510.03055.

    Args:
        texts: token ids of each text. A text may have several pieces, which n-grams do not cross.
        n: number of tokens in an n-gram.

    Example:
        >>> diversity([[[1, 2, 3]], [[1, 2]]], n=2)
        Diversity(distinct=2, totals=[2, 1], sole=[1, 0])
    """
    grams = [[gram for piece in text for gram in ngrams(piece, n)] for text in texts]
    texts_with = Counter(gram for text in grams for gram in set(text))
    sole = [sum(texts_with[gram] == 1 for gram in set(text)) for text in grams]
    return Diversity(len(texts_with), list(map(len, grams)), sole)


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return all sequences of n consecutive `tokens`, in order.

    Example:
        >>> ngrams([1, 2, 3], 2)
        [(1, 2), (2, 3)]
    """
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
