"""What a person sees while a stage trains: a bar with the metrics that matter, or plain lines without a terminal."""

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0

console = Console(stderr=True, highlight=False)
"""Messages and progress go to stderr; stdout stays free for results."""


def tell(text: str) -> None:
    """Say one line to the user."""
    console.print(text, markup=False, soft_wrap=True)


def working(text: str) -> contextlib.AbstractContextManager[object]:
    """Say one line to the user, with a sign of life behind it while the block runs, where there is a terminal."""
    tell(text)
    return console.status("working") if console.is_terminal else contextlib.nullcontext()


class StageProgress:
    """Shows one stage's progress; a context manager."""

    def __init__(self, stage: str, total: int, unit: str, shown: Sequence[str]) -> None:
        """Args: the stage's name, its steps in all, what a step is called, and the metrics to show by name."""
        self._stage, self._total, self._unit, self._shown = stage, total, unit, shown
        self._last_line = time.monotonic() - _SECONDS_BETWEEN_LINES
        self._latest: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("[bold]{task.description:<7}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "StageProgress":
        if console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._total, metrics="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show that `step` steps are done, with the newest value of each metric."""
        self._latest |= {name: metrics[name] for name in self._shown if name in metrics}
        text = "  ".join(f"{name} {self._latest[name]:.4g}" for name in self._shown if name in self._latest)
        if self._task is not None:
            self._bar.update(self._task, completed=step, metrics=text)
        elif step == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            console.print(f"{self._stage:<7} {self._unit} {step}/{self._total}  {text}", soft_wrap=True)
