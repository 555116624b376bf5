"""Comparison of runs: groups of equal settings, their final figures, and intervals over seeds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.metric_record import Metric
from rlhf.metrics import describe, in_order
from rlhf.monitor.diagnostics import recent
from rlhf.monitor.log import LogReader, Series
from rlhf.monitor.run_facts import settings_of_run

FINAL_METRICS = (
    "eval/perplexity", "eval/reward/accuracy", "objective/scores", "gold/", "objective/kl", "response_length/mean",
    "response_length/ended",
)  # fmt: skip
"""Metrics, or prefixes with a final slash, of the table of final figures."""


class Group(NamedTuple):
    """Runs with the same settings, which differ in their seed at most."""

    name: str
    """Settings in which the group differs from the others; empty if there is only one group."""
    members: tuple[int, ...]
    """Indices of the runs of the group."""


class FinalFigure(NamedTuple):
    """The final value of a metric in one run or in a group of them."""

    value: float
    low: float = math.nan
    """Lower end of the 95% confidence interval of the mean over runs; NaN for one run."""
    high: float = math.nan
    """Upper end of the interval; NaN for one run."""


def group_runs(readers: Sequence[LogReader]) -> list[Group]:
    """Return the runs grouped by equal settings, in order of appearance.

    A setting that a run's log lacks, such as one of a stage that has not begun, does not set it apart from other runs.
    """
    settings = [settings_of_run(reader) for reader in readers]
    differing = [name for name in dict.fromkeys(name for run in settings for name in run) if _differs(settings, name)]
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for place, run in enumerate(settings):
        key = tuple((name, _text(run[name])) for name in differing if name in run)
        groups.setdefault(key, []).append(place)
    return [Group(", ".join(f"{name} {value}" for name, value in key), tuple(places)) for key, places in groups.items()]


def _differs(settings: Sequence[dict[str, Any]], name: str) -> bool:
    return len({_text(run[name]) for run in settings if name in run}) > 1


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def final_value(series: Series) -> float:
    """Return the mean of the newest tenth of a series, at least 5 and at most 50 lines; NaN if there is none."""
    known = np.isfinite(series.values)
    newest = recent(Series(series.steps[known], series.values[known]))
    return float(newest.values.mean()) if known.any() else math.nan


def run_finals(reader: LogReader) -> dict[str, FinalFigure]:
    """Return the final figures of a run. Evaluations, made rarely, give their last value instead of a mean."""
    finals = {}
    for stage in reader.stages:
        for name in reader.names(stage):
            if name in FINAL_METRICS or f"{name.partition('/')[0]}/" in FINAL_METRICS:
                series = reader.series(stage, name)
                finals[name] = FinalFigure(
                    float(series.values[-1]) if name.startswith("eval/") and len(series.values) else final_value(series)
                )
    return {name: finals[name] for name in in_order(finals)}


def group_finals(runs: Sequence[dict[str, FinalFigure]]) -> dict[str, FinalFigure]:
    """Return the means of runs' final figures with 95% confidence intervals; one run has none.

    Intervals keep to the metric's bounds: a share ends at 1.
    """
    means = {}
    for name in in_order({name for run in runs for name in run}):
        mean = mean_with_interval([run[name].value for run in runs if name in run])
        low, high = within_range(describe(name), mean.value, mean.low, mean.high)
        means[name] = FinalFigure(mean.value, float(low), float(high))
    return means


def mean_with_interval(values: Sequence[float]) -> FinalFigure:
    """Return the mean of runs and its 95% confidence interval by Student's t, which holds from two runs on."""
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) < 2:
        return FinalFigure(float(known[0]) if len(known) else math.nan)
    half = float(student_t(len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return FinalFigure(float(known.mean()), float(known.mean()) - half, float(known.mean()) + half)


def within_range(metric: Metric, mean: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """Return the ends of an interval, cut to the metric's bounds unless the mean itself lies beyond them.

    Args:
        metric: metric with its bounds.
        mean: number or array.
        low: lower end of the interval, like `mean`.
        high: upper end of the interval, like `mean`.
    """
    if metric.low is not None:
        low = np.where(mean >= metric.low, np.maximum(low, metric.low), low)
    if metric.high is not None:
        high = np.where(mean <= metric.high, np.minimum(high, metric.high), high)
    return low, high


def student_t(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t with `freedom` degrees of freedom."""
    from scipy.special import stdtrit  # here, because importing it takes a while

    return float(stdtrit(freedom, 0.975))


def comparison(readers: Sequence[LogReader]) -> dict[str, Any]:
    """Return groups and final figures as JSON values for the page."""
    finals, groups = [run_finals(reader) for reader in readers], group_runs(readers)
    return {
        "runs": [_plain(run) for run in finals],
        "groups": [
            {
                "name": group.name,
                "runs": list(group.members),
                "figures": _plain(group_finals([finals[place] for place in group.members])),
            }
            for group in groups
        ],
        "quantiles": [student_t(freedom) for freedom in range(1, len(readers))],
    }


def _plain(figures: dict[str, FinalFigure]) -> dict[str, list[float | None]]:
    return {name: [value if math.isfinite(value) else None for value in figure] for name, figure in figures.items()}
