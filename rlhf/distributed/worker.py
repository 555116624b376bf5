"""One process of the parameter server: it computes on micro-batches, owns a shard of the state, or both.

Plain Python around pure functions: it does not know who calls its methods (`rlhf.distributed.cluster` makes a Ray
actor of it), and can be driven by hand. What goes in and out is NumPy arrays and plain values.

An optimiser step is one call on every member, in which they go together through

    sum_gradients   each worker sums the gradients of its micro-batches, subtree by subtree
    reduce          every shard's owner receives its range of all subtrees' sums and adds them up in the tree's order
    decide          all learn losses, counts and square sums, and come to the same decision about the update
    publish         every owner, having updated its shard, sends its parameters to all workers
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.distributed.collectives import Group, GroupError, RankInfo, connect_store
from rlhf.distributed.exchange import Exchange
from rlhf.distributed.messages import ShardState, from_numpy, read_params, read_shard, to_numpy, write_shard
from rlhf.distributed.partition import SUBTREES, Range, join_sums, shard_ranges, subtrees
from rlhf.execution.frozen import FrozenModels
from rlhf.execution.gradients import make_gradients
from rlhf.execution.memory import keep_freed_memory, peak_bytes
from rlhf.execution.program import Program, StepSpec
from rlhf.execution.shard import Shard, apply, slice_shard
from rlhf.execution.update import Update, plan_update, sums_of_results
from rlhf.tree import CHUNK, FlatLayout, all_finite, chunked_squared_norms, to_device, tree_sum, unflatten
from rlhf.types import Tree


class Worker:
    """A process's state and what it can be told to do."""

    def __init__(self, *, device: str, threads: int, backend: str, timeout_s: float) -> None:
        """Args: the device that everything lives on; CPU threads; the group's backend, and its operations' limit."""
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._device, self._threads = torch.device(device), threads
        self._backend, self._timeout_s = backend, timeout_s
        self._store: Any = None
        self._group: Group | None = None
        self._shard: Shard | None = None

    def load(self, make_program: Callable[[], Program], layout: FlatLayout, frozen: dict[str, Tree]) -> None:
        """Take up a program; its models' arrays are read where they lie, on the CPU. `restore` brings the parameters.

        Args:
            make_program: of the program.
            layout: of the parameters.
            frozen: models by name, as arrays.
        """
        torch.set_num_threads(self._threads)
        self._program, self._layout = make_program(), layout
        self._frozen = FrozenModels(self._program, from_numpy(frozen, self._device))
        self._gradients = make_gradients(self._program, layout)

    def join(self, place: RankInfo, host: str, port: int) -> None:
        """Form a new generation with the other members.

        Raises:
            GroupError: they did not come in time.
        """
        self.leave()
        self._store = self._store or connect_store(host, port, self._timeout_s)
        self._group = Group(
            self._store,
            place,
            backend=self._backend,
            timeout_s=self._timeout_s,
            device=self._device,
            capacity=SUBTREES * 4 * self._layout.size,  # what `reduce` may send
        )
        self._place, self._computes = place, place.rank < place.workers
        self._ranges = dict(zip(place.owners, shard_ranges(self._layout.size, len(place.owners)), strict=True))
        self._sums: dict[Range, Tensor] = {}

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
        self._version, self._updating, self._shard = version, False, None
        self._frozen.replace(from_numpy(blended, self._device))
        if self._computes:
            self._flat = read_params(state, (0, self._layout.size)).to(self._device)
            self._params = unflatten(self._flat, self._layout)  # views: every update shows in them
        if self._place.rank in self._ranges:
            own = self._ranges[self._place.rank]
            shard = read_shard(state, self._program.optimizer, own, version, self._device)
            self._shard = shard._replace(params=self._flat[slice(*own)]) if self._computes else shard
            self._gradient = torch.empty_like(shard.params)

    def map(self, name: str, version: int, batch: Any) -> Any:
        """`program.eval_fns[name]` of one micro-batch, at the parameters of that version."""
        self._check(version)
        with torch.no_grad():
            result = self._program.eval_fns[name](self._params, self._frozen.prepared, self._batch(batch))
        return to_numpy(result)

    def step(
        self,
        name: str,
        version: int,
        shares: Sequence[Range],
        mode: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
    ) -> tuple[list[Any], Update]:
        """One optimiser step, together with all other members; nothing is applied where it is refused.

        Args:
            name: of the program's step.
            version: of the parameters, before it.
            shares: the micro-batches of every member, by rank.
            mode: tree, or ring for the backend's own allreduce.
            batches: the own share.
            learning_rate: of `rlhf.execution.executor.Executor.step`.

        Returns:
            (loss sum, metric sums) of each own micro-batch, and the decision that all have come to.

        Raises:
            GroupError: a member has failed; the state is that of no version until `restore`.
        """
        self._check(version)
        spec = self._program.steps[name]
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.leave)  # so that nobody waits for this process
            results = self.sum_gradients(name, shares, batches)
            self.reduce(shares, mode)
            update = self.decide(results, shares, spec)
            if update.is_finite and update.within_limit:
                self._updating = True  # whoever fails before the end has parts of two versions
                if self._shard is not None:
                    slices = slice_shard(self._shard, self._gradient, spec.optimizer, self._layout)
                    self._shard = apply(self._shard, version, slices, update.scale, spec.optimizer, learning_rate)
                self.publish()
                self._version, self._updating = version + 1, False
            on_error.pop_all()
        return [to_numpy(result) for result in results], update

    def sum_gradients(self, name: str, shares: Sequence[Range], batches: Sequence[Any]) -> list[Any]:
        """Sum the gradients of the own micro-batches, subtree by subtree; arguments and result as `step`'s."""
        (first, stop), results = shares[self._place.rank], []

        def gradient(batch: Any) -> Tensor:
            flat, result = self._gradients[name](self._params, self._frozen.prepared, self._batch(batch))
            results.append(result)
            return flat

        self._sums = {
            (start, end): tree_sum(map(gradient, batches[start - first : end - first]), add=Tensor.add_)
            for start, end in subtrees(first, stop, _total(shares))
        }
        return results

    def reduce(self, shares: Sequence[Range], mode: str) -> None:
        """Add up the gradient of all micro-batches, each owner its range; arguments as `step`'s."""
        if mode == "ring":
            self._reduce_ring()
        else:
            self._reduce_tree(shares)
        self._sums = {}

    def decide(self, results: Sequence[Any], shares: Sequence[Range], spec: StepSpec) -> Update:
        """Tell all members what one knows of the update, and come to the same decision."""
        squares = chunked_squared_norms(self._gradient).cpu() if self._shard is not None else torch.zeros(0).double()
        own = torch.cat([sums_of_results(results, spec).flatten(), squares]).to(self._device)
        rows = [3 * (stop - start) for start, stop in shares]
        ranges = [self._ranges.get(rank, (0, 0)) for rank in range(self._place.size)]
        sizes = [count + (high - low) // CHUNK for count, (low, high) in zip(rows, ranges, strict=True)]
        parts = [part.cpu() for part in self._group_now().all_gather(own, sizes)]
        table = torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)]).reshape(-1, 3)
        squares = torch.cat([part[count:] for part, count in zip(parts, rows, strict=True)])
        return plan_update(table, squares, spec)

    def publish(self) -> None:
        """Every owner sends its range of the parameters to all workers."""
        me, sends, receives = self._place.rank, [], []
        if self._shard is not None:
            sends = [(rank, self._shard.params) for rank in range(self._place.workers) if rank != me]
        if self._computes:
            receives = [(owner, self._flat[slice(*part)]) for owner, part in self._ranges.items() if owner != me]
        self._group_now().exchange(sends, receives).finish()

    def is_finite(self, name: str, batch: Any) -> bool:
        """Whether loss, metrics and gradient of a micro-batch are finite."""
        return all_finite(self._gradients[name](self._params, self._frozen.prepared, self._batch(batch)))

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by `program.frozen_updates[name]` of it and the parameters."""
        self._frozen.update(name, self._params)

    def reset_optimizer(self) -> None:
        """Start the optimiser's state anew."""
        if self._shard is not None:
            self._shard = self._shard._replace(opt_state=self._program.optimizer.init(self._shard.params))

    def snapshot(self, version: int) -> ShardState | None:
        """A copy of the own shard, at that version."""
        self._check(version)
        return None if self._shard is None else write_shard(self._shard)

    def blended(self, version: int) -> dict[str, Any]:
        """The frozen models that change, at that version."""
        self._check(version)
        return {name: to_numpy(model) for name, model in self._frozen.masters.items()}

    def params(self, version: int) -> np.ndarray:
        """[n] float32: all parameters, flat, at that version."""
        self._check(version)
        return to_numpy(self._flat)

    def peak_bytes(self) -> int:
        """The most memory that this process ever held, with what it read of others' in memory that they share."""
        return peak_bytes(self._device)

    def _check(self, version: int) -> None:
        if self._updating or version != self._version:
            has = "parts of two" if self._updating else self._version
            raise GroupError(f"asked for version {version} of the parameters, but has {has}")

    def _batch(self, batch: Any) -> Any:
        return to_device(from_numpy(batch, torch.device("cpu"), copy=True), self._device)

    def _group_now(self) -> Group:
        if self._group is None:
            raise GroupError("the group was left after an error")
        return self._group

    def _reduce_tree(self, shares: Sequence[Range]) -> None:
        """An all-to-all, in which every owner adds up what arrives."""
        me, total = self._place.rank, _total(shares)
        parts = [(owner, slice(*part)) for owner, part in self._ranges.items() if owner != me]
        sends = [(owner, own[part]) for owner, part in parts for own in self._sums.values()]
        theirs: list[tuple[int, Range]] = []  # subtrees, and whose they are
        if self._shard is not None:
            theirs = [
                (rank, span) for rank, share in enumerate(shares) if rank != me for span in subtrees(*share, total)
            ]
        exchange = self._group_now().exchange(sends, [(rank, len(self._gradient)) for rank, _ in theirs])
        if self._shard is not None:
            self.add_up(exchange, [span for _, span in theirs], total)
        exchange.finish()

    def add_up(self, exchange: Exchange, spans: Sequence[Range], total: int) -> None:
        """Sum the own range, piece by piece as others' subtrees arrive.

        Args:
            exchange: on which they do.
            spans: the subtree that each tensor received is the sum of.
            total: micro-batches.
        """
        own_part = slice(*self._ranges[self._place.rank])
        for piece, arrived in exchange.segments(len(self._gradient)):
            own = {span: flat[own_part][piece] for span, flat in self._sums.items()}
            join_sums(own | dict(zip(spans, arrived, strict=True)), total, out=self._gradient[piece])

    def _reduce_ring(self) -> None:
        own = list(self._sums.values())
        total = tree_sum(own, add=Tensor.add_) if own else torch.zeros(self._layout.size, device=self._device)
        self._group_now().all_reduce(total)
        if self._shard is not None:
            self._gradient.copy_(total[slice(*self._ranges[self._place.rank])])


def _total(shares: Sequence[Range]) -> int:
    return max(stop for _, stop in shares)
