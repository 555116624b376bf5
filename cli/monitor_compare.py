"""The comparison of runs in the terminal: groups of equal settings, and a table of final figures."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.io.printable_text import visible
from rlhf.metrics import in_order
from rlhf.monitor.compare import FinalFigure, Group, group_finals, group_runs, run_finals
from rlhf.monitor.log import LogReader, read_logs
from rlhf.monitor.run_facts import described
from rlhf.monitor.view import run_names


def print_comparison(log_dirs: Sequence[Path], console: Console) -> None:
    """Print the settings in which runs differ, and the final figures of every run and group.

    Raises:
        UserError: a folder is no run's, or its log is empty.
    """
    readers = read_logs(log_dirs)
    groups = group_runs(readers)
    for number, group in enumerate(groups, start=1):
        name = visible(group.name) or "all runs have the same settings, or do not say"
        runs = f"{len(group.members)} run{'s' * (len(group.members) > 1)}"
        console.print(Text(f"{number}: {name} ({runs})" if len(groups) > 1 else f"{name} ({runs})"), soft_wrap=True)
    console.print(_table(readers, groups))
    console.print(
        Text(
            "Final: mean of the newest tenth of the log, at least five lines and at most 50. "
            "In brackets: 95% intervals of the mean over runs."
        ),
        soft_wrap=True,
    )


def _table(readers: Sequence[LogReader], groups: Sequence[Group]) -> Table:
    finals, names = [run_finals(reader) for reader in readers], run_names(readers)
    metrics = in_order({name for run in finals for name in run})
    table = Table()
    table.add_column("run", overflow="fold")
    for name in metrics:
        metric = described(readers, name)
        unit = metric.unit.removesuffix(" per completion")
        table.add_column(Text(f"{metric.short or metric.label}\n{unit}".rstrip()), justify="right")
    for number, group in enumerate(groups, start=1):
        for place in group.members:
            table.add_row(Text(visible(names[place])), *(_cell(finals[place].get(name)) for name in metrics))
        if len(group.members) > 1:
            mean = group_finals([finals[place] for place in group.members])
            title = f"group {number}: " * (len(groups) > 1) + f"mean of {len(group.members)} runs"
            table.add_row(Text(title), *(_cell(mean.get(name)) for name in metrics), style="bold")
        table.add_section()
    return table


def _cell(figure: FinalFigure | None) -> str:
    if figure is None or not math.isfinite(figure.value):
        return ""
    interval = "" if math.isnan(figure.low) else f"\n\\[{figure.low:.3g}, {figure.high:.3g}]"
    return f"{figure.value:.3g}{interval}"
