"""The parameter server's pure inside: flat fp32 master parameters, optimiser state, and the exactly-once update.

The flat buffer of all parameters is cut into contiguous ranges at multiples of `rlhf.tree.CHUNK`; each range is one
`Shard` with a version. One process holds one shard; nothing here knows who hosts it.
"""

from typing import Any, NamedTuple

from torch import Tensor

from rlhf.optim import Optimizer
from rlhf.tree import ALIGNMENT, CHUNK, FlatLayout, leaves, tree_map
from rlhf.types import Tree

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


def update_scale(squares: Tensor, count: float, max_norm: float) -> tuple[float, float]:
    """(factor that turns a summed gradient into the clipped mean gradient, norm of the mean gradient before clipping).

    Args:
        squares: [chunks] float64, the square sums of all shards in the order of the buffer.
        count: what the sum is divided by: the tokens or pairs of the global batch; 0 divides by 1.
        max_norm: global-norm clipping; inf is off.
    """
    norm = float(squares.sum().sqrt()) / (count or 1.0)
    return min(1.0, max_norm / (norm + 1e-6)) / (count or 1.0), norm


def apply(
    shard: Shard, step: int, gradient_sum: Tensor, scale: float, optimizer: Optimizer, layout: FlatLayout
) -> Shard:
    """Apply one step exactly once.

    Args:
        shard: its buffers are updated in place and belong to the result.
        step: the step that this is; must be the shard's version. The step before it was applied already, and is
            answered with the shard as it is.
        gradient_sum: [n] float32, this range of the summed gradient.
        scale: from `update_scale`.
        optimizer: element-wise, as `rlhf.optim.adamw`.
        layout: of the whole buffer.

    Returns:
        The shard at version step + 1.

    Raises:
        ValueError: the step is neither the next one nor the last one applied.
    """
    if step == shard.version - 1:
        return shard
    if step != shard.version:
        raise ValueError(f"apply: step is {step}, expected {shard.version}: the next one")
    updated: Any = shard.opt_state
    for blocks in _groups(shard, layout):
        gradient = tree_map(lambda g: g * scale, _cut(gradient_sum, blocks))
        state = tree_map(lambda leaf, cut=blocks: _cut(leaf, cut) if leaf.ndim else leaf, shard.opt_state)
        params = _cut(shard.params, blocks)
        if optimizer.update_ is not None:
            updated = optimizer.update_(gradient, state, params)
        else:
            new_params, updated = optimizer.update(gradient, state, params)
            _write((params, _leaves_of(state)), (new_params, _leaves_of(updated)))
    _write(_leaves_of(shard.opt_state, counters=True), _leaves_of(updated, counters=True))  # after all groups
    return shard._replace(version=shard.version + 1)


Blocks = dict[str, tuple[int, int]]
"""(first element, end) within a shard, by leaf name."""


def _groups(shard: Shard, layout: FlatLayout) -> list[Blocks]:
    """Cut a shard into groups of blocks, at most _GROUP elements each; the gaps between leaves are left out.

    Blocks begin at multiples of ALIGNMENT, as `rlhf.optim.adamw` asks for.
    There is at least one group, if an empty one: a shard without elements counts its steps too.
    """
    end = shard.start + shard.params.numel()
    groups: list[Blocks] = [{}]
    size = 0
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        low, high = max(offset, shard.start), min(offset + shape.numel(), end)
        while low < high:
            if _GROUP - size < ALIGNMENT:
                groups.append({})
                size = 0
            stop = min(high, low + (_GROUP - size) // ALIGNMENT * ALIGNMENT)
            groups[-1][name] = (low - shard.start, stop - shard.start)
            low, size = stop, size + stop - low
    return groups


def _leaves_of(state: Any, *, counters: bool = False) -> list[Tensor]:
    return [leaf for leaf in leaves(state) if (leaf.ndim == 0) == counters]


def _write(buffers: Tree, values: Tree) -> None:
    for buffer, value in zip(leaves(buffers), leaves(values), strict=True):
        buffer.copy_(value)


def _cut(leaf: Tensor, blocks: Blocks) -> dict[str, Tensor]:
    return {name: leaf[low:high] for name, (low, high) in blocks.items()}
