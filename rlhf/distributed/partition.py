"""Who computes which micro-batches, and how their sums come together along the fixed tree of `rlhf.tree.tree_sum`.

A worker gets a contiguous share of the micro-batches that consists of few whole subtrees. It adds each subtree up by
itself; whoever owns a range of the gradient adds the subtrees of all workers in the tree's order. So the order of the
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
"""Subtrees of a share, at most: what a worker sends is so many times the gradient."""

_BLOCK = 1 << 18
"""Elements added up at once: sums of some of the addends stay in the CPU's cache."""


@functools.cache
def assign_micro_batches(total: int, workers: int) -> tuple[Range, ...]:
    """The share of each worker in micro-batches 0..total-1: the largest share is as small as few subtrees allow.

    Args:
        total: micro-batches, at least 1.
        workers: at least 1; shares may be empty.
    """
    for most in range(-(-total // workers), total + 1):
        shares: list[Range] = []
        start = 0
        while start < total and len(shares) < workers:
            stops = range(min(start + most, total), start, -1)
            stop = next(stop for stop in stops if len(subtrees(start, stop, total)) <= SUBTREES)
            shares.append((start, stop))
            start = stop
        if start == total:
            return (*shares, *([(total, total)] * (workers - len(shares))))
    raise ValueError(
        f"assign_micro_batches: got {total} micro-batches for {workers} workers, expected at least 1 of each"
    )


def subtrees(start: int, stop: int, total: int) -> tuple[Range, ...]:
    """The fewest whole subtrees of the tree over 0..total-1 that make up start..stop-1."""
    spans = []
    while start < stop:
        size = 1
        while start % (2 * size) == 0 and start + size < stop and (start + 2 * size <= stop or stop == total):
            size *= 2
        spans.append((start, min(start + size, total)))
        start = spans[-1][1]
    return tuple(spans)


def join_sums(sums: Mapping[Range, Tensor], total: int, *, out: Tensor) -> None:
    """Write the sum of subtrees that make up 0..total-1 to `out`, added in the order of `rlhf.tree.tree_sum`.

    Args:
        sums: [n] of each subtree.
        total: micro-batches.
        out: [n], none of the sums.
    """

    def node(start: int, stop: int, part: slice, out: Tensor | None = None) -> Tensor:
        if (start, stop) in sums:
            return sums[start, stop][part] if out is None else out.copy_(sums[start, stop][part])
        middle = start + (1 << (stop - start - 1).bit_length() - 1)
        return torch.add(node(start, middle, part), node(middle, stop, part), out=out)

    block = _BLOCK if out.is_cpu else max(len(out), 1)
    for begin in range(0, len(out), block):
        part = slice(begin, begin + block)
        node(0, total, part, out[part])


def shard_ranges(size: int, shards: int) -> tuple[Range, ...]:
    """Cut a flat buffer into as even ranges as `rlhf.tree.CHUNK` allows; the last may be empty.

    Args:
        size: elements, a multiple of CHUNK.
        shards: at least 1.
    """
    chunks = size // CHUNK
    cuts = [number * chunks // shards * CHUNK for number in range(shards + 1)]
    return tuple(itertools.pairwise(cuts))
