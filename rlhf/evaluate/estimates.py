"""Figures with their uncertainty: how many samples, and a 95% bootstrap interval.

Every figure is a function of sums over the samples (a mean is a sum over a count, a correlation is made of six sums).
So one resampling serves all figures about the same samples, and the difference of two models that answered the same
prompts is paired without further ado.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

_RESAMPLES = 4000
_ELEMENTS_AT_ONCE = 1 << 22
_ROUNDING = 1e-6
"""Relative difference of two float32 scores of the same text in different batches, at most."""

Array = np.ndarray[Any, np.dtype[np.float64]]


class Figure(NamedTuple):
    """A number and what is known of its uncertainty."""

    value: float
    low: float
    """Lower end of the 95% interval; NaN where there are fewer than two samples."""
    high: float
    n: int
    """Samples: pairs, records or prompts, whichever are independent of one another."""


class Estimate(NamedTuple):
    """A figure before its interval is known."""

    columns: Array
    """[n, m]: what is summed over the samples."""
    of_sums: Callable[[Array], Array]
    """[m, ...] sums -> [...] the figure."""


def win_indicator(scores: Array, others: Array | float) -> Array:
    """[n]: 1 where a score is above the other, 0.5 where they tie but for rounding, else 0."""
    tie = np.isclose(scores, others, rtol=_ROUNDING, atol=0.0)
    return np.where(tie, 0.5, scores > others)


def mean(values: Any) -> Estimate:
    """The mean of [n] values."""
    return ratio(values, np.ones(len(values)))


def ratio(totals: Any, weights: Any) -> Estimate:
    """sum(totals) / sum(weights) of two [n] arrays: a mean over tokens, say, where the samples are records."""
    return Estimate(np.stack([totals, weights], axis=1).astype(np.float64), lambda sums: sums[0] / sums[1])


def exponential(estimate: Estimate) -> Estimate:
    """exp(figure): perplexity from the loss."""
    return Estimate(estimate.columns, lambda sums: np.exp(np.minimum(estimate.of_sums(sums), 700.0)))


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, about the same samples in the same order."""
    width = one.columns.shape[1]
    return Estimate(
        np.concatenate([one.columns, other.columns], axis=1),
        lambda sums: one.of_sums(sums[:width]) - other.of_sums(sums[width:]),
    )


def grouped_correlation(x: Any, y: Any) -> Estimate:
    """Pearson's correlation of values that come in groups.

    Args:
        x: [n, k]: each sample has k values (the two members of a preference pair).
        y: [n, k].
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    x, y = _centred(x), _centred(y)  # small numbers: their squares keep their digits
    columns = np.stack([part.sum(axis=1) for part in (np.ones_like(x), x, y, x * y, x * x, y * y)], axis=1)

    def of_sums(sums: Array) -> Array:
        mean_x, mean_y, xy, xx, yy = sums[1:] / sums[0]
        return (xy - mean_x * mean_y) / np.sqrt((xx - mean_x**2) * (yy - mean_y**2))

    return Estimate(columns, of_sums)


def _centred(values: Array) -> Array:
    """The values minus their mean; zeros where they differ by rounding alone."""
    varies = np.ptp(values) > _ROUNDING * np.abs(values).max()
    return values - values.mean() if varies else np.zeros_like(values)


def linearised(estimate: Estimate, *, least: float = -np.inf) -> Estimate:
    """The same figure, whose interval is that of its jackknife linearisation.

    For figures that resampling itself moves: an expected calibration error grows with every sample drawn twice.

    Source: Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 6 (the figure as the mean
    of the samples' influences).

    Args:
        estimate: the figure.
        least: value below which the figure cannot fall.
    """
    total = estimate.columns.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing is left of a single sample
        without = estimate.of_sums((total - estimate.columns).T)
    return from_influence(float(estimate.of_sums(total)), without, least=least)


def from_influence(value: float, without: Any, *, least: float = -np.inf) -> Estimate:
    """A figure from its value and its values [n] with each sample left out; see `linearised`."""
    without = np.asarray(without, dtype=np.float64)
    influence = (len(without) - 1) * (without.mean() - without) if len(without) > 1 else np.zeros(1)
    columns = np.stack([influence, np.ones_like(influence)], axis=1)
    return Estimate(columns, lambda sums: np.maximum(value + sums[0] / sums[1], least))


def figures(estimates: Mapping[str, Estimate], *, seed: int) -> dict[str, Figure]:
    """Values and 95% percentile intervals of figures about the same samples, all from the same resamples.

    Args:
        estimates: by name; all with the same number of samples.
        seed: of the resampling.
    """
    if not estimates:
        return {}
    whole = np.concatenate([estimate.columns for estimate in estimates.values()], axis=1)
    places = np.cumsum([estimate.columns.shape[1] for estimate in estimates.values()])[:-1]

    def of_counts(counts: Array) -> Array:
        sums = np.split(whole.T @ counts.T, places)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([e.of_sums(s) for e, s in zip(estimates.values(), sums, strict=True)])

    n = len(whole)
    values = of_counts(np.ones((1, n)))[:, 0]
    low, high = _percentiles(of_counts, n, seed) if n > 1 else (np.full(len(values), np.nan),) * 2
    return {
        name: Figure(float(value), float(lower), float(upper), n)
        for name, value, lower, upper in zip(estimates, values, low, high, strict=True)
    }


def _percentiles(of_counts: Callable[[Array], Array], n: int, seed: int) -> tuple[Array, Array]:
    """Ends of the intervals; a resample is how often each sample was drawn."""
    from scipy.stats import DegenerateDataWarning, bootstrap  # here, because it takes a while to import

    def statistic(drawn: Any, axis: int) -> Array:
        drawn = np.atleast_2d(drawn)
        rows = np.arange(len(drawn))[:, None] * n
        counts = np.bincount((drawn + rows).ravel(), minlength=drawn.size).reshape(len(drawn), n)
        return of_counts(counts.astype(np.float64))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a NaN says it: a correlation of two samples
        result = bootstrap(
            (np.arange(n),),
            statistic,
            n_resamples=_RESAMPLES,
            batch=max(1, _ELEMENTS_AT_ONCE // n),
            vectorized=True,
            axis=-1,
            method="percentile",
            rng=seed,
        )
    return result.confidence_interval.low, result.confidence_interval.high
