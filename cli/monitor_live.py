"""Terminal dashboard that follows a run, in any size from 40 columns and 12 lines, with or without colour."""

import contextlib
import math
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from rlhf.cli.monitor_health import finding_line, verdict

from rlhf.io.printable_text import EMPTY, visible
from rlhf.metrics import describe, in_order
from rlhf.monitor.health import findings
from rlhf.monitor.log import LogReader, Progress, Series

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_SILENT = 120.0  # seconds without a line, and twenty steps' time, after which a run may be dead; as on the page
_SPACIOUS = 18  # lines from which there are headings
_LABEL, _VALUE = 16, 9  # columns


def follow(folder: Path, console: Console) -> None:
    """Show the dashboard of a run until Ctrl-C, or once if the console is not a terminal or cannot move its cursor.

    Raises:
        UserError: the folder is no run's, or cannot be read.
    """
    reader = LogReader(folder)
    reader.poll()

    def view() -> Group:
        lines = dashboard(reader, console.width, console.height, time.time(), ascii_only=console.options.ascii_only)
        return Group(*lines)

    if console.is_terminal and not console.is_dumb_terminal:
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves the screen whole
        try:
            _watch(reader, view, console)
        finally:
            signal.signal(signal.SIGTERM, before)
    console.print(view())


def _watch(reader: LogReader, view: Callable[[], Group], console: Console) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(view(), console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            time.sleep(1.0)
            reader.poll()
            live.update(view(), refresh=True)


def dashboard(reader: LogReader, width: int, height: int, now: float, *, ascii_only: bool = False) -> list[Text]:
    """Return at most `height - 1` lines of at most `width` columns.

    Args:
        reader: polled.
        width: columns.
        height: lines of the terminal; the last one stays free.
        now: Unix seconds.
        ascii_only: draw with ASCII alone.
    """
    if not reader.stages:
        waiting = [Text(f"waiting for {reader.folder / 'metrics.jsonl'}"), *_problems(reader)]
        return _fit(waiting, width, height, ascii_only)
    stage = reader.stages[-1]
    head = [_title(reader), _bar(reader.progress(stage), width, now, ascii_only)]
    metrics, results = _metrics(reader, stage, width, ascii_only), findings(reader)
    problems, warnings = (
        [finding_line(finding) for finding in results if finding.level == level] for level in ("problem", "warning")
    )
    health = [*problems, *_problems(reader), *warnings]  # the verdict does not count what the log lacks
    spacious = height >= _SPACIOUS
    room = height - 1 - len(head) - 1 - 4 * spacious  # the verdict, and two headings with a blank line each
    health = health[: max(1, room // 4)]
    metrics = metrics[: max(2, (room - len(health)) * 2 // 3)]
    samples = _samples(reader, room - len(health) - len(metrics), width)
    lines = [
        *head,
        *metrics,
        *_heading("health", spacious),
        verdict(results),
        *health,
        *_heading("newest completions", spacious and bool(samples)),
        *samples,
    ]
    return _fit(lines, width, height, ascii_only)


def sparkline(series: Series, width: int, blocks: str = _BLOCKS) -> str:
    """Return a sparkline of a series in `width` characters. A space stands for a missing value."""
    cells = [cell[np.isfinite(cell)] for cell in np.array_split(series.values, min(width, max(len(series.values), 1)))]
    means = np.array([cell.mean() if cell.size else math.nan for cell in cells])
    known = means[np.isfinite(means)]
    if not known.size:
        return ""
    low, reach = float(known.min()), float(np.ptp(known))
    middle = (len(blocks) - 1) // 2
    return "".join(
        " " if math.isnan(mean) else blocks[round((mean - low) / reach * (len(blocks) - 1)) if reach else middle]
        for mean in means.tolist()
    )


def _fit(lines: list[Text], width: int, height: int, ascii_only: bool) -> list[Text]:
    """Return as many lines as fit, each cut to the width."""
    lines = lines[: max(height - 1, 1)]
    if ascii_only:
        lines = [Text(line.plain.encode("ascii", "backslashreplace").decode()) for line in lines]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return lines


def _heading(name: str, shown: bool) -> list[Text]:
    return [Text(), Text(name, "bold")] if shown else []


def _problems(reader: LogReader) -> list[Text]:
    return [Text.assemble(("log     ", "yellow"), visible(problem)) for problem in reader.problems]


def _title(reader: LogReader) -> Text:
    """Return the run's name and the progress of its stages."""
    parts = []
    for stage in reader.stages:
        progress = reader.progress(stage)
        parts.append(f"{visible(stage)} {progress.step}{f'/{progress.total}' if progress.total else ''}")
    before = f"  after {', '.join(parts[:-1])}" if parts[:-1] else ""
    return Text.assemble((visible(reader.name), "bold"), "  ", (parts[-1], "bold cyan"), (before, "dim"))


def _bar(progress: Progress, width: int, now: float, ascii_only: bool) -> Text:
    """Return a progress bar with pace and time left, or the end of the stage."""
    words = _words(progress, now)
    space = min(30, width - cell_len(words) - 2)
    if progress.total <= 0 or space < 5:
        return Text(words)
    done = min(space, space * progress.step // progress.total)
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    return Text.assemble((full * done, "green"), (empty * (space - done), "dim"), "  ", words)


def _words(progress: Progress, now: float) -> str:
    pace, left = progress.pace, progress.total - progress.step
    speed = f"{pace:.3g} s/{progress.unit}" if math.isfinite(pace) else ""
    silent = now - progress.time
    status: str = progress.state
    if status == "running" and silent > max(_SILENT, 20 * (pace if math.isfinite(pace) else 0.0)):
        status = f"silent for {_duration(silent)}, killed?"
    elif status == "running" and left > 0 and math.isfinite(pace):
        status = f"{_duration(left * pace)} left"
    return ", ".join(part for part in (status, speed) if part)


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (
        f"{days} d {hours} h" if days else f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
    )


def _metrics(reader: LogReader, stage: str, width: int, ascii_only: bool) -> list[Text]:
    """Return label, sparkline and newest value of each metric."""
    lines = []
    labels = {name: describe(name).short for name in in_order(reader.names(stage))}
    for name, label in labels.items():
        if not label:
            continue
        series = reader.series(stage, name)
        known = series.values[np.isfinite(series.values)]
        value = f"{known[-1]:.4g}" if known.size else "-"
        spark = sparkline(series, max(width - _LABEL - _VALUE - 2, 1), _ASCII if ascii_only else _BLOCKS)
        text = Text(visible(label))
        text.truncate(_LABEL, overflow="crop" if ascii_only else "ellipsis", pad=True)
        lines.append(Text.assemble(text, f"{value:>{_VALUE}} ", (spark, "cyan")))
    return lines


def _samples(reader: LogReader, room: int, width: int) -> list[Text]:
    """Return the newest completions, with their prompts if there is room for two."""
    detailed = room >= 6
    count = max(room // (3 if detailed else 1), 0)
    lines = []
    for sample in reversed(reader.samples[-count:] if count else []):
        if detailed:
            lines.append(Text(_one_line(sample["prompt"])[-width:], "dim"))
        figures, text = _figures(sample, detailed), _one_line(sample["completion"]) or EMPTY
        rows = textwrap.wrap(text, width, initial_indent=" " * (len(figures) + 1), subsequent_indent="    ")
        shown = text if len(rows) < 2 or not detailed else rows[0].strip()
        lines.append(Text.assemble((figures, "cyan"), " ", shown))
        lines += [Text(" ".join([rows[1], *(row.strip() for row in rows[2:])]))] if detailed and rows[1:] else []
    return lines[: max(room, 0)]


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def _figures(sample: dict[str, Any], detailed: bool) -> str:
    score, kl = (sample.get(name) for name in ("score", "kl"))
    shown = f"{score:z6.2f}" if isinstance(score, int | float) else "     -"
    return f"score {shown}, KL {kl:z.2f}" if detailed and isinstance(kl, int | float) else shown
