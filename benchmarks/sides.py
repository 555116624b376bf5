"""The other end of `benchmarks.session`: processes that make one round of work when asked."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class SideError(RuntimeError):
    """A side ended before it answered; the message has the end of its log."""


@dataclass(frozen=True)
class Setting:
    """One way in which a side can do the work."""

    label: str
    """What is special about it."""
    target: str
    """MODULE:FUNCTION for `benchmarks.session`."""
    settings: dict[str, Any]
    """Of the function."""
    python: Path = Path(sys.executable)
    """Interpreter of the environment it runs in."""
    path: str = ""
    """A folder whose packages come before the environment's."""


class Side:
    """A process that does one side's work. Use it as a context."""

    def __init__(self, setting: Setting, log: Path) -> None:
        """Start it; what it prints goes to `log`."""
        self.setting, self._log = setting, log
        self.rounds: list[dict[str, Any]] = []
        """The facts of every round, warm-up included."""
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [setting.path, str(ROOT)] if setting.path else [str(ROOT)]
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [str(setting.python), "-m", "benchmarks.session", setting.target, json.dumps(setting.settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        self.facts = self._receive()
        """What it said when it was ready."""

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        self._end(patience=30)

    def round(self) -> None:
        """Have one round made, and keep what it says of it."""
        try:
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None
        self.rounds.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise self._lost()
        return json.loads(line)

    def _end(self, patience: float) -> None:
        """Ask for no more rounds, and end the process where it has not ended by itself after `patience` seconds."""
        with contextlib.suppress(BrokenPipeError):  # a request that it never read is still in the buffer
            self._process.stdin.close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _lost(self) -> SideError:
        self._end(patience=5)  # its last words are in the log when it has ended
        tail = self._log.read_text(errors="replace").strip().splitlines()[-6:]
        return SideError(f"{self.setting.target} ({self.setting.label}) ended: " + " | ".join(tail))


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
"""No side looks for anything on the network."""
