"""Figures with their number of samples and a 95% bootstrap interval.

Every figure is a function of sums over the samples: a mean is the ratio of two sums, a correlation a function of six.
One resampling therefore serves all figures of the same samples, and the difference of two models that completed the
same prompts is a paired one.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

_RESAMPLES = 4000
_ELEMENTS_AT_ONCE = 1 << 22
_ROUNDING = 1e-6
"""Bound on the relative difference of two float32 scores of one text in different batches."""

Array = np.ndarray[Any, np.dtype[np.float64]]


class Figure(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    """Lower end of the interval; NaN with fewer than two samples."""
    high: float
    n: int
    """Number of independent samples: pairs, records or prompts."""


class Estimate(NamedTuple):
    """A figure as a function of sums over samples, from which `figures` computes value and interval."""

    columns: Array
    """[n, m]: the summands."""
    from_sums: Callable[[Array], Array]
    """[m, ...] sums -> [...] figure."""


def win_indicator(scores: Array, baselines: Array | float) -> Array:
    """Return [n]: 1 where a score is above its baseline, 0.5 where they tie up to rounding, else 0."""
    tie = np.isclose(scores, baselines, rtol=_ROUNDING, atol=0.0)
    return np.where(tie, 0.5, scores > baselines)


def mean(values: Any) -> Estimate:
    """Return the mean of [n] values."""
    return ratio(values, np.ones(len(values)))


def ratio(totals: Any, weights: Any) -> Estimate:
    """Return sum(totals) / sum(weights) of two [n] arrays: for example a mean over tokens, with records as samples."""
    return Estimate(np.stack([totals, weights], axis=1).astype(np.float64), lambda sums: sums[0] / sums[1])


def exponential(estimate: Estimate) -> Estimate:
    """Return exp(figure): perplexity from the loss."""
    return Estimate(estimate.columns, lambda sums: np.exp(np.minimum(estimate.from_sums(sums), 700.0)))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return first - second, of the same samples in the same order."""
    width = first.columns.shape[1]
    return Estimate(
        np.concatenate([first.columns, second.columns], axis=1),
        lambda sums: first.from_sums(sums[:width]) - second.from_sums(sums[width:]),
    )


def grouped_correlation(x: Any, y: Any) -> Estimate:
    """Return Pearson's correlation of values that come in groups.

    Args:
        x: [n, k] float, k values of each sample, such as those of the two members of a preference pair.
        y: [n, k] float, the values to correlate with `x`.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    x, y = _centred(x), _centred(y)  # squares of small numbers keep their digits
    columns = np.stack([part.sum(axis=1) for part in (np.ones_like(x), x, y, x * y, x * x, y * y)], axis=1)

    def correlation(sums: Array) -> Array:
        mean_x, mean_y, xy, xx, yy = sums[1:] / sums[0]
        return (xy - mean_x * mean_y) / np.sqrt((xx - mean_x**2) * (yy - mean_y**2))

    return Estimate(columns, correlation)


def _centred(values: Array) -> Array:
    """Return the values minus their mean, or zeros if they differ by rounding alone."""
    varies = np.ptp(values) > _ROUNDING * np.abs(values).max()
    return values - values.mean() if varies else np.zeros_like(values)


def linearised(estimate: Estimate, *, least: float = -np.inf) -> Estimate:
    """Return the same figure with the interval of its jackknife linearisation.

    It serves figures that resampling biases: an expected calibration error grows with every sample that is drawn twice.

    Source: Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 6 (the figure as the mean
    of the samples' influences).

    Args:
        estimate: the figure.
        least: lower bound of the figure.
    """
    total = estimate.columns.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a single sample leaves nothing
        leave_one_out = estimate.from_sums((total - estimate.columns).T)
    return from_influence(float(estimate.from_sums(total)), leave_one_out, least=least)


def from_influence(value: float, leave_one_out: Any, *, least: float = -np.inf) -> Estimate:
    """Return a figure with the interval of `linearised`, from its value and its values without one sample each.

    Args:
        value: the figure of all samples.
        leave_one_out: [n] float, the figure without sample i.
        least: lower bound of the figure.
    """
    values = np.asarray(leave_one_out, dtype=np.float64)
    influence = (len(values) - 1) * (values.mean() - values) if len(values) > 1 else np.zeros(1)
    columns = np.stack([influence, np.ones_like(influence)], axis=1)
    return Estimate(columns, lambda sums: np.maximum(value + sums[0] / sums[1], least))


def figures(estimates: Mapping[str, Estimate], *, seed: int) -> dict[str, Figure]:
    """Return values and 95% percentile intervals of figures of the same samples, all from the same resamples.

    Args:
        estimates: estimates by name, all with the same number of samples.
        seed: seed of the resampling.
    """
    if not estimates:
        return {}
    columns = np.concatenate([estimate.columns for estimate in estimates.values()], axis=1)
    offsets = np.cumsum([estimate.columns.shape[1] for estimate in estimates.values()])[:-1]

    def figures_of(counts: Array) -> Array:
        sums = np.split(columns.T @ counts.T, offsets)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([e.from_sums(s) for e, s in zip(estimates.values(), sums, strict=True)])

    n = len(columns)
    values = figures_of(np.ones((1, n)))[:, 0]
    low, high = _percentiles(figures_of, n, seed) if n > 1 else (np.full(len(values), np.nan),) * 2
    return {
        name: Figure(float(value), float(lower), float(upper), n)
        for name, value, lower, upper in zip(estimates, values, low, high, strict=True)
    }


def _percentiles(figures_of: Callable[[Array], Array], n: int, seed: int) -> tuple[Array, Array]:
    """Return the ends of the intervals; a resample is given by the count of each of the n samples."""
    from scipy.stats import DegenerateDataWarning, bootstrap  # imported here because it is slow to import

    def statistic(resamples: Any, axis: int) -> Array:
        resamples = np.atleast_2d(resamples)
        rows = np.arange(len(resamples))[:, None] * n
        counts = np.bincount((resamples + rows).ravel(), minlength=resamples.size).reshape(len(resamples), n)
        return figures_of(counts.astype(np.float64))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # the figure is NaN: a correlation of two samples
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
