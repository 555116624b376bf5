"""Packing: every sequence exactly once, nothing overlaps, nothing is split, and rows give the sequences back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.packing import build_rows, pack, pack_records


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """(units, rows, row_length) that fit: units of one to three sequences."""
    row_length = draw(st.integers(1, 24))
    rows = draw(st.integers(1, 5))
    unit = st.lists(st.integers(1, row_length), min_size=1, max_size=min(3, rows))
    return draw(st.lists(unit, max_size=25)), rows, row_length


@settings(max_examples=200, deadline=None)
@given(packings())
def test_pack_places_every_sequence_once_without_overlap(packing):
    units, rows, row_length = packing
    batches = pack(units, rows=rows, row_length=row_length)
    assert sorted(unit for batch in batches for unit in batch.units) == list(range(len(units)))
    for batch in batches:
        taken = np.zeros((rows, row_length), dtype=int)
        for unit, places in zip(batch.units, batch.places, strict=True):
            assert len(places) == len(units[unit])  # the whole unit is in this micro-batch
            for length, (row, start) in zip(units[unit], places, strict=True):
                assert 0 <= row < rows
                assert start >= 0
                assert start + length <= row_length
                taken[row, start : start + length] += 1
        assert taken.max() == 1
        used = taken.any(axis=1)
        assert used[: used.sum()].all(), "a row was left empty before a used one"


def by_trial(units, rows, row_length):
    """First fit by falling length in micro-batches of 1, 2, … rows, until no more rows would need fewer of them."""

    def first_fit(rows):
        batches, fills = [], []
        for number in sorted(range(len(units)), key=lambda number: (-sum(units[number]), number)):
            place = 0
            while True:
                if place == len(batches):
                    batches.append(([], []))
                    fills.append([0] * rows)
                trial, places = list(fills[place]), []
                for length in units[number]:
                    fitting = [row for row in range(rows) if trial[row] + length <= row_length]
                    if fitting:
                        places.append((fitting[0], trial[fitting[0]]))
                        trial[fitting[0]] += length
                if len(places) == len(units[number]):
                    break
                place += 1
            fills[place] = trial
            batches[place][0].append(number)
            batches[place][1].append(places)
        return batches

    trials = [first_fit(fewer) for fewer in range(max(map(len, units)), rows + 1)]
    return next(trial for trial in trials if len(trial) == len(trials[-1]))


@settings(max_examples=300, deadline=None)
@given(packings().filter(lambda packing: packing[0]))
def test_pack_is_the_first_fit_in_the_fewest_rows(packing):
    units, rows, row_length = packing
    assert [tuple(batch) for batch in pack(units, rows=rows, row_length=row_length)] == by_trial(*packing)


@settings(max_examples=100, deadline=None)
@given(packings())
def test_pack_depends_on_the_lengths_alone(packing):
    units, rows, row_length = packing
    first = pack(units, rows=rows, row_length=row_length)
    again = pack([tuple(map(np.int64, unit)) for unit in units], rows=rows, row_length=row_length)
    assert first == again


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=40), st.integers(1, 4))
def test_pack_wastes_little(lengths, rows):
    """First fit by falling length: of all rows at most one is half empty; micro-batches are of even height, but for
    the last, and with one row less each there would be more of them."""
    batches = pack([[length] for length in lengths], rows=rows, row_length=16)
    fills = []
    for batch in batches:
        fill: dict[int, int] = {}
        for unit, ((row, _),) in zip(batch.units, batch.places, strict=True):
            fill[row] = fill.get(row, 0) + lengths[unit]
        fills.append(fill)
    assert sum(2 * used <= 16 for fill in fills for used in fill.values()) <= 1
    heights = [len(fill) for fill in fills]
    assert all(height == max(heights) for height in heights[:-1])
    if lengths and max(heights) > 1:
        assert len(pack([[length] for length in lengths], rows=max(heights) - 1, row_length=16)) > len(batches)


def test_pack_of_nothing_is_nothing():
    assert pack([], rows=1, row_length=1) == []


@pytest.mark.parametrize(("unit", "rows"), [([9], 2), ([3, 9], 2), ([8, 8, 8], 2), ([8, 1], 1)])
def test_pack_refuses_a_unit_that_fits_nowhere(unit, rows):
    with pytest.raises(ValueError, match=f"unit of lengths .* does not fit {rows} rows of 8"):
        pack([[1], unit], rows=rows, row_length=8)


@settings(max_examples=100, deadline=None)
@given(packings())
def test_build_rows_gives_every_sequence_back(packing):
    units, rows, row_length = packing
    token = iter(range(1, 10_000))
    for batch in pack(units, rows=rows, row_length=row_length):
        places = [place for unit_places in batch.places for place in unit_places]
        lengths = [length for unit in batch.units for length in units[unit]]
        sequences = [np.array([next(token) for _ in range(length)]) for length in lengths]
        (tokens, positions, segments, bounds), starts = build_rows(sequences, places)
        assert {array.dtype for array in (tokens, positions, segments)} == {torch.int64}
        height, width = tokens.shape
        longest = max(start + length for length, (_, start) in zip(lengths, places, strict=True))
        assert height == 1 + max(row for row, _ in places)
        assert width % 16 == 0
        assert longest <= width < longest + 16
        for sequence, (row, start), index in zip(sequences, places, starts, strict=True):
            assert index == row * width + start
            assert tokens.flatten()[index : index + len(sequence)].tolist() == sequence.tolist()
            assert positions[row, start : start + len(sequence)].tolist() == list(range(len(sequence)))
            own = segments[row, start]
            assert own > 0
            assert (segments[row] == own).nonzero().flatten().tolist() == list(range(start, start + len(sequence)))
        empty = segments == 0
        assert int((~empty).sum()) == sum(lengths)
        assert not tokens[empty].any()
        assert not positions[empty].any()
        flat, ends = segments.flatten(), bounds.tolist()
        changes = {i for i in range(len(flat)) if i % width == 0 or flat[i] != flat[i - 1]} | {len(flat)}
        assert bounds.dtype == torch.int32
        assert ends == sorted(changes)


def test_records_lie_in_short_rows_however_long_the_context_is():
    short = pack_records([[30]] * 100, rows=8, limit=8192)
    assert short == pack([[30]] * 100, rows=8, row_length=256)
    assert pack_records([[30]] * 100, rows=8, limit=128) == pack([[30]] * 100, rows=8, row_length=128)
    assert pack_records([[30], [700]], rows=8, limit=8192) == pack([[30], [700]], rows=8, row_length=700)
