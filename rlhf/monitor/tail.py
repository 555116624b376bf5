"""Following a file of JSON lines: lines appended since the last call, and whether the file was replaced."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

_CHUNK = 4 << 20  # bytes read at once
_MARK = 256  # bytes before the present place by which a rewritten file is known


class Tail:
    """A reader that follows one file of lines. The last line is left until its newline is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rewind()

    def rewind(self) -> None:
        """Start again at the beginning of the file."""
        self._offset, self._inode, self._mark = 0, -1, b""

    def replaced(self) -> bool:
        """Return whether the file no longer begins with the content read before."""
        if self._inode < 0:
            return False
        try:
            status = self._path.stat()
            with self._path.open("rb") as stream:
                stream.seek(self._offset - len(self._mark))
                return status.st_ino != self._inode or stream.read(len(self._mark)) != self._mark
        except FileNotFoundError:
            return self._offset > 0

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, line) for every line completed since the last call."""
        try:
            with self._path.open("rb") as stream:
                self._inode = self._path.stat().st_ino
                stream.seek(self._offset)
                rest = b""
                while chunk := stream.read(_CHUNK):
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        place, self._offset = self._offset, self._offset + len(line) + 1
                        self._mark = (self._mark + line + b"\n")[-_MARK:]
                        yield place, line
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from error


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return a line's fields; None unless it is an object with a stage and, if it has a step, an integer step."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("stage"), str):
        return None
    step = fields.get("step", 0)
    return fields if type(step) is int and 0 <= step < 2**63 else None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number within the range of floats, finite or not."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300)
