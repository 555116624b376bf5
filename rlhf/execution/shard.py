"""Functions of the parameter server: flat fp32 master parameters, optimiser state, and updates applied exactly once.

The flat buffer of all parameters is split into contiguous ranges at multiples of `rlhf.tree.CHUNK`. Each range is a
`Shard` with a version. This module does not depend on which process holds which shard.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.field_docs import documented
from rlhf.optim import Optimizer, clip_scale
from rlhf.tree import CHUNK, FlatLayout, leaves, named_leaves, tree_map, unflatten
from rlhf.types import Tree

_GROUP = 1 << 22
"""Number of elements updated at once on a CPU, so that temporary buffers take only 16 MB. On a GPU, where a call costs
more, 32 times as many elements are updated."""


@documented
class Shard(NamedTuple):
    """A range of the flat buffer and its optimiser state, which `apply` updates in place (donated buffers)."""

    start: int
    """First element of the range, a multiple of CHUNK."""
    params: Tensor
    """[n] float32: parameters of the range."""
    opt_state: Any
    """State of the optimiser over `params`, with leaves [n], or [] for counters."""
    version: int
    """Number of steps applied since the beginning of the run."""


def init_shard(flat: Tensor, optimizer: Optimizer, *, start: int = 0, stop: int | None = None) -> Shard:
    """Return the shard of the range [start, stop) of a flat parameter buffer, at version 0.

    Args:
        flat: [layout.size] float32, all parameters.
        optimizer: optimiser, whose state is initialised.
        start: first element of the range, a multiple of CHUNK.
        stop: end of the range, a multiple of CHUNK. None stands for the end of the buffer.

    Raises:
        ValueError: `start` or `stop` is not a multiple of CHUNK.

    Example:
        >>> optimizer = rlhf.adamw(rlhf.constant_schedule(0.1))
        >>> shard = init_shard(torch.zeros(2 * CHUNK), optimizer, start=CHUNK)
        >>> shard.params.shape, shard.version
        (torch.Size([4096]), 0)
    """
    stop = flat.numel() if stop is None else stop
    if start % CHUNK or stop % CHUNK:
        raise ValueError(f"init_shard: range is [{start}, {stop}), expected multiples of {CHUNK}")
    params = flat[start:stop].clone()
    return Shard(start, params, optimizer.init(params), 0)


def update_scale(squares: Tensor, count: float, max_norm: float) -> tuple[float, float]:
    """Return the factor that turns the summed into the clipped mean gradient, and the norm of the mean gradient.

    Args:
        squares: [chunks] float64, squared norms of the chunks of all shards, in the order of the buffer.
        count: divisor of the mean, such as the number of tokens of the global batch; 0 divides by 1.
        max_norm: maximum global norm of the mean gradient; inf disables clipping.

    Example:
        >>> scale, norm = update_scale(torch.tensor([9.0, 16.0], dtype=torch.float64), count=5.0, max_norm=0.5)
        >>> round(scale, 4), norm  # the mean gradient has norm 1: half of a fifth
        (0.1, 1.0)
    """
    norm = squares.sum().sqrt() / (count or 1.0)
    return float(clip_scale(norm, max_norm)) / (count or 1.0), float(norm)


@documented
class UpdateSlice(NamedTuple):
    """Views of the elements of a shard that are updated at once: a block of each leaf, by the leaf's dotted name."""

    gradient: dict[str, Tensor]
    """Blocks of the summed gradient."""
    opt_state: Any
    """State of the optimiser over these blocks. Counters are not split."""
    params: dict[str, Tensor]
    """Blocks of the parameters."""
    hyperparameters: dict[str, Any] | None
    """`Optimizer.hyperparameters` of the whole leaves; None if the optimiser has none."""


def slice_shard(shard: Shard, gradient_sum: Tensor, optimizer: Optimizer, layout: FlatLayout) -> list[UpdateSlice]:
    """Return the views that `apply` updates. No element is read, so a GPU may still be computing the gradient.

    Args:
        shard: the shard to update.
        gradient_sum: [n] float32, range of the summed gradient that belongs to the shard.
        optimizer: element-wise optimiser, such as `rlhf.optim.adamw`.
        layout: layout of the whole buffer.

    Example:
        >>> from rlhf.tree import flat_layout, flatten
        >>> params = {"a": torch.ones(2), "b": torch.ones(3)}
        >>> layout, optimizer = flat_layout(params), rlhf.adamw(rlhf.constant_schedule(0.1))
        >>> shard = init_shard(flatten(params, layout), optimizer)
        >>> (piece,) = slice_shard(shard, torch.zeros(layout.size), optimizer, layout)
        >>> list(piece.params)
        ['a', 'b']
    """
    hyperparameters = _leaf_hyperparameters(optimizer.hyperparameters, layout)
    size = _GROUP * (1 if shard.params.is_cpu else 32)

    def slice_group(group: _Group) -> UpdateSlice:
        def split(leaf: Tensor) -> dict[str, Tensor]:
            blocks = leaf[group.start : group.stop].split_with_sizes(list(group.blocks.values()))
            return dict(zip(group.blocks, blocks, strict=True))

        state = tree_map(lambda leaf: split(leaf) if leaf.ndim else leaf, shard.opt_state)
        records = None if hyperparameters is None else {name: hyperparameters[name] for name in group.blocks}
        return UpdateSlice(split(gradient_sum), state, split(shard.params), records)

    return [slice_group(group) for group in _groups(shard.start, shard.params.numel(), size, layout)]


def apply(
    shard: Shard,
    step: int,
    slices: Sequence[UpdateSlice],
    scale: float,
    optimizer: Optimizer,
    learning_rate: float | None = None,
) -> Shard:
    """Apply one step exactly once.

    Args:
        shard: the shard, whose buffers are updated in place and belong to the result.
        step: number of this step, which equals the version of the shard. The step before it has already been applied
            and returns the shard unchanged.
        slices: views from `slice_shard`. The gradient may be overwritten (donated buffer).
        scale: factor from `update_scale`.
        optimizer: optimiser that was passed to `slice_shard`.
        learning_rate: learning rate that replaces the optimiser's schedule in this step.

    Returns:
        The shard at version step + 1.

    Raises:
        ValueError: the step is neither the next step nor the last one applied.

    Example:
        >>> from rlhf.tree import flat_layout, flatten
        >>> params = {"w": torch.ones(2)}
        >>> layout, optimizer = flat_layout(params), rlhf.adamw(rlhf.constant_schedule(0.1))
        >>> shard = init_shard(flatten(params, layout), optimizer)
        >>> slices = slice_shard(shard, torch.ones(layout.size), optimizer, layout)
        >>> shard = apply(shard, 0, slices, scale=1.0, optimizer=optimizer)
        >>> shard.version, unflatten(shard.params, layout)["w"]
        (1, tensor([0.9000, 0.9000]))
    """
    if step == shard.version - 1:
        return shard
    if step != shard.version:
        raise ValueError(f"apply: step is {step}, expected {shard.version}, the next step")
    updated: Any = shard.opt_state
    for update_slice in slices:
        updated = write_update(optimizer, *update_slice, scale=scale, learning_rate=learning_rate)
    _write(_leaves_of(shard.opt_state, counters=True), _leaves_of(updated, counters=True))  # after all slices
    return shard._replace(version=shard.version + 1)


@accelerated("fused_adamw.write_update")
def write_update(
    optimizer: Optimizer,
    grads: dict[str, Tensor],
    state: Any,
    params: dict[str, Tensor],
    hyperparameters: dict[str, Any] | None,
    *,
    scale: float,
    learning_rate: float | None,
) -> Any:
    """Update the buffers of params and state in place, with `grads` times `scale`.

    Counters are not written, so that a shard can be updated slice by slice. The returned state has the new counters.

    Args:
        optimizer: element-wise optimiser.
        grads: blocks of the summed gradient, by the leaf's dotted name.
        state: state of the optimiser over these blocks.
        params: blocks of the parameters, by the leaf's dotted name.
        hyperparameters: `Optimizer.hyperparameters` by the leaf's dotted name; None if the optimiser has none.
        scale: factor on the gradient.
        learning_rate: learning rate that replaces the optimiser's schedule; None keeps the schedule.

    Example:
        >>> optimizer = rlhf.adamw(rlhf.constant_schedule(0.1))
        >>> params = {"w": torch.ones(1)}
        >>> state = optimizer.init(params)
        >>> options = {"scale": 1.0, "learning_rate": 0.5}
        >>> state = write_update(optimizer, {"w": torch.ones(1)}, state, params, None, **options)
        >>> params, state.step
        ({'w': tensor([0.5000])}, tensor(1))
    """
    options = {"learning_rate": learning_rate, "hyperparameters": hyperparameters}
    options = {name: value for name, value in options.items() if value is not None}
    scaled = {name: block * scale for name, block in grads.items()}
    new_params, new_state = optimizer.update(scaled, state, params, **options)
    _write((params, _leaves_of(state)), (new_params, _leaves_of(new_state)))
    return new_state


class _Group(NamedTuple):
    """Position of an `UpdateSlice` in its shard: the elements [start, stop)."""

    start: int
    stop: int
    blocks: dict[str, int]
    """Number of elements of each leaf's block. The blocks are consecutive."""


@functools.lru_cache(maxsize=8)  # the same in every step
def _groups(start: int, count: int, size: int, layout: FlatLayout) -> list[_Group]:
    """Split a shard of [start, start + count) into groups of `size` elements, and each group into blocks of leaves.

    A block includes the zeros that pad its leaf, so that it starts and ends at multiples of ALIGNMENT, as kernels
    require. There is at least one group, which may be empty, because a shard without elements also counts its steps.
    """
    ends = (*layout.offsets[1:], layout.size)
    groups = []
    for low in range(start, start + max(count, 1), size):
        high = min(low + size, start + count)
        sizes = {
            name: min(end, high) - max(offset, low)
            for name, offset, end in zip(layout.names, layout.offsets, ends, strict=True)
        }
        groups.append(_Group(low - start, high - start, {name: size for name, size in sizes.items() if size > 0}))
    return groups


@functools.lru_cache(maxsize=8)
def _leaf_hyperparameters(hyperparameters: Callable[[Tree], Tree] | None, layout: FlatLayout) -> dict[str, Any] | None:
    """Return `Optimizer.hyperparameters` by leaf name, computed from the names and shapes of the layout."""
    if hyperparameters is None:
        return None
    return named_leaves(hyperparameters(unflatten(torch.empty(layout.size, device="meta"), layout)))


def _leaves_of(state: Any, *, counters: bool = False) -> list[Tensor]:
    return [leaf for leaf in leaves(state) if (leaf.ndim == 0) == counters]


def _write(buffers: Tree, values: Tree) -> None:
    for buffer, value in zip(leaves(buffers), leaves(values), strict=True):
        buffer.copy_(value)
