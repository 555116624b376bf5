"""Plots for a paper: one PNG for each question about a run, or about several runs that differ in their seed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from rlhf.errors import UserError
from rlhf.io.output import check_output, write_output
from rlhf.io.terminal import shorten, visible
from rlhf.io.user_log import log_user
from rlhf.monitor.figures import (
    COLOURS,
    SMOOTHED,
    Panel,
    add_legend,
    draw_panel,
    finite,
    new_figure,
    on_one_grid,
    plot_style,
)
from rlhf.monitor.log import LogReader, Series, read_logs
from rlhf.monitor.samples_plot import draw_samples
from rlhf.monitor.view import run_names, thin
from rlhf.train.stage import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PlotType = Literal["all", "loss", "reward", "kl", "lengths", "timing", "samples"]
_BARS = 60
_STAGES = {stage.name: stage.title for stage in STAGES.values()}
_PHASES = {"timing_s/generate": "generate", "timing_s/score": "score", "timing_s/update": "update"}


class LinePlot(NamedTuple):
    """Metrics of one stage over its steps."""

    file: str
    kind: str
    stage: str
    question: str
    panels: tuple[Panel, ...]


LINE_PLOTS = (
    LinePlot(
        "sft_loss", "loss", "sft", "Does the model learn the demonstrations?",
        (
            Panel(
                "cross-entropy (nats per token)",
                {"loss/sft": "training batches", "eval/loss": "held-out records"},
                log=True,
            ),
        ),
    ),
    LinePlot(
        "reward_model", "loss", "reward", "Does the reward model order pairs as people do?",
        (
            Panel(
                "accuracy (share of pairs)",
                {"reward/accuracy": "training batches", "eval/reward/accuracy": "held-out pairs"},
                (0.5, "chance"),
            ),
            Panel("loss (nats per pair)", {"loss/reward": "training batches"}),
        ),
    ),
    LinePlot(
        "value_function", "loss", "ppo", "Is the value function learning?",
        (
            Panel(
                "explained variance of the returns",
                {"val/explained_variance": "value function"},
                (0.0, "predicting the mean"),
            ),
            Panel("value loss (squared reward units)", {"loss/value_avg": "value loss"}, log=True),
        ),
    ),
    LinePlot(
        "reward", "reward", "ppo", "Is the reward rising?",
        (
            Panel(
                "mean per completion (reward units)",
                {"objective/scores": "score", "objective/rlhf_reward": "score minus KL penalty"},
            ),
            Panel("gold score (its own units)", {"gold/*": ""}),
        ),
    ),
    LinePlot(
        "kl", "kl", "ppo", "How far is the policy from the reference?",
        (
            Panel("KL to the reference (nats per completion)", {"objective/kl": "KL"}),
            Panel("entropy of the policy (nats per token)", {"policy/entropy_avg": "entropy"}, limits=(0.0, None)),
        ),
    ),
    LinePlot(
        "update_size", "kl", "ppo", "How far does each iteration move the policy?",
        (
            Panel("approximate KL of an iteration (nats per token)", {"policy/approxkl_avg": "KL"}),
            Panel("tokens clipped (share)", {"policy/clipfrac_avg": "clipped"}, limits=(0.0, None)),
        ),
    ),
    LinePlot(
        "lengths", "lengths", "ppo", "How long are completions, and do they end?",
        (
            Panel("mean length (tokens)", {"response_length/mean": "length"}, limits=(0.0, None)),
            Panel("ended by themselves (share)", {"response_length/ended": "ended"}, limits=(-0.03, 1.03)),
        ),
    ),
)  # fmt: skip


def write_plots(
    log_dirs: Sequence[Path], kind: PlotType, folder: Path | None = None, *, overwrite: bool | None = None
) -> list[Path]:
    """Write PNGs of everything that the logs hold; the files written.

    Args:
        log_dirs: logs/ folders or output folders; several are drawn as one band.
        kind: which plots.
        folder: where to; None is report/ in the first run's output folder.
        overwrite: replace files there whoever wrote them; None where the user cannot choose that.

    Raises:
        UserError: a folder is no run's, the logs hold nothing for such a plot, or the files cannot be written.
    """
    readers = read_logs(log_dirs)
    for reader in readers:
        for problem in reader.problems:
            log_user(f"{reader.folder}: {visible(problem)}")
    folder = folder or readers[0].folder.absolute().parent / "report"
    with plot_style():
        figures = {name: figure for name, figure in _figures(readers, kind) if figure is not None}
        if not figures:
            raise UserError(f"{readers[0].folder}: nothing to draw for --plot-type {kind} yet")
        files = {folder / f"{name}.png": figure for name, figure in figures.items()}
        for path in files:
            check_output(path, "--output-dir", overwrite=overwrite)
        for path, figure in files.items():
            write_output(path, _png(figure, path.stem, readers), overwrite=overwrite)
        return list(files)


def _figures(readers: Sequence[LogReader], kind: str) -> "list[tuple[str, Figure | None]]":
    """(file name, figure) of the wanted kind; None where the logs hold nothing for it."""
    chosen = set(get_args(PlotType)) if kind == "all" else {kind}
    made: list[tuple[str, Figure | None]] = [
        (plot.file, _line_plot(readers, plot)) for plot in LINE_PLOTS if plot.kind in chosen
    ]
    if "reward" in chosen:
        made.append(("over_optimisation", _over_optimisation(readers)))
    if "timing" in chosen:
        made.append(("timing", _timing(readers)))
    if "samples" in chosen:
        made.append(("samples", draw_samples(readers[0])))
    return made


def _png(figure: "Figure", name: str, readers: Sequence[LogReader]) -> bytes:
    """Return a figure that says which runs it is of, and what its lines are."""
    stage = next((plot.stage for plot in LINE_PLOTS if plot.file == name), "")
    names = [
        visible(run)
        for reader, run in zip(readers, run_names(readers), strict=True)
        if not stage or stage in reader.stages
    ]
    if name == "samples":
        names = names[:1]
    notes = [shorten(", ".join(names), 90)]
    if len(names) > 1 and name != "over_optimisation":
        notes.insert(0, f"mean of {len(names)} runs as far as all go, lowest to highest behind")
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    if any(len(np.asarray(line.get_xdata())) >= 2 * SMOOTHED for line in lines):
        notes.insert(0, "lines are running means")
    figure.supxlabel("\n".join(notes), fontsize=8, color="#555555", x=0.99, ha="right")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _line_plot(readers: Sequence[LogReader], plot: LinePlot) -> "Figure | None":
    present = [panel for panel in plot.panels if _has(readers, plot.stage, panel)]
    if not present:
        return None
    figure, axes = new_figure(len(present), title=plot.question)
    for ax, panel in zip(axes, present, strict=True):
        draw_panel(ax, readers, plot.stage, panel)
    axes[-1].set_xlabel(_x_label(plot.stage))
    figure.align_ylabels()
    return figure


def _has(readers: Sequence[LogReader], stage: str, panel: Panel) -> bool:
    wanted = tuple(panel.curves)
    return any(
        len(finite(reader.series(stage, name)).steps)
        for reader in readers
        for name in reader.names(stage)
        if name in wanted or any(name.startswith(pattern[:-1]) for pattern in wanted if pattern.endswith("*"))
    )


def _x_label(stage: str) -> str:
    return f"{_STAGES[stage]} {'iteration' if stage == 'ppo' else 'step'}"


def _over_optimisation(readers: Sequence[LogReader]) -> "Figure | None":
    """Score and gold score against the root of the KL, as in Gao et al. 2022, https://arxiv.org/abs/2210.10760."""
    golds = dict.fromkeys(n for reader in readers for n in reader.names("ppo") if n.startswith("gold/"))
    shown = {"objective/scores": "score (reward units)"} | {name: f"{visible(name)}, not optimised" for name in golds}
    points = {name: _against_kl(readers, name) for name in shown}
    points = {name: found for name, found in points.items() if found.size}
    if not points:
        return None
    figure, axes = new_figure(
        len(points),
        title="Does the score still agree with the gold score?" if golds else "What does the reward cost in KL?",
    )
    from matplotlib.ticker import AutoLocator, MaxNLocator

    last = max(found[2].max() for found in points.values())
    for ax, (name, (root_kl, values, steps)) in zip(axes, points.items(), strict=True):
        dots = ax.scatter(
            root_kl,
            values,
            c=steps,
            s=18 if steps.size < 2000 else 6,
            vmin=1,
            vmax=max(last, 2),
            edgecolors="#555555",  # the newest are yellow, which hardly shows on white
            linewidths=0.4,
        )
        ax.set_ylabel(shown[name])
    axes[-1].xaxis.set_major_locator(AutoLocator())
    axes[-1].set_xlabel("√KL to the reference (√nats per completion)")
    figure.colorbar(dots, ax=axes, label="PPO iteration", aspect=30).locator = MaxNLocator(integer=True)
    return figure


def _against_kl(readers: Sequence[LogReader], name: str) -> np.ndarray:
    """[3, n]: √KL, value and step of every line that has both."""
    parts = []
    for reader in readers:
        kl, values = finite(reader.series("ppo", "objective/kl")), finite(reader.series("ppo", name))
        steps, at_kl, at_value = np.intersect1d(kl.steps, values.steps, return_indices=True)
        parts.append(np.array([np.sqrt(np.maximum(kl.values[at_kl], 0.0)), values.values[at_value], steps]))
    return np.concatenate(parts, axis=1)


def _timing(readers: Sequence[LogReader]) -> "Figure | None":
    """Seconds of each phase, stacked, and tokens per second."""
    speed = [stage for stage in _STAGES if _has(readers, stage, Panel("", {"perf/tokens_per_s": ""}))]
    phases = _has(readers, "ppo", Panel("", {"timing_s/step": ""}))
    if not speed and not phases:
        return None
    figure, axes = new_figure(len(speed) + phases, title="Where does the time go?", height=2.4, same_x=False)
    if phases:
        _phases(axes[0], readers)
    for ax, stage in zip(axes[phases:], speed, strict=True):
        draw_panel(
            ax,
            readers,
            stage,
            Panel(f"{_STAGES[stage]} (tokens per second)", {"perf/tokens_per_s": ""}, limits=(0.0, None)),
        )
        ax.set_xlabel(_x_label(stage))
        ax.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def _phases(axes: "Axes", readers: Sequence[LogReader]) -> None:
    """Bars of the mean seconds per iteration of each phase."""
    steps, whole = _mean_bars(readers, "timing_s/step")
    width = float(np.median(np.diff(steps))) if len(steps) > 1 else 0.8
    bottom = np.zeros(len(steps))
    for place, (name, label) in enumerate(_PHASES.items()):
        at, seconds = _mean_bars(readers, name)
        if len(at) == len(steps):
            axes.bar(steps, seconds, width, bottom=bottom, color=COLOURS[place], label=label)
            bottom = bottom + seconds
    rest = np.maximum(whole - bottom, 0.0)
    axes.bar(steps, rest, width, bottom=bottom, color="#999999", label="other")
    axes.set_ylabel("seconds per iteration")
    axes.set_xlabel("PPO iteration")
    add_legend(axes, columns=4)


def _mean_bars(readers: Sequence[LogReader], name: str) -> tuple[np.ndarray, np.ndarray]:
    runs = [series for reader in readers if len((series := finite(reader.series("ppo", name))).steps)]
    if not runs:
        return np.empty(0), np.empty(0)
    steps, table = on_one_grid(runs)
    bars = thin(Series(steps, np.nanmean(table, axis=0)), _BARS)
    return np.array(bars["steps"], float), np.array(bars["mean"], float)
