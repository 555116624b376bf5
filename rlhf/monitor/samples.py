"""Search, sorting and pairing of the samples of a run, of which there may be hundreds of thousands."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

from rlhf.monitor.log import LogReader
from rlhf.monitor.tail import is_number

Sort = Literal["newest", "oldest", "score_high", "score_low", "kl_high", "kl_low"]
SORTS: tuple[str, ...] = get_args(Sort)

_REPORT_PAIRS = 60
_REPORT_EXTREMES = 12
_REPORT_SPREAD = 200
_REPORT_READ = 2000  # oldest, newest and spread samples that a report chooses among, each


class Query(NamedTuple):
    """A selection of samples and its order."""

    text: str = ""
    """Words that must each occur in the prompt or the completion, ignoring case."""
    prompt: str | None = None
    """Prompt of the selected samples; None selects all prompts."""
    sort: str = "newest"
    """Order, one of SORTS; pairs are in the order of their later samples."""
    ended: bool | None = None
    """True selects completions that ended by themselves, False the others, None both."""
    pairs: bool = False
    """True gives one row per prompt, with its first and its last completion."""
    tokens: bool = False
    """True selects only samples whose tokens the log has."""


class _Entry(NamedTuple):
    """The part of a sample by which it is searched and sorted."""

    number: int
    """Index in the reader's samples."""
    step: int
    prompt: str
    text: str
    """Prompt and completion in lower case."""
    score: float
    kl: float
    ended: bool | None
    tokens: bool
    """True where the log has `per_token`."""


class SampleIndex:
    """An index of a reader's samples, which grows with them."""

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader
        self._generation = reader.generation
        self._entries: list[_Entry] = []

    def update(self) -> None:
        """Index the samples that were logged since the last call."""
        count = len(self._reader.samples.offsets)
        if self._generation != self._reader.generation or count < len(self._entries):
            self._generation, self._entries = self._reader.generation, []
        self._entries += _entries(self._reader, range(len(self._entries), count))

    def find(self, query: Query) -> list[tuple[int, ...]]:
        """Return the numbers of the matching samples: (number,) of each sample, or (first, last) of each prompt."""
        return _find(self._entries, query)

    def rows(self, numbers: Iterable[tuple[int, ...]]) -> list[list[dict[str, Any]]]:
        """Return the samples of each row of numbers."""
        return [[self._reader.samples[number] for number in row] for row in numbers]


def report_samples(reader: LogReader, limit: int) -> list[dict[str, Any]]:
    """Return samples for a report, at most `limit` bytes: first and last of prompts, extremes, and an even spread.

    They are chosen among the oldest, the newest and evenly spread ones, so that the time does not grow with the log.
    """
    offsets = reader.samples.offsets
    count = len(offsets)
    spread = range(0, count, max(1, count // _REPORT_READ))
    candidates = {*range(min(count, _REPORT_READ)), *spread, *range(max(0, count - _REPORT_READ), count)}
    chosen, size = set[int](), 0
    for number in _by_interest(list(_entries(reader, sorted(candidates)))):
        if number not in chosen and size + offsets[number].size <= limit:
            chosen.add(number)
            size += offsets[number].size
    return [reader.samples[number] for number in sorted(chosen)]


def _by_interest(entries: list[_Entry]) -> Iterator[int]:
    for tokens in (True, False):
        for pair in _find(entries, Query(pairs=True, tokens=tokens))[:_REPORT_PAIRS]:
            yield from pair
        for sort in ("score_high", "score_low", "kl_high", "kl_low"):
            for (number,) in _find(entries, Query(sort=sort, tokens=tokens))[:_REPORT_EXTREMES]:
                yield number
        some = [entry.number for entry in entries if entry.tokens or not tokens]
        yield from some[:: max(1, len(some) // _REPORT_SPREAD)]


def _entries(reader: LogReader, numbers: Sequence[int]) -> Iterator[_Entry]:
    """Yield entries of the reader's samples without parsing `per_token`, which is most of a line."""
    if not numbers:
        return
    offsets = reader.samples.offsets
    with (reader.folder / "samples.jsonl").open("rb") as stream:
        for number in numbers:
            stream.seek(offsets[number].offset)
            line = stream.read(offsets[number].size)
            # in a JSON text the quotes would be escaped, so this can only be the key
            head, cut, _ = line.partition(b', "per_token": ')
            yield _entry(number, offsets[number].step, _fields(head + b"}" if cut else line), bool(cut))


def _find(entries: list[_Entry], query: Query) -> list[tuple[int, ...]]:
    matching = [entry for entry in entries if _matches(entry, query)]
    rows = _pairs(matching) if query.pairs else [(entry,) for entry in matching]
    kind, _, direction = query.sort.partition("_")
    if kind in ("score", "kl"):
        sign = -1.0 if direction == "high" else 1.0
        rows.sort(key=lambda row: _nan_last(sign * getattr(row[-1], kind)))
    else:
        rows.sort(key=lambda row: row[-1].step, reverse=query.sort == "newest")
    return [tuple(entry.number for entry in row) for row in rows]


def _pairs(entries: list[_Entry]) -> list[tuple[_Entry, ...]]:
    """Return the first and last sample of every prompt that has samples of several steps."""
    first: dict[str, _Entry] = {}
    last: dict[str, _Entry] = {}
    for entry in entries:
        first.setdefault(entry.prompt, entry)
        last[entry.prompt] = entry
    return [(first[prompt], last[prompt]) for prompt in first if first[prompt].step < last[prompt].step]


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # rewritten since the last poll
        return {}
    return fields if isinstance(fields, dict) else {}


def _entry(number: int, step: int, fields: dict[str, Any], tokens: bool) -> _Entry:
    prompt, completion = (str(fields.get(name, "")) for name in ("prompt", "completion"))
    ended = fields.get("ended")
    return _Entry(
        number,
        step,
        prompt,
        f"{prompt}\n{completion}".lower(),
        _number(fields.get("score")),
        _number(fields.get("kl")),
        ended if isinstance(ended, bool) else None,
        tokens,
    )


def _number(value: Any) -> float:
    return float(value) if is_number(value) and abs(value) < 1e300 else math.nan


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _matches(entry: _Entry, query: Query) -> bool:
    return (
        (query.prompt is None or entry.prompt == query.prompt)
        and (query.ended is None or entry.ended is query.ended)
        and (not query.tokens or entry.tokens)
        and (not query.text or all(map(entry.text.__contains__, query.text.lower().split())))
    )
