"""Packing of sequences of different lengths into the rows of micro-batches."""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rlhf.batches import Rows

_WIDTH_MULTIPLE = 16
_SHARES = range(2, 17)
"""The k for which `_rows_at_least` counts the sequences longer than 1/k of a row."""
_ROW_LENGTH = 256


class MicroBatch(NamedTuple):
    """The layout of the sequences in a micro-batch."""

    units: list[int]
    """Indices of its units."""
    places: list[list[tuple[int, int]]]
    """For each unit, (row, first column) of each of its sequences."""


def pack(units: Sequence[Sequence[int]], *, rows: int, row_length: int) -> list[MicroBatch]:
    """Pack units of sequences into micro-batches of at most `rows` rows of `row_length` tokens.

    A unit (a sequence, or a preference pair) is never split across micro-batches. Packing is first-fit decreasing
    with the smallest number of rows that needs no more micro-batches, so that their sizes are even. The result depends
    on the lengths only, not on the number of workers.

    Args:
        units: lengths of the sequences of each unit, in tokens, each at most `row_length`.
        rows: maximum rows per micro-batch, at least the number of sequences of a unit.
        row_length: tokens per row.

    Raises:
        ValueError: a unit does not fit.
    """
    batches = _first_fit(units, rows, row_length)
    fewest = -(-_rows_at_least(units, row_length) // max(len(batches), 1))
    for fewer in range(max(fewest, *map(len, units), 1), rows):
        trial = _first_fit(units, fewer, row_length)
        if len(trial) == len(batches):
            return trial
    return batches


def choose_row_length(longest: int, limit: int) -> int:
    """Return the number of tokens in a packed row: 256, or those of the longest sequence if it is longer.

    The cost of attention grows with the length of a row, however short its sequences are. A constant length keeps the
    shapes of micro-batches alike.

    Args:
        longest: number of tokens of the longest sequence.
        limit: largest number of tokens that the model can read, at least `longest`.

    Example:
        >>> choose_row_length(40, limit=128), choose_row_length(40, limit=8192), choose_row_length(300, limit=8192)
        (128, 256, 300)
    """
    return max(longest, min(_ROW_LENGTH, limit))


def pack_records(units: Sequence[Sequence[int]], *, rows: int, limit: int) -> list[MicroBatch]:
    """Pack the sequences of records into rows of `choose_row_length` tokens.

    Args:
        units: lengths of the sequences of each record, in tokens.
        rows: maximum rows per micro-batch, at least the number of sequences of a record.
        limit: largest number of tokens that the model can read, at least each length.
    """
    longest = max(itertools.chain.from_iterable(units), default=1)
    return pack(units, rows=rows, row_length=choose_row_length(longest, limit))


def _rows_at_least(units: Sequence[Sequence[int]], row_length: int) -> int:
    """Return a lower bound on the rows needed: a row has room for fewer than k sequences longer than 1/k of it."""
    lengths = sorted(itertools.chain.from_iterable(units))
    bounds = [-(-sum(lengths) // row_length)]
    for k in _SHARES:
        longer = len(lengths) - bisect.bisect_right(lengths, row_length / k)
        bounds.append(-(-longer // (k - 1)))
    return max(bounds)


def _first_fit(units: Sequence[Sequence[int]], rows: int, row_length: int) -> list[MicroBatch]:
    order = sorted(range(len(units)), key=lambda unit: (-sum(units[unit]), unit))
    batches: list[MicroBatch] = []
    fills: list[list[int]] = []
    room: list[int] = []  # in the emptiest row of each batch
    for unit in order:
        shortest, places, number = min(units[unit]), list[tuple[int, int]](), -1
        while not places:
            number += 1
            if number == len(batches):
                batches.append(MicroBatch([], []))
                fills.append([])
                room.append(row_length)
            if shortest <= room[number]:
                places = _place(units[unit], fills[number], rows, row_length)
            if not (places or fills[number]):
                raise ValueError(f"pack: unit of lengths {list(units[unit])} does not fit {rows} rows of {row_length}")
        batches[number].units.append(unit)
        batches[number].places.append(places)
        room[number] = row_length - (min(fills[number]) if len(fills[number]) == rows else 0)
    return batches


def _place(lengths: Sequence[int], fill: list[int], rows: int, row_length: int) -> list[tuple[int, int]]:
    """Return places for a unit's sequences and update `fill`; [] without a change if a sequence does not fit."""
    trial, places = list(fill), []
    for length in lengths:
        row = next((row for row, used in enumerate(trial) if used + length <= row_length), len(trial))
        if row == len(trial):
            if row == rows or length > row_length:
                return []
            trial.append(0)
        places.append((row, trial[row]))
        trial[row] += length
    fill[:] = trial
    return places


class PackedRows(NamedTuple):
    """Packed rows with the start of each sequence."""

    rows: Rows
    starts: np.ndarray
    """[k] int64, index of each sequence's first token in the flattened rows."""


def build_rows(sequences: Sequence[np.ndarray], places: Sequence[tuple[int, int]], *, min_rows: int = 1) -> PackedRows:
    """Lay out sequences at their places, in rows of the smallest sufficient multiple of 16 tokens.

    Args:
        sequences: int token ids, each [n].
        places: (row, first column) of each sequence.
        min_rows: minimum number of rows; extra rows are empty. 2 if the number varies, because compiled code
            specialises on 1.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    row, column = np.array(places).T
    height, end = max(min_rows, int(row.max()) + 1), int((column + lengths).max())
    width = -(-end // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    starts = row * width + column
    cells = concatenated_ranges(starts, lengths)
    tokens, positions, segments = (np.zeros(height * width, dtype=np.int64) for _ in range(3))
    tokens[cells] = np.concatenate(sequences)
    positions[cells] = concatenated_ranges(np.zeros_like(lengths), lengths)
    segments[cells] = np.repeat(_count_in_group(row), lengths)
    begins = np.empty(height * width, dtype=bool)
    begins[1:] = segments[1:] != segments[:-1]
    begins[::width] = True  # each row begins a segment
    bounds = np.append(np.flatnonzero(begins), height * width).astype(np.int32)
    rows = Rows(
        tokens=torch.from_numpy(tokens).view(height, width),
        positions=torch.from_numpy(positions).view(height, width),
        segments=torch.from_numpy(segments).view(height, width),
        bounds=torch.from_numpy(bounds),
    )
    return PackedRows(rows, starts)


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenated ranges starts[i], …, starts[i] + lengths[i] - 1, [sum(lengths)] int64.

    Example:
        >>> concatenated_ranges(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(lengths.sum())


def _count_in_group(groups: np.ndarray) -> np.ndarray:
    """Return 1 for the first member of each group, 2 for the second, and so on, [k] int64."""
    order = np.argsort(groups, kind="stable")
    ordered, count = groups[order], np.empty_like(groups)
    count[order] = np.arange(1, len(groups) + 1) - np.searchsorted(ordered, ordered)
    return count
