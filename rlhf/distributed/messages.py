"""What crosses between processes: NumPy arrays, which lie in shared memory without a copy, and plain values."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.distributed.partition import Range
from rlhf.execution.shard import Shard, init_shard
from rlhf.optim import Optimizer
from rlhf.tree import leaves, realign, tree_map
from rlhf.types import Tree


class ShardState(NamedTuple):
    """A copy of a shard."""

    start: int
    """First element."""
    params: np.ndarray
    """[n] float32."""
    opt_state: list[np.ndarray] | None
    """Leaves [n], or [] for counters; None is the optimiser's first state."""


def to_numpy(tree: Tree) -> Any:
    """Every leaf as an array on the CPU (no copy where it is there); equal tensors of a tree share one array."""
    seen: dict[Any, np.ndarray] = {}

    def convert(leaf: Tensor) -> np.ndarray:
        key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        if key not in seen:
            seen[key] = leaf.detach().cpu().numpy()
        return seen[key]

    return tree_map(convert, tree)


def from_numpy(tree: Any, device: torch.device, *, copy: bool = False) -> Tree:
    """Every array as a tensor; on the CPU a view of it, unless `copy` or it lies otherwise than new tensors do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # we do not write
        return realign(
            tree_map(
                lambda array: (torch.tensor(array) if copy else torch.from_numpy(np.asarray(array))).to(device), tree
            )
        )


def copy_arrays(tree: Any) -> Any:
    """A tree whose arrays are copies, in memory of this process; other leaves, such as numbers, are taken over."""
    return tree_map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tree)


def write_shard(shard: Shard) -> ShardState:
    """A shard's buffers as arrays."""
    return ShardState(shard.start, to_numpy(shard.params), [to_numpy(leaf) for leaf in leaves(shard.opt_state)])


def read_shard(
    state: Sequence[ShardState], optimizer: Optimizer, part: Range, version: int, device: torch.device
) -> Shard:
    """A shard from copies of shards that were cut in any way.

    Args:
        state: in order; together the whole buffer.
        optimizer: whose state it is.
        part: elements wanted.
        version: of the state.
        device: of the result.
    """
    shard = init_shard(read_params(state, part).to(device), optimizer)
    for number, leaf in enumerate(leaves(shard.opt_state)):
        parts = [copy.opt_state[number] for copy in state if copy.opt_state is not None]
        if parts:
            leaf.copy_(_elements(parts, part) if leaf.ndim else torch.tensor(parts[0]))
    return shard._replace(start=part[0], version=version)


def read_params(state: Sequence[ShardState], part: Range) -> Tensor:
    """A new tensor of some elements of the whole parameter buffer; arguments as `read_shard`'s."""
    return _elements([copy.params for copy in state], part)


def _elements(parts: Sequence[np.ndarray], part: Range) -> Tensor:
    """A new tensor of some elements of arrays that lie behind one another."""
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return torch.tensor(whole[slice(*part)])
