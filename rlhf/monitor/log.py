"""Reading logs/ while it is written; each poll reads only what was appended since the last.

The format of the lines is that of `rlhf.io.run_log`. Other lines, such as one that a crash cut off or the output of
another program, are skipped and listed in `problems`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf.errors import UserError
from rlhf.io.files import check_folder
from rlhf.io.run_log import FORMAT
from rlhf.monitor.sample_store import SampleOffset, SampleStore
from rlhf.monitor.tail import Tail, is_number, parse_line

_HEAD = re.compile(rb'\{"stage": "([\w-]+)", "step": (\d{1,18}), ')
"""The beginning of every sample line; the rest is parsed when somebody asks for it."""

AFTERWARDS = ("fault", "verdict")
"""Events that may come after the end of a stage."""

_PACE_STEPS = 50  # newest lines whose median duration is the pace

State = Literal["running", "ended", "interrupted", "failed"]
_STATES: dict[str, State] = {"end": "ended", "interrupted": "interrupted", "nonfinite": "failed", "failed": "failed"}


class Series(NamedTuple):
    """One metric of one stage."""

    steps: np.ndarray
    """[n] int64, increasing."""
    values: np.ndarray
    """[n] float64, NaN where the value was not finite."""


class Progress(NamedTuple):
    """The progress of a stage, by its log."""

    step: int
    total: int
    """Number of steps of the stage; 0 if the log does not have it."""
    unit: str
    """Name of a step."""
    state: State
    """State of the stage. A killed run cannot log its end and stays "running"."""
    time: float
    """Unix time of its last line, in seconds; NaN if the log does not have it."""
    pace: float
    """Median of the newest steps' durations, in seconds; NaN if the log does not have it."""


def log_folder(folder: Path) -> Path:
    """Return the logs/ folder, given that folder, the run's output folder or a file in logs/.

    Raises:
        UserError: the path is none of these.
    """
    if folder.name in ("metrics.jsonl", "samples.jsonl") and folder.is_file():
        return folder.parent
    check_folder(folder, "--log-dir takes a run's OUTPUT_DIR/logs")
    if (folder / "metrics.jsonl").is_file() or folder.name == "logs":
        return folder
    if (folder / "logs").is_dir() or (folder / "config.yaml").is_file():
        return folder / "logs"
    raise UserError(
        f"{folder}: not a run's folder, neither metrics.jsonl nor logs/ is in it; --log-dir takes a run's OUTPUT_DIR"
    )


class LogReader:
    """A reader of one run's log, which may be growing, finished, crashed, resumed or not written yet."""

    def __init__(self, folder: Path) -> None:
        """Locate the log, without reading it before the first `poll`.

        Args:
            folder: a run's logs/, or its output folder.

        Raises:
            UserError: the folder does not exist, or does not belong to a run.
        """
        self.folder = log_folder(folder)
        self.generation = 0
        """Number that changes when lines read before are no longer valid, so that their readers must start again."""
        self._metrics, self._texts = (Tail(self.folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
        self._forget()

    def _forget(self) -> None:
        self.stages: list[str] = []
        """Stages in order of appearance."""
        self.events: list[dict[str, Any]] = []
        """Lines with `event`, in order."""
        self.samples = SampleStore(self.folder / "samples.jsonl")
        """Completions, in order."""
        self._columns: dict[str, dict[str, _Column]] = {}
        self._last: dict[str, int] = {}
        self._unread: Counter[str] = Counter()
        self._notes: list[str] = []

    def poll(self) -> bool:
        """Read what was appended since the last call and return whether anything has changed.

        Raises:
            UserError: a file cannot be read.
        """
        replaced = [tail.replaced() for tail in (self._metrics, self._texts)]
        if any(replaced):
            for tail in (self._metrics, self._texts):
                tail.rewind()
            self._forget()
            self.generation += 1
        changed = any(replaced)
        for _, line in self._metrics.lines():
            self._take_metrics(line)
            changed = True
        for offset, line in self._texts.lines():
            self._take_sample(offset, line)
            changed = True
        return changed

    @property
    def name(self) -> str:
        """Return the name of the run, which is that of its output folder."""
        folder = self.folder.absolute()
        return (folder.parent if folder.name == "logs" else folder).name or str(folder)

    @property
    def problems(self) -> list[str]:
        """Return messages about the parts that could not be read."""
        unread = [
            f"{name}: {count} {'line is' if count == 1 else 'lines are'} cut off or not of an rlhf log, and passed over"
            for name, count in sorted(self._unread.items())
            if count
        ]
        return [*unread, *dict.fromkeys(self._notes)]

    def names(self, stage: str) -> list[str]:
        """Return the metrics of a stage, in order of appearance."""
        return [name for name in self._columns.get(stage, {}) if name != "time"]

    def series(self, stage: str, name: str) -> Series:
        """Return a metric so far, read-only, or an empty series. `time` is the Unix time of each line, in seconds."""
        column = self._columns.get(stage, {}).get(name)
        return column.series() if column is not None else Series(np.empty(0, np.int64), np.empty(0))

    def progress(self, stage: str) -> Progress:
        """Return the progress of a stage."""
        events = [event for event in self.events if event["stage"] == stage]
        first: dict[str, Any] = next((event for event in reversed(events) if event["event"] in ("start", "resume")), {})
        total, unit = first.get("total"), first.get("unit")
        states = [event for event in events if event["event"] not in AFTERWARDS]
        stamps = [*(event.get("time") for event in events[-1:]), *self.series(stage, "time").values[-1:].tolist()]
        return Progress(
            max(self._last.get(stage, 0), states[-1].get("step", 0) if states else 0),  # not every step may be logged
            total if isinstance(total, int) else 0,
            unit if isinstance(unit, str) else "step",
            _STATES.get(states[-1]["event"], "running") if states else "running",
            max((float(stamp) for stamp in stamps if isinstance(stamp, int | float)), default=math.nan),
            _pace(self.series(stage, "time")),
        )

    def _take_metrics(self, line: bytes) -> None:
        fields = parse_line(line)
        if fields is None or not isinstance(fields.get("event", ""), str) or not fields.keys() & {"event", "step"}:
            self._unread["metrics.jsonl"] += bool(line.strip())
            return
        stage = fields["stage"]
        if stage not in self._columns:
            self.stages.append(stage)
            self._columns[stage] = {}
        if "event" in fields:
            self._take_event(stage, fields)
            return
        step = fields.pop("step")
        if step <= self._last.get(stage, -1):
            self._start_over(stage)
        self._last[stage] = step
        columns = self._columns[stage]
        for name, value in fields.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                if name not in columns:
                    columns[name] = _Column()
                columns[name].append(step, value)

    def _take_event(self, stage: str, fields: dict[str, Any]) -> None:
        if fields["event"] == "start" and stage in self._last:
            self._start_over(stage)
        written = fields.get("format", FORMAT)
        if isinstance(written, int) and written > FORMAT:
            self._notes.append(
                f"metrics.jsonl: written by a newer version of rlhf (log format {written}, this one reads {FORMAT}); "
                "something may be missing or wrong here; install that version"
            )
        self.events.append({name: value for name, value in fields.items() if _has_its_type(name, value)})

    def _start_over(self, stage: str) -> None:
        """Drop the lines of an earlier run of the stage when another one begins in the same file."""
        self.generation += 1
        self._columns[stage] = {}
        self._last.pop(stage)
        self.events = [event for event in self.events if event["stage"] != stage]
        self._notes.append(f"metrics.jsonl: holds more than one run of {stage}; the last one is shown")

    def _take_sample(self, offset: int, line: bytes) -> None:
        head = _HEAD.match(line)
        if head is not None and line.endswith(b"}"):
            stage, step = head[1].decode(), int(head[2])
        else:
            fields = parse_line(line)
            if fields is None or "step" not in fields:
                self._unread["samples.jsonl"] += bool(line.strip())
                return
            stage, step = fields["stage"], fields["step"]
        if self.samples.add(SampleOffset(stage, step, offset, len(line))):
            self.generation += 1
            self._notes.append(f"samples.jsonl: holds more than one run of {stage}; the last one is shown")


def read_logs(folders: Sequence[Path]) -> list[LogReader]:
    """Read the logs that runs have written by now.

    Raises:
        UserError: a folder does not belong to a run, or its log has no line that can be read.
    """
    readers = [LogReader(folder) for folder in folders]
    for reader in readers:
        reader.poll()
        if not reader.stages:
            raise UserError(f"{reader.folder}: there is nothing to show yet: no line of metrics.jsonl can be read")
    return readers


def _has_its_type(name: str, value: Any) -> bool:
    """Return whether a field of an event has the type that readers expect."""
    if name in ("time", "recovery_s", "peak_bytes", "total"):
        return is_number(value)
    if name in ("message", "what", "unit", "text"):
        return isinstance(value, str)
    if name in ("final", "sound"):
        return isinstance(value, bool)
    if name in ("settings", "provenance", "units"):
        return isinstance(value, dict)
    return name != "notes" or (isinstance(value, list) and all(isinstance(note, str) for note in value))


def _pace(times: Series) -> float:
    seconds = np.diff(times.values[-_PACE_STEPS:]) / np.diff(times.steps[-_PACE_STEPS:])
    seconds = seconds[np.isfinite(seconds)]
    return float(np.median(seconds)) if seconds.size else math.nan


class _Column:
    """A metric's values, in arrays that double when they are full: a series is a view of their beginning."""

    def __init__(self) -> None:
        self._steps, self._values = np.empty(64, np.int64), np.empty(64)
        self._size = 0
        self._new: list[tuple[int, float]] = []

    def append(self, step: int, value: float | None) -> None:
        try:
            number = math.nan if value is None else float(value)
        except OverflowError:  # an integer beyond floats
            number = math.nan
        self._new.append((step, number if math.isfinite(number) else math.nan))

    def series(self) -> Series:
        if self._new:
            end = self._size + len(self._new)
            if end > len(self._steps):
                room = max(end, 2 * len(self._steps)) - self._size
                self._steps = np.concatenate([self._steps[: self._size], np.empty(room, np.int64)])
                self._values = np.concatenate([self._values[: self._size], np.empty(room)])
            self._steps[self._size : end], self._values[self._size : end] = zip(*self._new, strict=True)
            self._size, self._new = end, []
        return Series(self._steps[: self._size], self._values[: self._size])
