"""The functions of the parameter server: flat fp32 master parameters, optimiser state, and the exactly-once update.

The flat buffer of all parameters is split into contiguous ranges at multiples of `rlhf.tree.CHUNK`; each range is one
`Shard` with a version. One process holds one shard; this module does not depend on which.
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
"""Elements updated at once on a CPU: temporary buffers stay small (16 MB) at little overhead per call. On a GPU, where
a call costs more, it is 32 times as many."""


@documented
class Shard(NamedTuple):
    """A range of the flat buffer and its optimiser state; `apply` updates both in place (donated buffers)."""

    start: int
    """First element of the range, a multiple of CHUNK."""
    params: Tensor
    """[n] float32."""
    opt_state: Any
    """The optimiser's state over `params`: leaves [n], or [] for counters."""
    version: int
    """Steps applied since the beginning of the run."""


def init_shard(flat: Tensor, optimizer: Optimizer, *, start: int = 0, stop: int | None = None) -> Shard:
    """Return the shard of [start, stop) of a flat parameter buffer, at version 0.

    Raises:
        ValueError: `start` or `stop` is not a multiple of CHUNK.
    """
    stop = flat.numel() if stop is None else stop
    if start % CHUNK or stop % CHUNK:
        raise ValueError(f"init_shard: range is [{start}, {stop}), expected multiples of {CHUNK}")
    params = flat[start:stop].clone()
    return Shard(start, params, optimizer.init(params), 0)


def update_scale(squares: Tensor, count: float, max_norm: float) -> tuple[float, float]:
    """Return the factor from summed to clipped mean gradient, and the norm of the mean gradient before clipping.

    Args:
        squares: [chunks] float64, the squared norms of all shards' chunks in the order of the buffer.
        count: the divisor of the mean: tokens or pairs of the global batch; 0 divides by 1.
        max_norm: of global-norm clipping; inf disables it.
    """
    norm = squares.sum().sqrt() / (count or 1.0)
    return float(clip_scale(norm, max_norm)) / (count or 1.0), float(norm)


@documented
class UpdateSlice(NamedTuple):
    """Views of the elements of a shard that are updated at once: each leaf's block, by the leaf's dotted name."""

    gradient: dict[str, Tensor]
    opt_state: Any
    """Counters are not split."""
    params: dict[str, Tensor]
    hyperparameters: dict[str, Any] | None
    """`Optimizer.hyperparameters` of the whole leaves."""


def slice_shard(shard: Shard, gradient_sum: Tensor, optimizer: Optimizer, layout: FlatLayout) -> list[UpdateSlice]:
    """Return the views that `apply` updates. It reads no element, so a GPU may still be computing the gradient.

    Args:
        shard: the shard to update.
        gradient_sum: [n] float32, the shard's range of the summed gradient.
        optimizer: element-wise, such as `rlhf.optim.adamw`.
        layout: of the whole buffer.
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
        shard: its buffers are updated in place and belong to the result.
        step: the number of this step: the shard's version. The step before it is already applied and returns the
            shard unchanged.
        slices: from `slice_shard`; the gradient may be overwritten (a donated buffer).
        scale: from `update_scale`.
        optimizer: as in `slice_shard`.
        learning_rate: replaces the optimiser's schedule in this step.

    Returns:
        The shard at version step + 1.

    Raises:
        ValueError: the step is neither the next one nor the one applied last.
    """
    if step == shard.version - 1:
        return shard
    if step != shard.version:
        raise ValueError(f"apply: step is {step}, expected {shard.version}: the next one")
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

    Counters are not written, so that a shard can be updated slice by slice; the returned state has the new counters.
    Arguments are the fields of `UpdateSlice` and those of `apply`.
    """
    options = {"learning_rate": learning_rate, "hyperparameters": hyperparameters}
    options = {name: value for name, value in options.items() if value is not None}
    scaled = {name: block * scale for name, block in grads.items()}
    new_params, new_state = optimizer.update(scaled, state, params, **options)
    _write((params, _leaves_of(state)), (new_params, _leaves_of(new_state)))
    return new_state


class _Group(NamedTuple):
    """The position of an `UpdateSlice` in its shard: elements [start, stop)."""

    start: int
    stop: int
    blocks: dict[str, int]
    """The number of elements of each leaf's block; blocks are consecutive."""


@functools.lru_cache(maxsize=8)  # the same in every step
def _groups(start: int, count: int, size: int, layout: FlatLayout) -> list[_Group]:
    """Split a shard of [start, start + count) into groups of `size` elements, and each group into blocks of leaves.

    A block includes the zeros that pad its leaf, so that it starts and ends at multiples of ALIGNMENT, as kernels
    require. There is at least one group, which may be empty: a shard without elements also counts its steps.
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
