"""Plots for a paper: one file for each question about a run, or about groups of runs with different settings."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from rlhf.errors import UserError
from rlhf.io.output import check_output, write_output
from rlhf.io.printable_text import shorten, visible
from rlhf.io.user_log import log_user
from rlhf.metrics import describe
from rlhf.monitor.charts import Chart, charts
from rlhf.monitor.compare import group_runs
from rlhf.monitor.log import LogReader, Series, read_logs
from rlhf.monitor.over_optimisation_plot import draw_over_optimisation
from rlhf.monitor.plot_axes import (
    COLOURS,
    AxesStyle,
    add_legend,
    add_legends,
    draw_chart,
    drop_nan,
    group_label,
    name_y_axis,
    new_figure,
    on_one_grid,
    plot_style,
    window_of,
)
from rlhf.monitor.samples_plot import draw_samples
from rlhf.monitor.view import run_names, thin
from rlhf.stages import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PlotFormat = Literal["png", "pdf", "svg"]
PlotType = Literal["all", "loss", "reward", "kl", "lengths", "timing", "samples"]
_BARS = 60
_STAGES = {stage.name: stage.title for stage in STAGES.values()}


class LinePlot(NamedTuple):
    """Charts of `rlhf.monitor.charts` below each other, over the steps of a stage."""

    file: str
    kind: str
    question: str
    charts: dict[str, AxesStyle]


LINE_PLOTS = (
    LinePlot("sft_loss", "loss", "Does the model learn the demonstrations?", {"loss": AxesStyle(log=True)}),
    LinePlot(
        "reward_model", "loss", "Does the reward model order pairs as people do?",
        {"pair-accuracy": AxesStyle(level=(0.5, "chance")), "reward-loss": AxesStyle()},
    ),
    LinePlot(
        "value_function", "loss", "Is the value function learning?",
        {"explained-variance": AxesStyle(level=(0.0, "predicting the mean")), "value-loss": AxesStyle(log=True)},
    ),
    LinePlot("reward", "reward", "Is the reward rising?", {"score": AxesStyle(), "gold": AxesStyle()}),
    LinePlot(
        "kl", "kl", "How far is the policy from the reference?",
        {"kl": AxesStyle(), "entropy": AxesStyle(limits=(0.0, None))},
    ),
    LinePlot(
        "update_size", "kl", "How far does each iteration move the policy?",
        {"update-kl": AxesStyle(), "clip": AxesStyle(limits=(0.0, None))},
    ),
    LinePlot(
        "lengths", "lengths", "How long are completions, and do they end?",
        {"length": AxesStyle(limits=(0.0, None)), "ended": AxesStyle(limits=(-0.03, 1.03))},
    ),
)  # fmt: skip


class Drawing(NamedTuple):
    """A drawn plot."""

    file: str
    """File name without its ending."""
    figure: "Figure"
    stage: str = ""
    """Stage whose metrics the plot shows; empty if there is not exactly one."""


def write_plots(
    log_dirs: Sequence[Path],
    kind: PlotType,
    folder: Path | None = None,
    *,
    overwrite: bool | None = None,
    file_format: PlotFormat = "png",
    titles: bool = True,
) -> list[Path]:
    """Write plots of all data in the logs, and return their paths.

    Args:
        log_dirs: logs/ folders or output folders. Runs of equal settings are one line with the interval of their mean.
        kind: kind of plots to write.
        folder: folder to write to; None stands for report/ in the first run's output folder.
        overwrite: True replaces existing files whoever wrote them; None if the program has no such flag.
        file_format: format of the files, which is also their ending.
        titles: True writes the question that a plot answers above it.

    Raises:
        UserError: a folder does not belong to a run, the logs have no data for the plots, or a file cannot be written.
    """
    readers = read_logs(log_dirs)
    for reader in readers:
        for problem in reader.problems:
            log_user(f"{reader.folder}: {visible(problem)}")
    folder = folder or readers[0].folder.absolute().parent / "report"
    with plot_style():
        drawn = drawings(readers, kind)
        if not drawn:
            raise UserError(f"{readers[0].folder}: nothing to draw for --plot-type {kind} yet")
        files = {folder / f"{drawing.file}.{file_format}": drawing for drawing in drawn}
        for path in files:
            check_output(path, "--output-dir", overwrite=overwrite)
        for path, drawing in files.items():
            if not titles:
                drawing.figure.suptitle("")
            write_output(path, _image(drawing, readers, file_format), overwrite=overwrite)
        return list(files)


def drawings(readers: Sequence[LogReader], kind: str) -> list[Drawing]:
    """Return the plots of a kind for which the logs hold data."""
    chosen = set(get_args(PlotType)) if kind == "all" else {kind}
    line_plots = [drawing for plot in LINE_PLOTS if plot.kind in chosen for drawing in _line_plots(readers, plot)]
    figures: dict[str, Figure | None] = {}
    if "reward" in chosen:
        figures["over_optimisation"] = draw_over_optimisation(readers)
    if "timing" in chosen:
        figures["timing"] = _timing(readers)
    if "samples" in chosen:
        figures["samples"] = draw_samples(readers[0], run_names(readers)[0] if len(readers) > 1 else "")
    return line_plots + [Drawing(file, figure) for file, figure in figures.items() if figure is not None]


def _image(drawing: Drawing, readers: Sequence[LogReader], file_format: PlotFormat) -> bytes:
    """Return a drawing as an image, with notes that name its runs and explain its lines."""
    name, figure, stage = drawing
    names = [
        visible(run)
        for reader, run in zip(readers, run_names(readers), strict=True)
        if not stage or stage in reader.stages
    ]
    if name == "samples":
        names = names[:1]
    notes = [shorten(", ".join(names), 90)]
    if len(names) > 1 and name != "over_optimisation" and any(len(g.members) > 1 for g in group_runs(readers)):
        notes.insert(
            0, "means of runs that differ in their seed alone, with 95% intervals, as far as all go; axes may cut them"
        )
    counts = [len(np.asarray(line.get_xdata())) for axes in figure.axes for line in axes.get_lines()]
    if windows := sorted({window_of(count) for count in counts} - {1}):
        notes.insert(0, f"lines are running means over {' or '.join(map(str, windows))} points")
    figure.supxlabel("\n".join(notes), fontsize=8, color="#555555", x=0.99, ha="right")
    image = io.BytesIO()
    figure.savefig(image, format=file_format)
    return image.getvalue()


def _line_plots(readers: Sequence[LogReader], plot: LinePlot) -> Iterator[Drawing]:
    """Yield a plot for every stage with data for it; files after the first are numbered."""
    count = 0
    for stage in _stages(readers):
        present = _charts(readers, stage)
        drawn = [(present[name], style) for name, style in plot.charts.items() if name in present]
        if not drawn:
            continue
        if len(group_runs(readers)) > 1:  # colours tell groups apart, so that every metric has axes of its own
            drawn = [
                (chart._replace(title=describe(metric).label, metrics=(metric,)), style)
                for chart, style in drawn
                for metric in chart.metrics
            ]
        figure, axes = new_figure(len(drawn), title=plot.question)
        for ax, (chart, style) in zip(axes, drawn, strict=True):
            draw_chart(ax, readers, stage, chart, style)
        add_legends(axes)
        axes[-1].set_xlabel(_x_label(readers, stage))
        figure.align_ylabels()
        count += 1
        yield Drawing(plot.file if count == 1 else f"{plot.file}_{count}", figure, stage)


def _stages(readers: Sequence[LogReader]) -> list[str]:
    return list(dict.fromkeys(stage for reader in readers for stage in reader.stages))


def _charts(readers: Sequence[LogReader], stage: str) -> dict[str, Chart]:
    """Return the charts of the stage's metrics that have a finite value."""
    names = dict.fromkeys(name for reader in readers for name in reader.names(stage))
    return charts(
        name for name in names if any(np.isfinite(reader.series(stage, name).values).any() for reader in readers)
    )


def _x_label(readers: Sequence[LogReader], stage: str) -> str:
    units = [reader.progress(stage).unit for reader in readers if stage in reader.stages]
    return f"{_STAGES.get(stage, visible(stage))} {visible(units[0])}"


def _timing(readers: Sequence[LogReader]) -> "Figure | None":
    """Draw the seconds of each phase, stacked, for each group of runs, and the tokens per second."""
    present = {stage: _charts(readers, stage) for stage in _stages(readers)}
    speed = {stage: group["throughput"] for stage, group in present.items() if "throughput" in group}
    timed = [
        (group, runs)
        for group in group_runs(readers)
        if (runs := [readers[place] for place in group.members if "step-time" in _charts([readers[place]], "ppo")])
    ]
    if not speed and not timed:
        return None
    figure, axes = new_figure(len(timed) + len(speed), title="Where does the time go?", height=2.4, same_x=False)
    for number, (ax, (group, runs)) in enumerate(zip(axes, timed, strict=False)):
        if number:
            ax.sharex(axes[0])
            ax.sharey(axes[0])
        _phases(ax, runs, visible(group_label(group, len(runs))), legend=number == 0)
    for ax, (stage, chart) in zip(axes[len(timed) :], speed.items(), strict=True):
        if timed and stage == "ppo":
            ax.sharex(axes[0])
        draw_chart(ax, readers, stage, chart, AxesStyle(limits=(0.0, None)))
        name_y_axis(ax, _STAGES.get(stage, stage), describe(chart.metrics[0]).unit)
        ax.set_xlabel(_x_label(readers, stage))
        ax.yaxis.set_major_formatter("{x:,.0f}")
    add_legends(axes[len(timed) :])
    return figure


def _phases(axes: "Axes", readers: Sequence[LogReader], name: str, *, legend: bool) -> None:
    """Draw bars of the mean seconds per iteration of each phase, below the name of their group."""
    steps, total = _mean_bars(readers, "timing_s/step")
    width = float(np.median(np.diff(steps))) if len(steps) > 1 else 0.8
    bottom = np.zeros(len(steps))
    parts = _charts(readers, "ppo").get("phases")
    for number, metric in enumerate(parts.metrics if parts else ()):
        phase_steps, seconds = _mean_bars(readers, metric)
        if len(phase_steps) == len(steps):
            label, colour = describe(metric).label, COLOURS[number % len(COLOURS)]
            axes.bar(steps, seconds, width, bottom=bottom, color=colour, label=label)
            bottom = bottom + seconds
    rest = np.maximum(total - bottom, 0.0)
    axes.bar(steps, rest, width, bottom=bottom, color="#999999", label="other")
    axes.set_ylabel("seconds per iteration")
    axes.set_xlabel("PPO iteration")
    handles, labels = axes.get_legend_handles_labels()
    if legend or name:
        add_legend(axes, handles if legend else [], labels if legend else [], name)


def _mean_bars(readers: Sequence[LogReader], name: str) -> tuple[np.ndarray, np.ndarray]:
    runs = [series for reader in readers if len((series := drop_nan(reader.series("ppo", name))).steps)]
    if not runs:
        return np.empty(0), np.empty(0)
    steps, table = on_one_grid(runs)
    bars = thin(Series(steps, np.nanmean(table, axis=0)), _BARS)
    return np.array(bars["steps"], float), np.array(bars["mean"], float)
