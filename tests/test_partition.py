"""Dealing of micro-batches: every share is whole subtrees, and their sums give the bits of the tree."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import random
from rlhf.distributed import partition as dealing
from rlhf.distributed.partition import assign_micro_batches, join_sums, shard_ranges, subtrees
from rlhf.tree import CHUNK, tree_sum

COUNTS = st.integers(1, 80), st.integers(1, 9)


@given(*COUNTS)
def test_deal_covers_everything_once_in_order(total, workers):
    shares = assign_micro_batches(total, workers)
    assert len(shares) == workers
    assert [number for start, stop in shares for number in range(start, stop)] == list(range(total))
    assert all(len(subtrees(*share, total)) <= 2 for share in shares)


@pytest.mark.parametrize(
    ("total", "workers", "largest"), [(8, 1, 8), (8, 2, 4), (8, 3, 3), (8, 4, 2), (7, 2, 4), (64, 3, 24), (3, 5, 1)]
)
def test_deal_is_even(total, workers, largest):
    assert max(stop - start for start, stop in assign_micro_batches(total, workers)) == largest


@settings(deadline=None)
@given(*COUNTS)
def test_sums_of_any_shares_join_to_the_bits_of_the_tree(total, workers):
    values = list(random.normal(random.key(total), (total, 3)) * torch.tensor([1.0, 1e4, 1e-3]))
    sums = {
        (start, stop): tree_sum(values[start:stop])
        for share in assign_micro_batches(total, workers)
        for start, stop in subtrees(*share, total)
    }
    copies = {span: value.clone() for span, value in sums.items()}
    expected, out = tree_sum(values), torch.empty(3)
    with mock.patch.object(dealing, "_BLOCK", 2):
        join_sums(sums, (0, total), out=out)
    assert torch.equal(out, expected)
    assert all(torch.equal(sums[span], copy) for span, copy in copies.items())


def test_another_order_of_addition_has_other_bits():
    """The property above would be empty if addition were associative."""
    values = list(random.normal(random.key(1), (7, 100)))
    assert not torch.equal(sum(values[1:], values[0]), tree_sum(values))


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_are_even_ranges_of_whole_chunks(chunks, shards):
    ranges = shard_ranges(chunks * CHUNK, shards)
    assert len(ranges) == shards
    assert ranges[0][0] == 0
    assert ranges[-1][1] == chunks * CHUNK
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    sizes = {(stop - start) // CHUNK for start, stop in ranges}
    assert max(sizes) - min(sizes) <= 1
