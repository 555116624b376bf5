"""The plot of scores against the root of the KL."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.metrics import describe
from rlhf.monitor.compare import group_runs
from rlhf.monitor.log import LogReader
from rlhf.monitor.plot_axes import COLOURS, add_legend, drop_nan, group_label, name_y_axis, new_figure
from rlhf.monitor.run_facts import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_over_optimisation(readers: Sequence[LogReader]) -> "Figure | None":
    """Draw score and gold score against the root of the KL, as in Gao et al. 2022, https://arxiv.org/abs/2210.10760.

    Colours stand for iterations, or for groups of runs if there are several.
    """
    golds = dict.fromkeys(n for reader in readers for n in reader.names("ppo") if n.startswith("gold/"))
    points = {name: _against_kl(readers, name) for name in ("objective/scores", *golds)}
    points = {name: columns for name, columns in points.items() if columns.size}
    if not points:
        return None
    figure, axes = new_figure(
        len(points),
        title="Does the score still agree with the gold score?" if golds else "What does the reward cost in KL?",
    )
    from matplotlib.ticker import AutoLocator, MaxNLocator

    groups = group_runs(readers)
    last = max(columns[2].max() for columns in points.values())
    for ax, (name, columns) in zip(axes, points.items(), strict=True):
        for number, group in enumerate(groups):
            kl, values, steps = _against_kl([readers[place] for place in group.members], name)
            if not kl.size:
                continue
            by_step: dict[str, Any] = {"c": steps, "vmin": 1, "vmax": max(last, 2)}
            by_group = {"color": COLOURS[number % len(COLOURS)], "label": group_label(group, len(group.members))}
            dots = ax.scatter(
                np.sqrt(np.maximum(kl, 0.0)),
                values,
                s=18 if columns[0].size < 2000 else 6,
                edgecolors="#555555",  # the newest are yellow, which hardly shows on white
                linewidths=0.4,
                **(by_group if len(groups) > 1 else by_step),
            )
        name_y_axis(ax, describe(name).label, described(readers, name).unit)
    axes[-1].xaxis.set_major_locator(AutoLocator())
    negative = any((columns[0] < 0).any() for columns in points.values())
    note = "\nestimates of the KL below 0 are drawn at 0" if negative else ""
    axes[-1].set_xlabel(f"√KL to the reference (√nats per completion){note}")
    if len(groups) > 1:
        add_legend(axes[0], *axes[0].get_legend_handles_labels())
    else:
        figure.colorbar(dots, ax=axes, label="PPO iteration", aspect=30).locator = MaxNLocator(integer=True)
    return figure


def _against_kl(readers: Sequence[LogReader], name: str) -> np.ndarray:
    """Return KL, value and step of every line with both, [3, n]."""
    parts = []
    for reader in readers:
        kl, values = drop_nan(reader.series("ppo", "objective/kl")), drop_nan(reader.series("ppo", name))
        steps, at_kl, at_value = np.intersect1d(kl.steps, values.steps, return_indices=True)
        parts.append(np.array([kl.values[at_kl], values.values[at_value], steps]))
    return np.concatenate(parts, axis=1)
