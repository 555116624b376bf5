"""Style and axes of the plots: smoothed lines over raw values, bands over seeds, and colour-blind-safe colours."""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf.io.printable_text import shorten, visible
from rlhf.metric_record import Metric
from rlhf.metrics import describe
from rlhf.monitor.charts import Chart, curve_label
from rlhf.monitor.compare import Group, group_runs, student_t, within_range
from rlhf.monitor.log import LogReader, Series
from rlhf.monitor.run_facts import described
from rlhf.monitor.view import thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Palette of Okabe and Ito, which colour-blind readers can distinguish; https://jfly.uni-koeln.de/color/."""
STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.formatter.useoffset": False,
    "figure.dpi": 200,
}
_WIDTH, _HEIGHT = 6.4, 2.9  # inches, of one pair of axes
_MARKED = 30  # points up to which each has a marker
SMOOTHED = 40
"""Number of windows of a running mean: in a series of n points, it averages n / SMOOTHED points."""
_RAW = 1000  # points that noise is drawn with
_LEGEND = 0.8 * _WIDTH  # inches that a legend may be wide
_LEGEND_ROW = 0.25  # inches of a legend of one row
_LONGEST_NAME = 120  # characters shown of a group's name


class AxesStyle(NamedTuple):
    """Style of a chart's y axis."""

    level: tuple[float, str] | None = None
    """Value and label of a reference line; None draws none."""
    limits: tuple[float | None, float | None] = (None, None)
    """Limits of the y axis."""
    log: bool = False
    """True for a logarithmic y axis."""


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
    """Apply the style of the plots in the block, regardless of the user's matplotlibrc and MPLBACKEND.

    Figures that go to files need no backend, and the one that a notebook names may not be installed here.
    """
    backend = os.environ.pop("MPLBACKEND", None)  # read when matplotlib is imported
    try:
        from matplotlib import style
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with style.context(["default", STYLE]):
        yield


def new_figure(rows: int, *, title: str, height: float = _HEIGHT, same_x: bool = True) -> "tuple[Figure, list[Axes]]":
    """Return a figure with `rows` pairs of axes below each other, by default with a shared x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.5 + height * rows), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=same_x, squeeze=False)[:, 0])
    figure.suptitle(title, x=0.01, ha="left")
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure, axes


def draw_chart(
    axes: "Axes", readers: Sequence[LogReader], stage: str, chart: Chart, style: AxesStyle | None = None
) -> None:
    """Draw the metrics of a chart that the logs have, over the steps of a stage.

    Args:
        axes: axes to draw on.
        readers: logs of the runs.
        stage: name of the stage.
        chart: metrics to draw, each in its colour; one metric if there are several groups of runs, each in its colour.
        style: style of the y axis; None is the default style.
    """
    style, intervals = style or AxesStyle(), False
    for number, metric in enumerate(chart.metrics):
        name = visible(curve_label(metric, chart.title))
        if len(chart.metrics) == 1 and style.level is None and name == chart.title:
            name = f"_{name}"  # legends leave out such names: the y axis has it
        for place, group in enumerate(group_runs(readers)):
            runs = [drop_nan(readers[member].series(stage, metric)) for member in group.members]
            runs = [series for series in runs if len(series.steps)]
            if runs:
                colour = COLOURS[(number + place) % len(COLOURS)]
                draw_curve(axes, runs, colour, group_label(group, len(runs)) or name, describe(metric))
                intervals |= len(runs) > 1
    name_y_axis(axes, chart.title, described(readers, chart.metrics[0]).unit, log=style.log)
    if style.log:
        _make_log(axes)
    if style.level is not None:
        value, name = style.level
        axes.axhline(value, color="#555555", linestyle="--", linewidth=1, label=name)
    if intervals:
        _follow_curves(axes)
    limits = zip(style.limits, axes.get_ylim(), strict=True)
    axes.set_ylim(*(drawn_limit if limit is None else limit for limit, drawn_limit in limits))


def group_label(group: Group, runs: int) -> str:
    """Return the name of a group with its number of runs; empty if there are no other groups."""
    name = visible(shorten(group.name, _LONGEST_NAME))
    return f"{name} ({runs} runs)" if name and runs > 1 else name


def _follow_curves(axes: "Axes") -> None:
    """Cut the y axis where intervals reach further from the curves than the curves' own range."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()] or [np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) | (axes.get_yscale() != "log"))]
    if not values.size or np.ptp(values) == 0:
        return
    scale = axes.yaxis.get_transform()
    lowest, highest = scale.transform(axes.dataLim.intervaly)
    low, high = scale.transform(np.array([values.min(), values.max()]))
    low, high = 2 * low - high, 2 * high - low
    margin = 0.05 * (min(high, highest) - max(low, lowest))
    if lowest < low or highest > high:
        limits = np.array([max(low, lowest - margin), min(high, highest + margin)])
        axes.set_ylim(*scale.inverted().transform(limits))


def name_y_axis(axes: "Axes", title: str, unit: str, *, log: bool = False) -> None:
    """Label the y axis with a title and its unit, on two lines if one would be too long."""
    title, unit = visible(title), f"({visible(unit)})" if unit else ""
    separator = "\n" if log or len(title) + len(unit) >= 30 else " "
    axes.set_ylabel(f"{title}{separator}{unit}".rstrip() + ", log scale" * log)


def draw_curve(axes: "Axes", runs: Sequence[Series], colour: str, label: str, metric: Metric) -> None:
    """Draw the running mean of one run over its values, or that of several over the 95% interval of their mean."""
    smooth = [running_mean(series) for series in runs]
    if len(runs) == 1:
        series, steps, centre = runs[0], smooth[0].steps, smooth[0].values
        if len(series.steps) > _RAW:
            raw = thin(series, _RAW)
            axes.fill_between(raw["steps"], raw["low"], raw["high"], color=colour, alpha=0.22, linewidth=0)
        elif not np.array_equal(series.values, centre):
            axes.plot(series.steps, series.values, color=colour, alpha=0.3, linewidth=0.8)
    else:
        steps, table = on_one_grid(smooth)
        centre, half = mean_of_runs(table)
        low, high = within_range(metric, centre, centre - half, centre + half)
        axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
    marker = "o" if len(steps) <= _MARKED else None
    axes.plot(steps, centre, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def drop_nan(series: Series) -> Series:
    """Return a series without its NaN."""
    keep = np.isfinite(series.values)
    return Series(series.steps[keep], series.values[keep])


def running_mean(series: Series) -> Series:
    """Return the centred mean over 1 / SMOOTHED of the series, or over as much as there is at its ends."""
    count = len(series.values)
    reach = count // (2 * SMOOTHED)
    if reach == 0:
        return series
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    index = np.arange(count)
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach, count - 1) + 1
    return Series(series.steps, (sums[last] - sums[first]) / (last - first))


def window_of(count: int) -> int:
    """Return the number of points that a running mean of a series of `count` points averages."""
    return 2 * (count // (2 * SMOOTHED)) + 1


def mean_of_runs(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [n] of runs [runs, n] and the half-width of its 95% interval, 0 where one run goes on alone."""
    known = np.isfinite(table).sum(axis=0)
    centre = np.nanmean(table, axis=0)
    squares = np.nansum((table - centre) ** 2, axis=0) / np.maximum(known - 1, 1)
    quantiles = np.array([0.0, 0.0] + [student_t(freedom) for freedom in range(1, len(table))])
    return centre, quantiles[known] * np.sqrt(squares / np.maximum(known, 1))


def on_one_grid(runs: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps [n] of any run, interpolated values [runs, n]), with NaN beyond a run's ends.

    The steps are those within the range of all runs, so that their mean does not jump where one ends; or all steps if
    the ranges do not overlap.
    """
    steps = np.unique(np.concatenate([series.steps for series in runs]))
    first, last = max(series.steps[0] for series in runs), min(series.steps[-1] for series in runs)
    steps = shared if (shared := steps[(steps >= first) & (steps <= last)]).size else steps
    table = [np.interp(steps, series.steps, series.values, left=np.nan, right=np.nan) for series in runs]
    return steps, np.array(table)


def add_legends(axes: Sequence["Axes"]) -> None:
    """Add legends above axes that are below each other, each of the curves that are in none further up."""
    listed: set[tuple[str, Any]] = set()
    for ax in axes:
        curves = {(str(line.get_label()), line.get_color()): line for line in ax.get_lines()}
        new = [key for key in curves if key not in listed and not key[0].startswith("_")]
        if new:
            add_legend(ax, [curves[key] for key in new], [label for label, _ in new])
        listed.update(new)


def add_legend(axes: "Axes", handles: Sequence[Any], labels: Sequence[str], title: str = "") -> None:
    """Add a legend above the axes, wrapped to their width; the figure grows by its rows after the first."""
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)
    for columns, width in ((4, 60), (3, 60), (2, 60), (1, 60), (1, 36)):  # 36 of the widest letters fit
        legend = axes.legend(
            handles,
            [textwrap.fill(label, width) for label in labels],
            title=textwrap.fill(title, width) or None,
            title_fontsize="small",
            alignment="left",
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.1,
            ncols=columns,
        )
        box = legend.get_window_extent()
        if box.width <= _LEGEND * figure.dpi:
            break
    figure.set_figheight(figure.get_figheight() + max(box.height / figure.dpi - _LEGEND_ROW, 0.0))


def _make_log(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
