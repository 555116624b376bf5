"""The executor whose micro-batches run on Ray workers: who does what, and what happens when one of them is lost.

The driver holds no parameters. It deals the work, and remembers what was done since the last snapshot. So whatever is
lost, and whenever, there is one remedy: a new generation restores the snapshot and does the rest again, to the same
bits.
"""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf.distributed.cluster import Cluster, Member
from rlhf.distributed.collectives import RankInfo
from rlhf.distributed.messages import ShardState, copy_arrays, from_numpy, read_shard, to_numpy
from rlhf.distributed.partition import assign_micro_batches
from rlhf.distributed.ray_calls import LostError, RayLostError
from rlhf.execution.executor import Fault, LocalExecutor, copy_state, named_state
from rlhf.execution.program import ModelState, Program
from rlhf.execution.update import nonfinite_error, step_metrics
from rlhf.tree import flat_layout, flatten, leaves, tree_map, unflatten
from rlhf.types import Params, Tree

_CPU = torch.device("cpu")

_Result = TypeVar("_Result")


class _Snapshot(NamedTuple):
    """A copy of the whole state in the driver's memory, which outlives all other processes and machines."""

    version: int
    state: list[ShardState]
    """In order."""
    blended: Any
    """The frozen models that change, as arrays."""


class RayExecutor:
    """Micro-batches on Ray workers, parameters on a sharded server; the bits are those of `LocalExecutor`."""

    def __init__(
        self, cluster: Cluster, make_program: Callable[[], Program], models: ModelState, tell: Callable[[str], None]
    ) -> None:
        """Start the processes.

        Args:
            cluster: with room for them.
            make_program: an importable function, or a partial of one.
            models: shared with the processes of this machine without a copy for each.
            tell: gets one line for the user whenever something goes wrong.

        Raises:
            ValueError: an optimiser needs whole leaves.
        """
        self._cluster, self._dist, self._tell = cluster, cluster.dist, tell
        self._program, self._models, self._layout = make_program(), models, flat_layout(models.params)
        self._program.check_optimizers()
        self._load_arguments = (make_program, self._layout, cluster.put(to_numpy(models.frozen)))
        self._version = self._generation = self._restarts = 0
        self._faults: list[Fault] = []
        self._done: list[tuple[str, tuple[Any, ...]]] = []  # methods called since the snapshot that changed the state
        self._local: LocalExecutor | None = None  # takes over when no restart is left
        start = ShardState(0, flatten(models.params, self._layout).numpy(), None)
        self._snapshot = _Snapshot(0, [start], {})
        workers, servers = self._dist.num_workers, self._dist.num_servers
        self._workers = [self._start(f"worker {number}", number) for number in range(workers)]
        self._servers = [self._start(f"server {number}", workers + number) for number in range(servers)]
        self._try(self._form, lambda local: None)

    @property
    def version(self) -> int:
        """Optimiser steps applied since the beginning of the run: the version of the parameters."""
        return self._local.version if self._local else self._version

    @property
    def compiled(self) -> bool:
        """Whether its steps run as compiled code."""
        return self._program.compile_to is not None

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """See `Executor.map`: whoever is free gets the next micro-batch."""
        results: dict[int, Tree] = {}  # kept when a worker is lost
        return self._try(lambda: self._map(name, batches, results), lambda local: local.map(name, batches))

    def step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
        *,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """See `Executor.step`."""
        metrics: dict[str, float] = self._change("step", name, batches, learning_rate, overlap=overlap)
        return metrics

    def update_frozen(self, name: str) -> None:
        """See `Executor.update_frozen`."""
        self._change("update_frozen", name)

    def reset_optimizer(self) -> None:
        """See `Executor.reset_optimizer`."""
        self._change("reset_optimizer")

    def params(self) -> Params:
        """See `Executor.params`."""

        def read() -> Params:
            (flat,) = self._call(self._workers[:1], "params", self._version)
            return unflatten(from_numpy(flat, _CPU), self._layout)

        return self._try(read, LocalExecutor.params)

    def snapshot(self) -> dict[str, Tensor]:
        """See `Executor.snapshot`."""

        def read() -> dict[str, Tensor]:
            *state, blended = self._collect(self._copies())
            return self._named(state, blended)

        return self._try(read, LocalExecutor.snapshot)

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """See `Executor.restore`."""
        params = flatten(self._models.params, self._layout)
        opt_state = self._program.optimizer.init(params)
        blended = {name: tree_map(torch.clone, self._models.frozen[name]) for name in self._program.frozen_updates}
        copy_state(named_state(params, opt_state, blended, self._layout), state)
        whole = ShardState(0, params.numpy(), [leaf.numpy() for leaf in leaves(opt_state)])
        self._snapshot = _Snapshot(version, [whole], to_numpy(blended))
        self._done = []
        self._try(self._load_snapshot, lambda local: local.restore(state, version))

    def peak_bytes(self) -> int:
        """See `Executor.peak_bytes`."""
        return self._try(lambda: max(self._call(self._members, "peak_bytes")), LocalExecutor.peak_bytes)

    def faults(self) -> list[Fault]:
        """See `Executor.faults`."""
        faults, self._faults = self._faults, []
        return faults

    def close(self) -> None:
        """End all processes."""
        self._cluster.kill(self._members)

    @property
    def _members(self) -> list[Member]:
        """In the order of their ranks."""
        return self._workers + self._servers

    def _try(self, work: Callable[[], _Result], take_over: Callable[[LocalExecutor], _Result]) -> _Result:
        """Do something again until no process is lost in it, or else in this process."""
        while not self._local:
            try:
                return work()
            except LostError as lost:
                self._recover(lost)
        return take_over(self._local)

    def _change(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Change the state, and remember how until the next snapshot; options have no part in it."""
        result = self._try(
            lambda: self._do(method, *arguments, **options), lambda local: getattr(local, method)(*arguments)
        )
        if not self._local:
            self._done.append((method, arguments))
            if len(self._done) >= self._dist.snapshot_every:
                self._try(self._take_snapshot, lambda local: None)
        return result

    def _do(self, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "step":
            return self._step(*arguments, **options)
        return self._call(self._workers if method == "update_frozen" else self._members, method, *arguments)

    def _step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        shares = assign_micro_batches(len(batches), len(self._workers)) + ((len(batches),) * 2,) * len(self._servers)
        arrays, mode = [to_numpy(batch) for batch in batches], self._dist.reduce
        calls = [
            (
                member,
                self._cluster.call(
                    member, "step", name, self._version, shares, mode, arrays[slice(*share)], learning_rate
                ),
            )
            for member, share in zip(self._members, shares, strict=True)
        ]
        overlap()
        answers = self._collect(calls)
        update = answers[0][1]
        results = [from_numpy(result, _CPU, copy=True) for of_member, _ in answers for result in of_member]

        def is_finite(batch: Any) -> bool:
            return self._call(self._workers[:1], "is_finite", name, to_numpy(batch))[0]

        if not update.is_finite:
            raise nonfinite_error(name, batches, results, update, is_finite)
        self._version += update.within_limit
        return step_metrics(results, update)

    def _map(self, name: str, batches: Sequence[Any], results: dict[int, Tree]) -> list[Tree]:
        waiting = collections.deque(number for number in range(len(batches)) if number not in results)
        calls: dict[Any, Member] = {}
        dealt: dict[Any, tuple[int, Member]] = {}

        def hand_out(member: Member) -> None:
            if waiting:
                number = waiting.popleft()
                call = self._cluster.call(member, "map", name, self._version, to_numpy(batches[number]))
                calls[call], dealt[call] = member, (number, member)

        for member in self._workers:
            hand_out(member)
        for call, result in self._cluster.results(calls):
            number, member = dealt[call]
            results[number] = from_numpy(result, _CPU, copy=True)
            hand_out(member)
        return [results[number] for number in range(len(batches))]

    def _call(self, members: Sequence[Member], method: str, *arguments: Any) -> list[Any]:
        """Call a method of several members with the same arguments; their results."""
        return self._collect([(member, self._cluster.call(member, method, *arguments)) for member in members])

    def _collect(self, calls: Sequence[tuple[Member, Any]]) -> list[Any]:
        results = dict(self._cluster.results({call: member for member, call in calls}))
        return [results[call] for _, call in calls]

    def _copies(self) -> list[tuple[Member, Any]]:
        """Ask all owners for copies of their shards, and a worker for the frozen models that change."""
        call, version = self._cluster.call, self._version
        copies = [(member, call(member, "snapshot", version)) for member in self._servers or self._workers]
        return [*copies, (self._workers[0], call(self._workers[0], "blended", version))]

    def _take_snapshot(self) -> None:
        *state, blended = self._collect(self._copies())
        self._snapshot, self._done = _Snapshot(self._version, copy_arrays(state), copy_arrays(blended)), []

    def _recover(self, lost: LostError) -> None:
        """Bring the processes back to the present version, or let this one take over when no restart is left."""
        begun, what = time.monotonic(), str(lost)
        while not self._local:
            self._restarts += 1
            if isinstance(lost, RayLostError):
                what = str(lost)
                self._take_over(abandon=True)
                break
            if self._restarts > self._dist.max_restarts:
                what += f"; {self._dist.max_restarts} faults were made good, and no more are allowed"
                self._take_over()
                break
            try:
                self._mend(lost.members)
                break
            except LostError as again:
                lost = again
        fault = Fault(what, time.monotonic() - begun, final=self._local is not None)
        self._faults.append(fault)
        how = "going on in this process" if fault.final else "going on"
        self._tell(f"lost {fault.what}; {how} after {fault.recovery_s:.1f} s")

    def _mend(self, lost: Sequence[Member]) -> None:
        """Form a new generation without the lost members, or with others in their places."""
        self._cluster.kill(lost)
        alive = [member for member in self._workers if member not in lost]
        if self._dist.on_failure == "shrink" and alive:
            self._workers = alive
        missing = [member for member in self._members if member in lost]
        roomy = self._cluster.find_room(missing) if missing else []
        if left_out := [member.name for member in missing if member not in roomy]:
            self._tell(f"no machine has room for {', '.join(left_out)}: going on without")
        self._workers, self._servers = (
            [
                self._start(member.name, member.bundle) if member in roomy else member
                for member in members
                if member in roomy or member not in missing
            ]
            for members in (self._workers, self._servers)
        )
        if not self._workers:
            raise RayLostError("all workers (no machine has room for one)")
        self._form()

    def _start(self, name: str, bundle: int) -> Member:
        return self._cluster.start(name, bundle, *self._load_arguments)

    def _form(self) -> None:
        """Let all members form the next generation, and bring it to the present version."""
        members = self._members
        self._collect([(member, member.loaded) for member in members])
        self._generation += 1
        places = [
            RankInfo(self._generation, rank, len(self._workers), len(self._servers)) for rank in range(len(members))
        ]
        store = (self._cluster.host, self._cluster.store.port)
        self._collect(
            [
                (member, self._cluster.call(member, "join", place, *store))
                for member, place in zip(members, places, strict=True)
            ]
        )
        self._load_snapshot()

    def _load_snapshot(self) -> None:
        """Bring all members to the last snapshot, and do again what was done since."""
        self._version = self._snapshot.version
        put = self._cluster.put
        copies = [put(self._snapshot.blended), *map(put, self._snapshot.state)]
        self._call(self._members, "restore", self._version, *copies)
        for method, arguments in self._done:
            self._do(method, *arguments)

    def _take_over(self, *, abandon: bool = False) -> None:
        """Do the rest in this process; `abandon` makes no call of Ray any more."""
        (self._cluster.abandon if abandon else self._cluster.kill)(self._members)
        self._workers, self._servers = [], []
        local = LocalExecutor(self._program, self._models, _CPU)
        local.restore(self._named(self._snapshot.state, self._snapshot.blended), self._snapshot.version)
        for method, arguments in self._done:
            getattr(local, method)(*arguments)
        self._local = local

    def _named(self, state: Sequence[ShardState], blended: dict[str, Any]) -> dict[str, Tensor]:
        """A snapshot as `Executor.snapshot` gives it."""
        shard = read_shard(state, self._program.optimizer, (0, self._layout.size), 0, _CPU)
        frozen = {name: self._models.frozen[name] for name in self._program.frozen_updates} | from_numpy(blended, _CPU)
        return named_state(shard.params, shard.opt_state, frozen, self._layout)
