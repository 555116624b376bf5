"""The assignment of micro-batches to workers, and their sum along the fixed tree of `rlhf.tree.tree_sum`.

A worker computes a contiguous range of micro-batches that consists of a few whole subtrees, and adds up each subtree.
Those of a machine are joined to larger subtrees before they are sent to other machines. The owner of a range of the
gradient adds the subtrees of all machines in the order of the tree. The order of the additions, and therefore every bit
of the sum, is the same for any number of workers and machines.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.tree import CHUNK

Range = tuple[int, int]
"""Pair (first, end) of consecutive micro-batches or elements."""

SUBTREES = 2
"""Maximum number of subtrees of a worker, each of which it sends as a whole gradient."""

_BLOCK = 1 << 18
"""Number of elements added at once, so that partial sums stay in the cache of the CPU."""


@functools.cache
def assign_micro_batches(total: int, workers: int) -> tuple[Range, ...]:
    """Return the range of micro-batches of each worker, of which the largest is as short as `SUBTREES` allows.

    Args:
        total: number of micro-batches, at least 1.
        workers: number of workers, at least 1. Some ranges may be empty.
    """
    for longest in range(-(-total // workers), total + 1):
        assignment: list[Range] = []
        start = 0
        while start < total and len(assignment) < workers:
            stops = range(min(start + longest, total), start, -1)
            stop = next(stop for stop in stops if len(subtrees(start, stop, total)) <= SUBTREES)
            assignment.append((start, stop))
            start = stop
        if start == total:
            return (*assignment, *([(total, total)] * (workers - len(assignment))))
    raise ValueError(
        f"assign_micro_batches: got {total} micro-batches for {workers} workers, expected at least 1 of each"
    )


def subtrees(start: int, stop: int, total: int) -> tuple[Range, ...]:
    """Return the smallest set of whole subtrees of the tree over 0..total-1 that makes up start..stop-1."""
    ranges = []
    while start < stop:
        size = 1
        while start % (2 * size) == 0 and start + size < stop and (start + 2 * size <= stop or stop == total):
            size *= 2
        ranges.append((start, min(start + size, total)))
        start = ranges[-1][1]
    return tuple(ranges)


def joint_subtrees(assignment: Sequence[Range], workers: Sequence[int]) -> tuple[Range, ...]:
    """Return the smallest set of whole subtrees that consecutive workers have together."""
    total = max(stop for _, stop in assignment)
    return subtrees(assignment[workers[0]][0], assignment[workers[-1]][1], total) if workers else ()


def join_sums(sums: Mapping[Range, Tensor], whole: Range, *, out: Tensor | None = None) -> Tensor:
    """Return the sum of subtrees that make up a larger subtree, in the order of `rlhf.tree.tree_sum`.

    Args:
        sums: [n] sum of each subtree. There may be more than those that are added.
        whole: the larger subtree.
        out: [n] tensor of the result, which must not be one of the sums. If None, the result is a new tensor, or the
            sum of the larger subtree if it is known.
    """
    if out is None:
        if whole in sums:
            return sums[whole]
        out = torch.empty_like(next(iter(sums.values())))

    def add(start: int, stop: int, part: slice, out: Tensor | None = None) -> Tensor:
        if (start, stop) in sums:
            return sums[start, stop][part] if out is None else out.copy_(sums[start, stop][part])
        middle = start + (1 << (stop - start - 1).bit_length() - 1)
        return torch.add(add(start, middle, part), add(middle, stop, part), out=out)

    block = _BLOCK if out.is_cpu else max(len(out), 1)
    for begin in range(0, len(out), block):
        part = slice(begin, begin + block)
        add(*whole, part, out[part])
    return out


def shard_ranges(size: int, shards: int) -> tuple[Range, ...]:
    """Return ranges of a flat buffer that are as even as `rlhf.tree.CHUNK` allows. They may be empty.

    Args:
        size: number of elements, a multiple of CHUNK.
        shards: number of ranges, at least 1.
    """
    chunks = size // CHUNK
    bounds = [number * chunks // shards * CHUNK for number in range(shards + 1)]
    return tuple(itertools.pairwise(bounds))
