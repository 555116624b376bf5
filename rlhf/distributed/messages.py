"""Messages between processes: trees of NumPy arrays, which Ray keeps in shared memory, and plain values."""

import pickle
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.distributed.partition import Range
from rlhf.errors import UserError
from rlhf.execution.shard import Shard, init_shard
from rlhf.io.user_functions import users_modules
from rlhf.optim import Optimizer
from rlhf.tree import leaves, realign, tree_map
from rlhf.types import Tree


class ShardState(NamedTuple):
    """Copy of a shard, as arrays."""

    start: int
    """First element of the range of the shard."""
    params: np.ndarray
    """[n] float32: parameters of the range."""
    opt_state: list[np.ndarray] | None
    """Leaves [n] of the optimiser's state, or [] for counters. None stands for the initial state."""


def to_numpy(tree: Tree) -> Any:
    """Return every leaf as an array, without a copy if it is on the CPU. Leaves that share memory share an array."""
    seen: dict[Any, np.ndarray] = {}

    def convert(leaf: Tensor) -> np.ndarray:
        key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
        if key not in seen:
            seen[key] = leaf.detach().cpu().numpy()
        return seen[key]

    return tree_map(convert, tree)


def from_numpy(tree: Any, device: torch.device, *, copy: bool = False) -> Tree:
    """Return every array as a tensor, which on the CPU is a view unless `copy` is set or the array is not aligned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes to it
        return realign(
            tree_map(
                lambda array: (torch.tensor(array) if copy else torch.from_numpy(np.asarray(array))).to(device), tree
            )
        )


def copy_arrays(tree: Any) -> Any:
    """Return a tree whose arrays are copies in the memory of this process. Other leaves are unchanged."""
    return tree_map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, tree)


def write_shard(shard: Shard) -> ShardState:
    """Return the buffers of a shard as arrays."""
    return ShardState(shard.start, to_numpy(shard.params), [to_numpy(leaf) for leaf in leaves(shard.opt_state)])


def read_shard(
    states: Sequence[ShardState], optimizer: Optimizer, elements: Range, version: int, device: torch.device
) -> Shard:
    """Return the shard of a range of elements, from copies of shards of any ranges.

    Args:
        states: copies of shards, in order, which together make up the whole buffer.
        optimizer: optimiser of the state.
        elements: range of the shard.
        version: version of the state.
        device: device of the result.
    """
    shard = init_shard(read_params(states, elements).to(device), optimizer)
    for number, leaf in enumerate(leaves(shard.opt_state)):
        arrays = [state.opt_state[number] for state in states if state.opt_state is not None]
        if arrays:
            leaf.copy_(_read(arrays, elements) if leaf.ndim else torch.tensor(arrays[0]))
    return shard._replace(start=elements[0], version=version)


def read_params(states: Sequence[ShardState], elements: Range) -> Tensor:
    """Return a new tensor of a range of the whole parameter buffer, from copies of shards that make it up."""
    return _read([state.params for state in states], elements)


def _read(arrays: Sequence[np.ndarray], elements: Range) -> Tensor:
    """Return a new tensor of a range of elements of the concatenated arrays."""
    whole = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    return torch.tensor(whole[slice(*elements)])


def pickle_by_value(program: Any) -> bytes:
    """Return the pickle of functions and values, in which functions of users' files are whole.

    Raises:
        UserError: the functions refer to something that cannot be sent.
    """
    from ray import cloudpickle

    for module in users_modules():
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(program))
    except (TypeError, pickle.PicklingError) as error:
        raise UserError(f"a function of the program cannot be sent to the workers: {error}") from error
