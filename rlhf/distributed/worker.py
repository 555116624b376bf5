"""One process of the parameter server: it computes on micro-batches, owns a shard of the state, or both.

Plain Python around pure functions: it does not know who calls its methods (`rlhf.distributed.cluster` makes a Ray
actor of it), and can be driven by hand. What goes in and out is NumPy arrays and plain values.

One optimiser step is three calls on every member, each a phase that all of them finish before the next begins:

    gradient   each worker sums the gradients of its micro-batches, subtree by subtree
    reduce     every shard's owner receives its range of all subtrees' sums and adds them up in the tree's order
    apply      every owner updates its shard, exactly once, and sends it to all workers, which swap it in at the end
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.distributed.collectives import Exchange, Group, Seat, connect_store
from rlhf.distributed.dealing import Span, join_sums, shard_ranges, subtrees
from rlhf.distributed.executor import Models, Program, make_gradients
from rlhf.distributed.memory import keep_freed_memory, peak_bytes
from rlhf.distributed.server import Shard, apply, init_shard, square_sums
from rlhf.optim import Optimizer
from rlhf.tree import all_finite, flat_layout, flatten, leaves, to_device, tree_map, tree_sum, unflatten
from rlhf.types import Tree

_SEGMENT = 1 << 20
"""Elements sent at once (4 MB): while one segment is added up, the next ones are on their way."""


class Place(NamedTuple):
    """What a process does in a group."""

    seat: Seat
    workers: int
    """Ranks 0..workers-1 compute."""
    owners: tuple[int, ...]
    """Rank of each shard's owner."""


class ShardState(NamedTuple):
    """A copy of a shard, as arrays."""

    start: int
    """First element."""
    params: np.ndarray
    """[n] float32."""
    opt_state: list[np.ndarray] | None
    """Leaves [n], or [] for counters; None is the optimiser's first state."""


class Worker:
    """A process's state and what it can be told to do."""

    def __init__(self, *, device: str, threads: int, backend: str, timeout_s: float) -> None:
        """Args: the device that everything lives on; CPU threads; gloo or nccl, and the limit of its operations."""
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._device, self._threads = torch.device(device), threads
        self._backend, self._timeout_s = backend, timeout_s
        self._store: Any = None
        self._group: Group | None = None

    def load(self, make_program: Callable[[], Program], models: Models) -> None:
        """Take up a program; its models' arrays are read where they lie, on the CPU."""
        torch.set_num_threads(self._threads)
        self._program = make_program()
        params: Tree = from_numpy(models.params, self._device)
        self._frozen: dict[str, Tree] = from_numpy(models.frozen, self._device)
        self._layout = flat_layout(params)
        self._use(flatten(params, self._layout))
        self._spare = torch.zeros_like(self._flat)
        self._gradients = make_gradients(self._program, self._layout)
        self._shard: Shard | None = None
        self._version = 0

    def join(self, place: Place, host: str, port: int) -> None:
        """Form a new generation with the other members.

        Raises:
            GroupError: they did not come in time.
        """
        self.leave()
        self._store = self._store or connect_store(host, port, self._timeout_s)
        self._group = Group(self._store, place.seat, backend=self._backend, timeout_s=self._timeout_s)
        self._place = place
        self._computes = place.seat.rank < place.workers
        self._ranges = shard_ranges(self._layout.size, len(place.owners))
        self._own = self._ranges[place.owners.index(place.seat.rank)] if place.seat.rank in place.owners else None
        self._sums: dict[Span, Tensor] = {}
        self._inbox: dict[tuple[int, Span], Tensor] = {}

    def leave(self) -> None:
        """Close the connections to the other members."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def restore(self, version: int, blended: dict[str, Tree], *state: ShardState) -> None:
        """Continue from a copy of the whole state: each owner takes its range, each worker the parameters.

        Args:
            version: of the state.
            blended: frozen models that have changed since the beginning.
            *state: shards in order that make up the whole buffer, cut in any way.
        """
        self._version = version
        self._use(_elements([part.params for part in state], slice(None)).to(self._device))
        self._frozen |= from_numpy(blended, self._device)
        if self._own is not None:
            self._shard = read_shard(state, self._program.optimizer, self._own, version, self._device)
            self._gradient = torch.empty_like(self._shard.params)
            if self._computes:  # its parameters are part of the worker's own
                self._shard = self._shard._replace(params=self._flat[slice(*self._own)])

    def map(self, name: str, version: int, batch: Any) -> Any:
        """`program.maps[name]` of one micro-batch, at the parameters of that version."""
        self._check(version)
        with torch.no_grad():
            result = self._program.maps[name](self._params, self._frozen, self._batch(batch))
        return to_numpy(result)

    def gradient(self, name: str, version: int, share: Span, total: int, batches: Sequence[Any]) -> list[Any]:
        """Sum the gradients of a share of the micro-batches, subtree by subtree, for `reduce`.

        Returns:
            (loss sum, metric sums) of each micro-batch.
        """
        self._check(version)
        results: list[Any] = []

        def gradient(batch: Any) -> Tensor:
            flat, result = self._gradients[name](self._params, self._frozen, self._batch(batch))
            results.append(to_numpy(result))
            return flat

        first = share[0]
        self._sums = {
            (start, stop): tree_sum(map(gradient, batches[start - first : stop - first]), donated=True)
            for start, stop in subtrees(*share, total)
        }
        return results

    def reduce(self, shares: Sequence[Span], mode: str) -> np.ndarray | None:
        """Add up the gradient of all micro-batches, each owner its range.

        Args:
            shares: of the workers, in the order of their ranks.
            mode: tree, or ring for the backend's own allreduce.

        Returns:
            The owner's square sums per chunk (`rlhf.distributed.server.square_sums`); None of who owns nothing.

        Raises:
            GroupError: a member has failed; the parameters are as they were.
        """
        if mode == "ring":
            self._reduce_ring()
        else:
            self._reduce_tree(shares)
        self._sums = {}
        return None if self._own is None else square_sums(self._gradient).cpu().numpy()

    def apply(self, name: str, step: int, scale: float) -> None:
        """Update the own shard with what `reduce` left there, and send it to all workers; `publish` follows.

        A shard that has applied the step already keeps it as it is.

        Raises:
            GroupError: see `publish`.
        """
        if self._shard is not None:
            optimizer = self._program.steps[name].optimizer
            out = self._spare[slice(*self._own)] if self._computes and self._own else None
            self._shard = apply(self._shard, step, self._gradient, scale, optimizer, self._layout, out=out)
        self.publish(step + 1)

    def publish(self, version: int) -> None:
        """Every owner sends its range of the parameters to all workers, which use them once they have all.

        Raises:
            GroupError: a member has failed; the worker's parameters are as they were.
        """
        me, sends, receives = self._group_now().seat.rank, [], []
        if self._computes and self._shard is not None and self._own is not None:
            spare = self._spare[slice(*self._own)]
            if self._shard.params.data_ptr() != spare.data_ptr():  # published again without a step between
                self._shard = self._shard._replace(params=spare.copy_(self._shard.params))
        for owner, (low, high) in zip(self._place.owners, self._ranges, strict=True):
            if owner == me and self._shard is not None:
                sends += [(rank, self._shard.params) for rank in range(self._place.workers) if rank != me]
            elif self._computes:
                receives.append((owner, self._spare[low:high]))
        exchange = self._group_now().exchange(sends, receives)
        for number in range(len(receives)):
            exchange.received(number)
        exchange.finish()
        if self._computes:
            spare = self._flat
            self._use(self._spare)
            self._spare = spare
        self._version = version

    def peak_bytes(self) -> int:
        """The most memory that this process ever held."""
        return peak_bytes(self._device)

    def is_finite(self, name: str, batch: Any) -> bool:
        """Whether loss, metrics and gradient of a micro-batch are finite."""
        return all_finite(self._gradients[name](self._params, self._frozen, self._batch(batch)))

    def blend(self, name: str) -> None:
        """Replace a frozen model by `program.blends[name]` of it and the parameters."""
        self._frozen[name] = self._program.blends[name](self._frozen[name], self._params)

    def reset_optimizer(self) -> None:
        """Start the optimiser's state anew."""
        if self._shard is not None:
            self._shard = self._shard._replace(opt_state=self._program.optimizer.init(self._shard.params))

    def snapshot(self) -> ShardState | None:
        """A copy of the own shard."""
        if self._shard is None:
            return None
        return ShardState(
            self._shard.start, to_numpy(self._shard.params), [to_numpy(leaf) for leaf in leaves(self._shard.opt_state)]
        )

    def blended(self) -> dict[str, Any]:
        """The frozen models that change."""
        return {name: to_numpy(self._frozen[name]) for name in self._program.blends}

    def params(self) -> np.ndarray:
        """[n] float32: all parameters, flat."""
        return to_numpy(self._flat)

    def _use(self, flat: Tensor) -> None:
        self._flat, self._params = flat, unflatten(flat, self._layout)

    def _check(self, version: int) -> None:
        if version != self._version:
            raise RuntimeError(f"asked for version {version} of the parameters, but has {self._version}")

    def _batch(self, batch: Any) -> Any:
        return to_device(from_numpy(batch, torch.device("cpu"), copy=True), self._device)

    def _group_now(self) -> Group:
        assert self._group is not None, "join comes first"
        return self._group

    def _reduce_tree(self, shares: Sequence[Span]) -> None:
        me, total = self._group_now().seat.rank, max(stop for _, stop in shares)
        spans = [subtrees(*share, total) for share in shares]
        if self._own is not None:
            buffers = list(self._inbox.values())
            self._inbox = {
                (rank, span): buffers.pop() if buffers else torch.empty_like(self._gradient)
                for rank, of_rank in enumerate(spans)
                for span in of_rank
                if rank != me
            }
        sends: list[tuple[int, Tensor]] = []
        receives: list[tuple[int, Tensor]] = []
        shards = list(zip(self._place.owners, self._ranges, strict=True))
        after_me = sorted(shards, key=lambda shard: (shard[0] <= me, shard[0]))  # not all to the same owner at once
        for offset in range(0, max(high - low for low, high in self._ranges), _SEGMENT):
            for owner, (low, high) in after_me:
                begin, end = low + offset, min(low + offset + _SEGMENT, high)
                if begin < end and owner != me:
                    sends += [(owner, self._sums[span][begin:end]) for span in self._sums]
                elif begin < end:
                    receives += [(rank, box[begin - low : end - low]) for (rank, _), box in self._inbox.items()]
        exchange = self._group_now().exchange(sends, receives)
        if self._own is not None:
            self._add_up(exchange, total, *self._own)
        exchange.finish()

    def _add_up(self, exchange: Exchange, total: int, low: int, high: int) -> None:
        """Sum the own range segment by segment, as the subtrees arrive."""
        sums = {span: self._sums[span][low:high] for span in self._sums}
        sums |= {span: box for (_, span), box in self._inbox.items()}
        for segment, offset in enumerate(range(0, high - low, _SEGMENT)):
            for number in range(len(self._inbox)):
                exchange.received(segment * len(self._inbox) + number)
            parts = {span: addend[offset : offset + _SEGMENT] for span, addend in sums.items()}
            _join_into(self._gradient[offset : offset + _SEGMENT], parts, total)

    def _reduce_ring(self) -> None:
        own = list(self._sums.values())
        total = tree_sum(own, donated=True) if own else torch.zeros(self._layout.size, device=self._device)
        self._group_now().all_reduce(total)
        if self._own is not None:
            self._gradient.copy_(total[slice(*self._own)])


def _join_into(out: Tensor, parts: dict[Span, Tensor], total: int) -> None:
    """`join_sums` of tensors that are no longer needed, without memory of its own."""
    left_to_do = len(parts) - 1

    def add(left: Tensor, right: Tensor) -> Tensor:
        nonlocal left_to_do
        left_to_do -= 1
        return torch.add(left, right, out=left if left_to_do else out)

    whole = join_sums(parts, total, add)
    if whole is not out:
        out.copy_(whole)


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
    """Every array as a tensor; on the CPU a view of it unless `copy`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # we do not write
        return tree_map(
            lambda array: (torch.tensor(array) if copy else torch.from_numpy(np.asarray(array))).to(device), tree
        )


def read_shard(
    state: Sequence[ShardState], optimizer: Optimizer, part: Span, version: int, device: torch.device
) -> Shard:
    """A shard from copies of shards that were cut in any way.

    Args:
        state: in order; together the whole buffer.
        optimizer: whose state it is.
        part: elements wanted.
        version: of the state.
        device: of the result.
    """
    low, high = part
    shard = init_shard(_elements([copy.params for copy in state], slice(low, high)).to(device), optimizer)
    for number, leaf in enumerate(leaves(shard.opt_state)):
        parts = [copy.opt_state[number] for copy in state if copy.opt_state is not None]
        if parts:
            leaf.copy_(_elements(parts, slice(low, high)) if leaf.ndim else torch.tensor(parts[0]))
    return shard._replace(start=low, version=version)


def _elements(parts: Sequence[np.ndarray], wanted: slice) -> Tensor:
    """A new tensor of some of the elements of arrays that lie behind one another."""
    return torch.from_numpy(np.concatenate(parts)[wanted] if len(parts) > 1 else parts[0][wanted].copy())
