"""Finding completions: search, sort and pair the samples of a run, also hundreds of thousands of them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from rlhf.monitor.log import LogReader

Sort = Literal["newest", "oldest", "score_high", "score_low", "kl_high", "kl_low"]
SORTS: tuple[str, ...] = get_args(Sort)

_REPORT_PAIRS = 60
_REPORT_EXTREMES = 12
_REPORT_SPREAD = 240


class Query(NamedTuple):
    """Which samples, in which order."""

    text: str = ""
    """Words that prompt or completion must have, each; case does not count."""
    prompt: str | None = None
    """Only samples of exactly this prompt."""
    sort: str = "newest"
    """One of SORTS; of a pair, the later one counts."""
    ended: bool | None = None
    """Only those that did, or did not, end by themselves."""
    pairs: bool = False
    """One row per prompt: its first completion and its last."""


class _Entry(NamedTuple):
    """What is kept of a sample to find it by."""

    step: int
    prompt: str
    text: str
    """Prompt and completion in lower case."""
    score: float
    kl: float
    ended: bool | None


class SampleIndex:
    """Follows a reader's samples."""

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader
        self._generation = reader.generation
        self._entries: list[_Entry] = []

    def update(self) -> None:
        """Read what the reader has found since the last call."""
        places = self._reader.samples.places
        if self._generation != self._reader.generation or len(places) < len(self._entries):
            self._generation, self._entries = self._reader.generation, []
        self._entries += map(_entry, self._heads(len(self._entries)))

    def find(self, query: Query) -> list[tuple[int, ...]]:
        """Numbers of the samples that match: one each, or (first, last) of each prompt."""
        matching = [number for number, entry in enumerate(self._entries) if _matches(entry, query)]
        rows = self._pairs(matching) if query.pairs else [(number,) for number in matching]
        kind, _, direction = query.sort.partition("_")
        if kind in ("score", "kl"):
            sign = -1.0 if direction == "high" else 1.0
            return sorted(rows, key=lambda row: _nan_last(sign * getattr(self._entries[row[-1]], kind)))
        newest = query.sort == "newest"
        return sorted(rows, key=lambda row: self._entries[row[-1]].step, reverse=newest)

    def rows(self, found: Iterable[tuple[int, ...]]) -> list[list[dict[str, Any]]]:
        """The samples themselves, with all that the log says of them."""
        return [[self._reader.samples[number] for number in row] for row in found]

    def selection(self, limit: int) -> list[dict[str, Any]]:
        """Samples for a report, of at most `limit` bytes: before and after, the extremes, and some of every time."""
        places, chosen, size = self._reader.samples.places, set[int](), 0
        for number in self._by_interest():
            if number not in chosen and size + places[number].size <= limit:
                chosen.add(number)
                size += places[number].size
        return [self._reader.samples[number] for number in sorted(chosen)]

    def _by_interest(self) -> Iterator[int]:
        for pair in self.find(Query(pairs=True))[:_REPORT_PAIRS]:
            yield from pair
        for sort in ("score_high", "score_low", "kl_high", "kl_low"):
            for (number,) in self.find(Query(sort=sort))[:_REPORT_EXTREMES]:
                yield number
        count = len(self._entries)
        for place in range(min(count, _REPORT_SPREAD)):
            yield place * count // min(count, _REPORT_SPREAD)

    def _pairs(self, numbers: list[int]) -> list[tuple[int, ...]]:
        """First and last sample of every prompt that has samples of several steps."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for number in numbers:
            first.setdefault(self._entries[number].prompt, number)
            last[self._entries[number].prompt] = number
        pairs = [(first[prompt], last[prompt]) for prompt in first]
        return [pair for pair in pairs if self._entries[pair[0]].step < self._entries[pair[1]].step]

    def _heads(self, start: int) -> Iterator[dict[str, Any]]:
        """Samples from number `start` on without `per_token`, which is most of a line and stays unparsed."""
        path = self._reader.folder / "samples.jsonl"
        if start == len(self._reader.samples.places):
            return
        with path.open("rb") as stream:
            for place in self._reader.samples.places[start:]:
                stream.seek(place.offset)
                line = stream.read(place.size)
                # in a JSON text the quotes would be escaped, so this can only be the key
                head, cut, _ = line.partition(b', "per_token": ')
                yield _fields(head + b"}" if cut else line) | {"step": place.step}


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # rewritten since the last poll
        return {}
    return fields if isinstance(fields, dict) else {}


def _entry(fields: dict[str, Any]) -> _Entry:
    prompt, completion = (str(fields.get(name, "")) for name in ("prompt", "completion"))
    ended = fields.get("ended")
    return _Entry(
        fields["step"],
        prompt,
        f"{prompt}\n{completion}".lower(),
        _number(fields.get("score")),
        _number(fields.get("kl")),
        ended if isinstance(ended, bool) else None,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _matches(entry: _Entry, query: Query) -> bool:
    within: Callable[[str], bool] = entry.text.__contains__
    return (
        (query.prompt is None or entry.prompt == query.prompt)
        and (query.ended is None or entry.ended is query.ended)
        and all(map(within, query.text.lower().split()))
    )
