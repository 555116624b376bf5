"""The logs of a run in logs/: metrics.jsonl, samples.jsonl and TensorBoard event files.

Each line is a JSON object with `stage` and, for metrics and samples, `step`. Lines with `event` mark that a stage
started, resumed, was interrupted or ended. Values that are not finite are written as null.
"""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.io.files import clear_write_errors, write_bytes

FORMAT = 1
"""Version of the line format, written in every `start` event."""

_FILES = ("metrics.jsonl", "samples.jsonl")


Sink = Callable[[str, int, dict[str, float]], None]
"""Function that is called with (stage, step, metrics) for every line of metrics."""


class RunLog:
    """A log to which one stage appends lines, each flushed immediately, so that a crash loses none."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        *,
        after_step: int | None = None,
        tensorboard: bool = True,
        sink: Sink | None = None,
    ) -> None:
        """Open logs/ for a stage.

        Args:
            folder: logs/, created if missing.
            stage: the stage's name, written in every line.
            after_step: last step before a resumed run; the stage's later lines are removed. None for a new run.
            tensorboard: True also writes event files, to folder/tensorboard/<stage>.
            sink: function that is called with the metrics of every step; None if there is none.

        Raises:
            UserError: `check_logs` refuses the folder, or the files cannot be written.
        """
        self._stage, self._sink = stage, sink
        self._board = _Board(folder / "tensorboard" / stage, after_step) if tensorboard else None
        with clear_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_logs(folder)
            paths = [folder / name for name in _FILES]
            if after_step is not None:
                for path in paths:
                    _drop_later(path, stage, after_step)
            self._metrics, self._samples = (
                path.open("a", encoding="utf-8", errors="backslashreplace") for path in paths
            )  # a lone surrogate becomes its JSON escape

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write a line with the metrics of a step, by name."""
        self._write(self._metrics, {"stage": self._stage, "step": step, "time": round(time.time(), 3), **values})
        if self._board is not None:
            self._board.write(step, values)
        if self._sink is not None:
            self._sink(self._stage, step, dict(values))

    def samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Write a line for each completion of a step."""
        for sample in samples:
            self._write(self._samples, {"stage": self._stage, "step": step, **sample})

    def event(self, name: str, **facts: Any) -> None:
        """Write a line for an event, with facts about it as JSON values."""
        self._write(self._metrics, {"stage": self._stage, "event": name, "time": round(time.time(), 3), **facts})

    def close(self) -> None:
        """Close all files."""
        for opened in (self._metrics, self._samples, self._board):
            with contextlib.suppress(OSError):  # what a full disk refused was reported when it was written
                if opened is not None:
                    opened.close()

    @staticmethod
    def _write(stream: Any, line: dict[str, Any]) -> None:
        with clear_write_errors(Path(stream.name)):
            stream.write(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()


def finite(value: Any) -> Any:
    """Return a JSON value with None in place of every float that is not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_logs(folder: Path) -> None:
    """Raise UserError if a path with the name of a log is not a file, or is a file without any line of a log."""
    for path in (folder / name for name in _FILES):
        if path.exists() and not path.is_file():  # such as a pipe, which the report would wait for
            raise UserError(f"{path}: is not a file; move it away, or choose another folder")
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        if lines and not any(map(_is_ours, lines)):
            raise UserError(f"{path}: already exists, and is not a log of rlhf; move it away, or choose another folder")


def _is_ours(line: bytes) -> bool:
    try:
        fields = json.loads(line)
    except ValueError:
        return False
    return isinstance(fields, dict) and "stage" in fields and ("event" in fields or "step" in fields)


def _drop_later(path: Path, stage: str, step: int) -> None:
    """Remove a stage's lines after `step` and incomplete lines."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            fields = json.loads(line)
            later = fields.get("stage") == stage and fields.get("step", 0) > step
        except (ValueError, AttributeError, TypeError):  # cut off, or not ours
            continue
        if not later:
            lines.append(line.decode() + "\n")
    write_bytes(path, "".join(lines).encode())


class _Board:
    """An event file for TensorBoard, flushed immediately. SummaryWriter would write, and fail, in a thread."""

    def __init__(self, folder: Path, after_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # here, because importing it takes a while
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        self._waiting = [Event(wall_time=time.time(), file_version="brain.Event:2")]  # until there is more to write
        if after_step is not None:  # TensorBoard then forgets what older files have from this step on
            self._waiting.append(Event(step=after_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        with clear_write_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(self._path.open("wb"))

    def write(self, step: int, values: dict[str, float]) -> None:
        summary = {"value": [{"tag": name, "simple_value": value} for name, value in values.items()]}
        self._waiting.append(self._event(wall_time=time.time(), step=step, summary=summary))
        with clear_write_errors(self._path):
            while self._waiting:
                self._records.write(self._waiting.pop(0).SerializeToString())
            self._records.flush()

    def close(self) -> None:
        self._records.close()
