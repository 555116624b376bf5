"""Progress of a training stage: a bar with a few metrics in a terminal, and plain lines otherwise."""

import time
from collections.abc import Mapping

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rlhf.cli.terminal import stderr_console

from rlhf.metrics import describe
from rlhf.train.observers import Observer, StageStart

_SECONDS_BETWEEN_LINES = 10.0


def _fixed(width: int) -> Column:
    """Return a column that a narrow terminal does not shrink."""
    return Column(no_wrap=True, min_width=width, width=width)


def _short(name: str) -> str:
    """Return a metric's short name without its unit."""
    metric = describe(name)
    return (metric.short or metric.label).partition(",")[0]


class StageProgress(Observer):
    """Observer that shows the progress of each stage."""

    def on_start(self, start: StageStart) -> None:
        """Start a new bar, or print the first line."""
        self._console, self._stage, self._total = stderr_console(), start.stage, start.total
        self._latest: dict[str, float] = {}
        self._last_line = time.monotonic() - _SECONDS_BETWEEN_LINES
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}", table_column=_fixed(len(start.stage.name))),
            BarColumn(bar_width=None, table_column=_fixed(12)),
            MofNCompleteColumn(table_column=_fixed(2 * len(str(start.total)) + 1)),
            TimeElapsedColumn(table_column=_fixed(7)),
            TimeRemainingColumn(table_column=_fixed(7)),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self._console,
            expand=True,
        )
        if self._console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task(start.stage.name, total=start.total, metrics="")
        self.on_step(start.step, {})

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Show the number of steps made, with the newest value of each metric."""
        shown = self._stage.shown
        self._latest |= {name: metrics[name] for name in shown if name in metrics}
        text = "  ".join(f"{_short(name)} {self._latest[name]:.4g}" for name in shown if name in self._latest)
        if self._task is not None:
            self._bar.update(self._task, completed=step, metrics=text)
        elif step == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            line = f"{self._stage.name:<7} {self._stage.unit} {step}/{self._total}  {text}"
            self._console.print(line, soft_wrap=True)
        return False

    def on_end(self, error: BaseException | None) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
