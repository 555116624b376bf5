"""The parameter server's pure inside: flat fp32 master parameters, optimiser state, and the exactly-once update.

The flat buffer of all parameters is cut into contiguous ranges at multiples of `rlhf.tree.CHUNK`; each range is one
`Shard` with a version. One process holds one shard; nothing here knows who hosts it.
"""

from typing import Any, NamedTuple

from torch import Tensor

from rlhf.optim import Optimizer
from rlhf.tree import CHUNK, FlatLayout, chunk_square_sums, leaves, tree_map

_GROUP = 1 << 18
"""Elements updated at once: what the update allocates stays small, and in cache."""


class Shard(NamedTuple):
    """One range of the flat buffer and its optimiser state; `apply` writes both in place (donated buffers)."""

    start: int
    """First element of the range, a multiple of CHUNK."""
    params: Tensor
    """[n] float32."""
    opt_state: Any
    """State of the optimiser over `params`: leaves [n], or [] for counters."""
    version: int
    """Steps applied since the beginning of the run."""


def init_shard(flat: Tensor, optimizer: Optimizer, *, start: int = 0, stop: int | None = None) -> Shard:
    """The shard of [start, stop) of a flat parameter buffer, at version 0.

    Raises:
        ValueError: the range is not cut at multiples of CHUNK.
    """
    stop = flat.numel() if stop is None else stop
    if start % CHUNK or stop % CHUNK:
        raise ValueError(f"init_shard: range is [{start}, {stop}), expected multiples of {CHUNK}")
    params = flat[start:stop].clone()
    return Shard(start, params, optimizer.init(params), 0)


def square_sums(gradient_sum: Tensor) -> Tensor:
    """[n / CHUNK] float64: what a shard contributes to the global norm of the gradient."""
    return chunk_square_sums(gradient_sum)


def update_scale(squares: Tensor, count: float, max_norm: float) -> tuple[float, float]:
    """(factor that turns a summed gradient into the clipped mean gradient, norm of the mean gradient before clipping).

    Args:
        squares: [chunks] float64, the square sums of all shards in the order of the buffer.
        count: what the sum is divided by: the tokens or pairs of the global batch.
        max_norm: global-norm clipping; inf is off.
    """
    norm = float(squares.sum().sqrt()) / count
    return min(1.0, max_norm / (norm + 1e-6)) / count, norm


def apply(
    shard: Shard,
    step: int,
    gradient_sum: Tensor,
    scale: float,
    optimizer: Optimizer,
    layout: FlatLayout,
    *,
    out: Tensor | None = None,
) -> Shard:
    """Apply one step exactly once.

    Args:
        shard: its buffers are updated in place (the parameters', unless `out` is given) and belong to the result.
        step: the step that this is; must be the shard's version. The step before it was applied already, and is
            answered with the shard as it is.
        gradient_sum: [n] float32, this range of the summed gradient.
        scale: from `update_scale`.
        optimizer: element-wise, as `rlhf.optim.adamw`.
        layout: of the whole buffer.
        out: [n] float32, where the new parameters are written; the gaps between leaves are left as they are.

    Returns:
        The shard at version step + 1.

    Raises:
        ValueError: the step is neither the next one nor the last one applied.
    """
    if step == shard.version - 1:
        return shard
    if step != shard.version:
        raise ValueError(f"apply: step is {step}, expected {shard.version}: the next one")
    target = shard.params if out is None else out
    updated: list[Tensor] = []
    for blocks in _groups(shard, layout):
        params, gradient = _cut(shard.params, blocks), tree_map(lambda g: g * scale, _cut(gradient_sum, blocks))
        state = tree_map(lambda leaf, cut=blocks: _cut(leaf, cut) if leaf.ndim else leaf, shard.opt_state)
        new_params, new_state = optimizer.update(gradient, state, params)
        updated = leaves(new_state)
        for old, new in zip(leaves(_cut(target, blocks)) + leaves(state), leaves(new_params) + updated, strict=True):
            if old.ndim:
                old.copy_(new)
    counters = [leaf for leaf in leaves(shard.opt_state) if not leaf.ndim]
    for counter, new in zip(counters, (leaf for leaf in updated if not leaf.ndim), strict=True):
        counter.copy_(new)  # only now: every group must see the same count
    return shard._replace(params=target, version=shard.version + 1)


Blocks = dict[str, tuple[int, int]]
"""(first element, end) within a shard, by leaf name."""


def _groups(shard: Shard, layout: FlatLayout) -> list[Blocks]:
    """Cut a shard into groups of blocks, at most _GROUP elements each; the gaps between leaves are left out.

    There is at least one group, if an empty one: a shard without elements counts its steps too.
    """
    end = shard.start + shard.params.numel()
    groups: list[Blocks] = [{}]
    size = 0
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        low, high = max(offset, shard.start), min(offset + shape.numel(), end)
        while low < high:
            if size == _GROUP:
                groups.append({})
                size = 0
            stop = min(high, low + _GROUP - size)
            groups[-1][name] = (low - shard.start, stop - shard.start)
            low, size = stop, size + stop - low
    return groups


def _cut(leaf: Tensor, blocks: Blocks) -> dict[str, Tensor]:
    return {name: leaf[low:high] for name, (low, high) in blocks.items()}
