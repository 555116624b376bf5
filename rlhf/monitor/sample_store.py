"""The completions of a log: indexed as they come, read from the file when somebody asks."""

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
    """The lines of samples.jsonl in order, as dicts; read from the file when asked for.

    Every one has `stage`, `step`, `prompt` and `completion`; other keys as the run wrote them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.places: list[SampleOffset] = []
        """Stage and step of every sample, without reading it."""
        self._last: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(number, slice):
            return list(self._read(self.places[number]))
        return next(self._read([self.places[number]]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._read(self.places)

    def add(self, place: SampleOffset) -> bool:
        """Append a sample; whether it begins another run, whose stage's earlier samples are dropped."""
        over = place.step < self._last.get(place.stage, 0)
        if over:
            self.places = [other for other in self.places if other.stage != place.stage]
        self._last[place.stage] = place.step
        self.places.append(place)
        return over

    def at(self, stage: str, step: int) -> list[dict[str, Any]]:
        """The samples of one step."""
        return list(self._read(place for place in self.places if place.step == step and place.stage == stage))

    def _read(self, places: Iterable[SampleOffset]) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as stream:
                for place in places:
                    stream.seek(place.offset)
                    yield _sample(place, stream.read(place.size))
        except FileNotFoundError:  # removed since the last poll
            yield from (_sample(place, b"") for place in places)


def _sample(place: SampleOffset, line: bytes) -> dict[str, Any]:
    """A sample with texts that are texts; blank if its line is no longer there."""
    fields = parse_line(line) or {}
    if (fields.get("stage"), fields.get("step")) != place[:2]:
        fields = {"stage": place.stage, "step": place.step}
    texts = {name: str(fields.get(name, "")) for name in ("prompt", "completion")}
    return {name: value for name, value in fields.items() if _has_its_type(name, value)} | texts


def _has_its_type(name: str, value: Any) -> bool:
    """True for a field of a sample that has the type readers expect; all but a few are numbers."""
    if name in ("stage", "step"):
        return True
    if name == "ended":
        return isinstance(value, bool)
    if name == "per_token":
        return _is_per_token(value)
    return value is None or is_number(value)


def _is_per_token(value: Any) -> bool:
    """True for a value with the pieces of a text and numbers for each of them."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return False
    pieces = value.get("pieces", [])
    numbers = [item for name, column in value.items() if name != "pieces" for item in column]
    return (
        all(isinstance(piece, str) for piece in pieces)
        and all(item is None or is_number(item) for item in numbers)
        and {len(column) for column in value.values()} == {len(pieces)}
    )
