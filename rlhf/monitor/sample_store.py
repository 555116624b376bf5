"""The completions of a log, indexed as they are written and read from the file on access."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from rlhf.monitor.tail import is_number, parse_line


class SampleOffset(NamedTuple):
    """The position of a sample's line in the file."""

    stage: str
    step: int
    offset: int
    size: int


class SampleStore(Sequence[dict[str, Any]]):
    """The lines of samples.jsonl in order, as dicts, read from the file on access.

    Each line has `stage`, `step`, `prompt` and `completion`, and other keys as the run wrote them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.offsets: list[SampleOffset] = []
        """Stage, step and position of every sample."""
        self._last: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(number, slice):
            return list(self._read(self.offsets[number]))
        return next(self._read([self.offsets[number]]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(self.offsets)

    def add(self, offset: SampleOffset) -> bool:
        """Append a sample and return whether it begins another run; earlier samples of its stage are then dropped."""
        is_restart = offset.step < self._last.get(offset.stage, 0)
        if is_restart:
            self.offsets = [previous for previous in self.offsets if previous.stage != offset.stage]
        self._last[offset.stage] = offset.step
        self.offsets.append(offset)
        return is_restart

    def at(self, stage: str, step: int) -> list[dict[str, Any]]:
        """Return the samples of a step."""
        return list(self._read(offset for offset in self.offsets if offset.step == step and offset.stage == stage))

    def _read(self, offsets: Iterable[SampleOffset]) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as stream:
                for offset in offsets:
                    stream.seek(offset.offset)
                    yield _sample(offset, stream.read(offset.size))
        except FileNotFoundError:  # removed since the last poll
            yield from (_sample(offset, b"") for offset in offsets)


def _sample(offset: SampleOffset, line: bytes) -> dict[str, Any]:
    """Return a sample, with its texts as str; empty ones if its line is no longer in the file."""
    fields = parse_line(line) or {}
    if (fields.get("stage"), fields.get("step")) != offset[:2]:
        fields = {"stage": offset.stage, "step": offset.step}
    texts = {name: str(fields.get(name, "")) for name in ("prompt", "completion")}
    return {name: value for name, value in fields.items() if _has_its_type(name, value)} | texts


def _has_its_type(name: str, value: Any) -> bool:
    """Return whether a field of a sample has the type that readers expect; most fields are numbers."""
    if name in ("stage", "step"):
        return True
    if name == "ended":
        return isinstance(value, bool)
    if name == "per_token":
        return _is_per_token(value)
    return value is None or is_number(value)


def _is_per_token(value: Any) -> bool:
    """Return whether a value has the pieces of a text and numbers for each of them."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return False
    pieces = value.get("pieces", [])
    numbers = [item for name, column in value.items() if name != "pieces" for item in column]
    return (
        all(isinstance(piece, str) for piece in pieces)
        and all(item is None or is_number(item) for item in numbers)
        and {len(column) for column in value.values()} == {len(pieces)}
    )
