"""One process of the parameter server, which computes on micro-batches, owns a shard of the state, or both.

This is plain Python code around pure functions, independent of Ray; `rlhf.distributed.cluster` makes an actor of it.
Arguments and results are NumPy arrays and plain values.

An optimiser step is one call on every member, in which all members run

    sum_gradients   each worker sums the gradients of its micro-batches, subtree by subtree
    reduce          each owner of a shard receives its range of the sums of all subtrees and adds them in tree order
    decide          all members gather losses, counts and squared norms, and make the same decision about the update
    publish         each owner updates its shard and sends its parameters to all workers

Sums and parameters take the routes of `rlhf.distributed.routes`.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.distributed.collectives import Group, GroupError, RankInfo, connect_store, local_address
from rlhf.distributed.exchange import BackendExchange
from rlhf.distributed.messages import ShardState, from_numpy, read_params, read_shard, to_numpy, write_shard
from rlhf.distributed.partition import SUBTREES, Range, join_sums, joint_subtrees, shard_ranges
from rlhf.distributed.routes import find_routes
from rlhf.execution.frozen import FrozenModels
from rlhf.execution.gradients import make_gradients
from rlhf.execution.memory import keep_freed_memory, peak_bytes
from rlhf.execution.program import Program, StepSpec
from rlhf.execution.shard import Shard, apply, slice_shard
from rlhf.execution.update import Update, clip_models, plan_update, sums_of_results
from rlhf.tree import CHUNK, FlatLayout, all_finite, chunked_squared_norms, to_device, tree_sum, unflatten
from rlhf.types import Tree


class Worker:
    """State of a process, and the methods that the driver calls."""

    def __init__(self, *, device: str, threads: int, backend: str, timeout_s: float) -> None:
        """Initialise a process without a program.

        Args:
            device: device that holds the state and runs the functions.
            threads: number of CPU threads.
            backend: backend of the `rlhf.distributed.collectives.Group`.
            timeout_s: time-out of every operation of the group, in seconds.
        """
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._device, self._threads = torch.device(device), threads
        self._backend, self._timeout_s = backend, timeout_s
        self._store: Any = None
        self._group: Group | None = None
        self._shard: Shard | None = None

    def load(self, make_program: Callable[[], Program], layout: FlatLayout, frozen: dict[str, Tree]) -> None:
        """Load a program and its frozen models. `restore` loads the parameters.

        Args:
            make_program: function that returns the program.
            layout: layout of the parameters.
            frozen: frozen models by name, as arrays, which are not copied on the CPU.
        """
        torch.set_num_threads(self._threads)
        self._program, self._layout = make_program(), layout
        self._frozen = FrozenModels(self._program, from_numpy(frozen, self._device))
        self._gradients = make_gradients(self._program, layout)

    def join(self, rank_info: RankInfo, host: str, port: int) -> None:
        """Form a new generation with the other members.

        Raises:
            GroupError: the other members did not join in time.
        """
        self.leave()
        self._store = self._store or connect_store(host, port, self._timeout_s)
        self._group = Group(
            self._store,
            rank_info,
            backend=self._backend,
            timeout_s=self._timeout_s,
            device=self._device,
            capacity=SUBTREES * 4 * self._layout.size,  # of `reduce`
            address=local_address(host, port),
        )
        self._rank_info, self._computes = rank_info, rank_info.rank < rank_info.workers
        self._ranges = dict(zip(rank_info.owners, shard_ranges(self._layout.size, len(rank_info.owners)), strict=True))
        self._routes = find_routes(rank_info, self._ranges)
        self._sums: dict[Range, Tensor] = {}

    def leave(self) -> None:
        """Close the connections to the other members."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def restore(self, version: int, frozen: dict[str, Tree], *states: ShardState) -> None:
        """Load a copy of the whole state. Each owner loads its range, and each worker loads the parameters.

        Args:
            version: version of the state.
            frozen: master parameters of updated frozen models.
            *states: shards in order, which together make up the whole buffer.
        """
        self._version, self._updating, self._shard = version, False, None
        self._frozen.replace(from_numpy(frozen, self._device))
        if self._computes:
            self._flat = read_params(states, (0, self._layout.size)).to(self._device)
            self._params = unflatten(self._flat, self._layout)  # views: every update is visible in them
        if self._rank_info.rank in self._ranges:
            elements = self._ranges[self._rank_info.rank]
            shard = read_shard(states, self._program.optimizer, elements, version, self._device)
            self._shard = shard._replace(params=self._flat[slice(*elements)]) if self._computes else shard
            self._gradient = torch.empty_like(shard.params)

    def map(self, name: str, version: int, batch: Any) -> Any:
        """Return the result of `program.eval_fns[name]` for one micro-batch, with the parameters of a version."""
        self._check(version)
        with torch.no_grad():
            result = self._program.eval_fns[name](self._params, self._frozen.prepared, self._batch(batch))
        return to_numpy(result)

    def step(
        self,
        name: str,
        version: int,
        assignment: Sequence[Range],
        mode: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
    ) -> tuple[list[Any], Update]:
        """Apply one optimiser step together with all other members. A refused step changes nothing.

        Args:
            name: name of the step in the program.
            version: version of the parameters before the step.
            assignment: range of micro-batches of each member, by rank.
            mode: tree, or ring for the backend's own allreduce.
            batches: micro-batches of this member.
            learning_rate: learning rate of this step. None uses the optimiser's schedule.

        Returns:
            (loss sum, metric sums) of each micro-batch of this member, and the decision of all members.

        Raises:
            GroupError: a member has failed. The state cannot be used until `restore`.
        """
        self._check(version)
        spec = self._program.steps[name]
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.leave)  # so that no member waits for this process
            results = self.sum_gradients(name, assignment, batches)
            self.reduce(assignment, mode)
            update = self.decide(results, assignment, spec)
            if update.is_finite and update.within_limit:
                self._updating = True  # a failure from here on leaves parts of two versions
                if self._shard is not None:
                    clip_models(self._gradient, update, self._layout, start=self._shard.start)
                    slices = slice_shard(self._shard, self._gradient, spec.optimizer, self._layout)
                    self._shard = apply(self._shard, version, slices, update.scale, spec.optimizer, learning_rate)
                self.publish()
                self._version, self._updating = version + 1, False
            on_error.pop_all()
        return [to_numpy(result) for result in results], update

    def sum_gradients(self, name: str, assignment: Sequence[Range], batches: Sequence[Any]) -> list[Any]:
        """Sum the gradients of this member's micro-batches by subtree, and return the results of its micro-batches."""
        first, results = assignment[self._rank_info.rank][0], []

        def gradient(batch: Any) -> Tensor:
            flat, result = self._gradients[name](self._params, self._frozen.prepared, self._batch(batch))
            results.append(result)
            return flat

        self._sums = {
            (start, end): tree_sum(map(gradient, batches[start - first : end - first]), add=Tensor.add_)
            for start, end in joint_subtrees(assignment, [self._rank_info.rank])
        }
        return results

    def reduce(self, assignment: Sequence[Range], mode: str) -> None:
        """Sum the gradients of all micro-batches. Each owner receives the sum of its range."""
        if mode == "ring":
            self._reduce_ring()
        else:
            self._reduce_tree(assignment)
        self._sums = {}

    def decide(self, results: Sequence[Any], assignment: Sequence[Range], spec: StepSpec) -> Update:
        """Gather losses, counts and squared norms from all members, and return the decision about the update."""
        squares = chunked_squared_norms(self._gradient).cpu() if self._shard is not None else torch.zeros(0).double()
        vector = torch.cat([sums_of_results(results, spec).flatten(), squares]).to(self._device)
        rows = [3 * (stop - start) for start, stop in assignment]
        ranges = [self._ranges.get(rank, (0, 0)) for rank in range(self._rank_info.size)]
        sizes = [count + (high - low) // CHUNK for count, (low, high) in zip(rows, ranges, strict=True)]
        parts = [part.cpu() for part in self._group_now().all_gather(vector, sizes)]
        table = torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)]).reshape(-1, 3)
        squares = torch.cat([part[count:] for part, count in zip(parts, rows, strict=True)])
        return plan_update(table, squares, spec, self._layout)

    def publish(self) -> None:
        """Send this member's range of the parameters to all workers, and receive the other ranges."""
        me, group, routes = self._rank_info.rank, self._group_now(), self._routes
        known = {owner: self._flat[part] for owner, part in routes.delegated.items() if owner != me}
        receives = list(known.items())
        if self._shard is not None:
            known[me] = self._shard.params
        group.exchange([(delegate, known[me]) for delegate in routes.far], receives).finish()
        sends = [(rank, known[owner]) for owner in routes.delegated for rank in routes.neighbours]
        others = routes.others.items() if self._computes else ()
        group.exchange_within(sends, [(routes.delegates[owner], self._flat[part]) for owner, part in others]).finish()

    def is_batch_finite(self, name: str, batch: Any) -> bool:
        """Return True if loss, metrics and gradient of a micro-batch are finite."""
        return all_finite(self._gradients[name](self._params, self._frozen.prepared, self._batch(batch)))

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by the result of `program.frozen_updates[name]` on it and the parameters."""
        self._frozen.update(name, self._params)

    def reset_optimizer(self) -> None:
        """Reset the optimiser's state to its initial value."""
        if self._shard is not None:
            self._shard = self._shard._replace(opt_state=self._program.optimizer.init(self._shard.params))

    def snapshot(self, version: int) -> ShardState | None:
        """Return a copy of this member's shard at a version, or None if it has no shard."""
        self._check(version)
        return None if self._shard is None else write_shard(self._shard)

    def frozen_masters(self, version: int) -> dict[str, Any]:
        """Return the master parameters of updated frozen models, at a version."""
        self._check(version)
        return {name: to_numpy(model) for name, model in self._frozen.masters.items()}

    def params(self, version: int) -> np.ndarray:
        """Return all parameters at a version, flat, [n] float32."""
        self._check(version)
        return to_numpy(self._flat)

    def peak_bytes(self) -> int:
        """Return the peak memory of this process, including the shared memory that it has read."""
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

    def _reduce_tree(self, assignment: Sequence[Range]) -> None:
        """Exchange the sums of subtrees within the machine, then those of machines with the owners, and add them up."""
        me, group, routes, flats = self._rank_info.rank, self._group_now(), self._routes, self._sums.values()
        sends = [(routes.delegates[owner], flat[part]) for flat in flats for owner, part in routes.others.items()]
        near = {subtree: rank for rank in routes.neighbours for subtree in joint_subtrees(assignment, [rank])}
        sizes = [part.stop - part.start for part in routes.delegated.values()]
        within = group.exchange_within(sends, [(rank, size) for rank in near.values() for size in sizes])
        arrived, sums = within.arrived(), dict[int, dict[Range, Tensor]]()
        for number, (owner, part) in enumerate(routes.delegated.items()):
            sums[owner] = {subtree: flat[part] for subtree, flat in self._sums.items()}
            sums[owner].update(zip(near, arrived[number :: len(sizes)], strict=True))
        subtrees = joint_subtrees(assignment, routes.workers)
        sends = [(owner, join_sums(sums[owner], subtree)) for owner in sums if owner != me for subtree in subtrees]
        far = {subtree: rank for rank, them in routes.far.items() for subtree in joint_subtrees(assignment, them)}
        between = group.exchange(sends, [(rank, len(self._gradient)) for rank in far.values()])
        if self._shard is not None:
            self.add_up(between, sums[me], tuple(far))
        between.finish()
        within.finish()

    def add_up(self, exchange: BackendExchange, sums: Mapping[Range, Tensor], far: Sequence[Range]) -> None:
        """Sum the gradient of this member's shard, segment by segment as other machines' sums arrive.

        Args:
            exchange: exchange of the sums.
            sums: sum of each subtree of this machine.
            far: subtree of each received tensor.
        """
        whole = 0, max(stop for _, stop in (*sums, *far))
        for segment, arrived in exchange.segments(len(self._gradient)):
            known = {subtree: flat[segment] for subtree, flat in sums.items()}
            join_sums(known | dict(zip(far, arrived, strict=True)), whole, out=self._gradient[segment])

    def _reduce_ring(self) -> None:
        sums = list(self._sums.values())
        total = tree_sum(sums, add=Tensor.add_) if sums else torch.zeros(self._layout.size, device=self._device)
        self._group_now().all_reduce(total)
        if self._shard is not None:
            self._gradient.copy_(total[slice(*self._ranges[self._rank_info.rank])])
