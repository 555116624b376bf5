"""The parameter server's pure inside: flat fp32 master parameters, optimiser state, and the exactly-once update.

The flat buffer of all parameters is cut into contiguous ranges at multiples of `rlhf.tree.CHUNK`; each range is one
`Shard` with a version. One process holds one shard; nothing here knows who hosts it.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rlhf.optim import Optimizer
from rlhf.tree import CHUNK, FlatLayout, leaves, tree_map
from rlhf.types import Tree

_GROUP = 1 << 22
"""Elements updated at once: what the update allocates stays small (16 MB), and its calls cost little. On a GPU, where
calls cost more, it is 32 times as many."""


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


class UpdateSlice(NamedTuple):
    """Views of elements of a shard that are updated at once, by the name of a leaf for each block treated alike."""

    gradient: dict[str, Tensor]
    opt_state: Any
    """Counters are not cut."""
    params: dict[str, Tensor]


def slice_shard(shard: Shard, gradient_sum: Tensor, optimizer: Optimizer, layout: FlatLayout) -> list[UpdateSlice]:
    """What `apply` updates. Nothing is read, so this can be done while a GPU is at the gradient.

    Args:
        shard: to be updated.
        gradient_sum: [n] float32, its range of the summed gradient.
        optimizer: element-wise, as `rlhf.optim.adamw`.
        layout: of the whole buffer.
    """
    size = _GROUP * (1 if shard.params.is_cpu else 32)

    def piece(group: _Group) -> UpdateSlice:
        def part(leaf: Tensor) -> dict[str, Tensor]:
            blocks = leaf[group.start : group.stop].split_with_sizes(list(group.blocks.values()))
            return dict(zip(group.blocks, blocks, strict=True))

        state = tree_map(lambda leaf: part(leaf) if leaf.ndim else leaf, shard.opt_state)
        return UpdateSlice(part(gradient_sum), state, part(shard.params))

    groups = _groups(shard.start, shard.params.numel(), size, layout, optimizer.hyperparameter_group)
    return [piece(group) for group in groups]


def apply(
    shard: Shard,
    step: int,
    pieces: Sequence[UpdateSlice],
    scale: float,
    optimizer: Optimizer,
    learning_rate: float | None = None,
) -> Shard:
    """Apply one step exactly once.

    Args:
        shard: its buffers are updated in place and belong to the result.
        step: the step that this is; must be the shard's version. The step before it was applied already, and is
            answered with the shard as it is.
        pieces: of `slice_shard`; the gradient may be overwritten (a donated buffer).
        scale: from `update_scale`.
        optimizer: as in `slice_shard`.
        learning_rate: replaces the optimiser's own in this step.

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
    options = {} if learning_rate is None else {"rate": learning_rate}
    for gradient, state, params in pieces:
        if optimizer.update_inplace is not None:
            updated = optimizer.update_inplace(gradient, state, params, scale, **options)
        else:
            scaled = {name: block * scale for name, block in gradient.items()}
            new_params, updated = optimizer.update(scaled, state, params, **options)
            _write((params, _leaves_of(state)), (new_params, _leaves_of(updated)))
    _write(_leaves_of(shard.opt_state, counters=True), _leaves_of(updated, counters=True))  # after all pieces
    return shard._replace(version=shard.version + 1)


class _Group(NamedTuple):
    """Where a `UpdateSlice` lies in its shard: elements [start, stop)."""

    start: int
    stop: int
    blocks: dict[str, int]
    """Elements of each, which lie behind one another, by leaf name."""


@functools.lru_cache(maxsize=8)  # the same in every step
def _groups(
    start: int, count: int, size: int, layout: FlatLayout, hyperparameter_group: Callable[[str], Hashable]
) -> list[_Group]:
    """Cut a shard of [start, start + count) into groups of `size` elements, and these into blocks treated alike.

    A block is a leaf, or several, with the gaps behind them, in which all is zero; it begins at a multiple of
    ALIGNMENT, as `rlhf.optim.adamw` asks for. There is at least one group, if an empty one: a shard without elements
    counts its steps too.
    """
    firsts: dict[str, int] = {}
    last = layout.names[0]  # of a shard that is nothing but a gap
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        inside = offset < start + count and offset + shape.numel() > start
        if inside and not (firsts and hyperparameter_group(last) == hyperparameter_group(name)):
            firsts[name] = offset - start if firsts else 0
            last = name
    firsts = firsts or {last: 0}
    ends = [*list(firsts.values())[1:], count]
    groups = []
    for low in range(0, max(count, 1), size):
        high = min(low + size, count)
        sizes = {n: min(end, high) - max(first, low) for (n, first), end in zip(firsts.items(), ends, strict=True)}
        groups.append(_Group(low, high, {name: number for name, number in sizes.items() if number > 0}))
    return groups


def _leaves_of(state: Any, *, counters: bool = False) -> list[Tensor]:
    return [leaf for leaf in leaves(state) if (leaf.ndim == 0) == counters]


def _write(buffers: Tree, values: Tree) -> None:
    for buffer, value in zip(leaves(buffers), leaves(values), strict=True):
        buffer.copy_(value)
