"""The assignment of micro-batches to workers, and their sum along the fixed tree of `rlhf.tree.tree_sum`.

A worker computes a contiguous range of the micro-batches that consists of few whole subtrees, and adds up each subtree.
The owner of a range of the gradient adds the subtrees of all workers in the tree's order. So the order of the
additions, and with it every bit of the sum, is the same for any number of workers.
"""

import functools
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf.tree import CHUNK

Range = tuple[int, int]
"""(first, end) of consecutive micro-batches, or of consecutive elements."""

SUBTREES = 2
"""The most subtrees of a worker, each of which it sends as a whole gradient."""

_BLOCK = 1 << 18
"""Elements added at once, so that partial sums stay in the CPU's cache."""


@functools.cache
def assign_micro_batches(total: int, workers: int) -> tuple[Range, ...]:
    """Return each worker's range of micro-batches 0..total-1, the largest as short as `SUBTREES` allows.

    Args:
        total: number of micro-batches, at least 1.
        workers: at least 1; their ranges may be empty.
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
    """Return the fewest whole subtrees of the tree over 0..total-1 that make up start..stop-1."""
    ranges = []
    while start < stop:
        size = 1
        while start % (2 * size) == 0 and start + size < stop and (start + 2 * size <= stop or stop == total):
            size *= 2
        ranges.append((start, min(start + size, total)))
        start = ranges[-1][1]
    return tuple(ranges)


def join_sums(sums: Mapping[Range, Tensor], total: int, *, out: Tensor) -> None:
    """Write the sum of subtrees that make up 0..total-1 to `out`, added in the order of `rlhf.tree.tree_sum`.

    Args:
        sums: [n] of each subtree.
        total: number of micro-batches.
        out: [n], not one of the sums.
    """

    def add(start: int, stop: int, part: slice, out: Tensor | None = None) -> Tensor:
        if (start, stop) in sums:
            return sums[start, stop][part] if out is None else out.copy_(sums[start, stop][part])
        middle = start + (1 << (stop - start - 1).bit_length() - 1)
        return torch.add(add(start, middle, part), add(middle, stop, part), out=out)

    block = _BLOCK if out.is_cpu else max(len(out), 1)
    for begin in range(0, len(out), block):
        part = slice(begin, begin + block)
        add(0, total, part, out[part])


def shard_ranges(size: int, shards: int) -> tuple[Range, ...]:
    """Split a flat buffer into ranges as even as `rlhf.tree.CHUNK` allows; they may be empty.

    Args:
        size: number of elements, a multiple of CHUNK.
        shards: at least 1.
    """
    chunks = size // CHUNK
    bounds = [number * chunks // shards * CHUNK for number in range(shards + 1)]
    return tuple(itertools.pairwise(bounds))
