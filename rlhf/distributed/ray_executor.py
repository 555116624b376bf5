"""The executor whose micro-batches run on Ray workers: who does what, and what happens when one of them is lost.

The driver holds no parameters. It deals the work, decides about each update from a few numbers, and remembers what
was done since the last snapshot; so any state can be had again, to the bit, by restoring that and repeating this.
"""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.distributed.cluster import Cluster, End, Member
from rlhf.distributed.collectives import Seat
from rlhf.distributed.dealing import deal
from rlhf.distributed.executor import (
    Fault,
    LocalExecutor,
    Models,
    Program,
    check_update,
    copy_state,
    named_state,
    plan_update,
)
from rlhf.distributed.worker import Place, ShardState, from_numpy, read_shard, to_numpy
from rlhf.errors import UserError
from rlhf.tree import flat_layout, flatten, leaves, tree_map, unflatten
from rlhf.types import Params, Tree

_CPU = torch.device("cpu")


class _LostError(Exception):
    """Processes died, or their group failed; caught by `_lasting`."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(", ".join(member.name for member in members) or "a collective timed out")
        self.members = list(members)


class _Snapshot(NamedTuple):
    """Where a copy of the whole state lies, in memory that outlives the processes."""

    version: int
    state: list[Any]
    """References to ShardState, in order."""
    blended: Any
    """Reference to the frozen models that change."""


class _Update(NamedTuple):
    """An optimiser step that all workers have summed their gradients for."""

    scale: float
    metrics: dict[str, float]


class RayExecutor:
    """Micro-batches on Ray workers, parameters on a sharded server; the bits are those of `LocalExecutor`."""

    def __init__(
        self, cluster: Cluster, make_program: Callable[[], Program], models: Models, tell: Callable[[str], None]
    ) -> None:
        """Start the processes.

        Args:
            cluster: with room for them.
            make_program: an importable function, or a partial of one.
            models: shared with the processes of this machine without a copy for each.
            tell: gets one line for the user whenever something goes wrong.
        """
        self._cluster, self._dist = cluster, cluster.dist
        self._make_program, self._models, self._tell = make_program, models, tell
        self._program, self._layout = make_program(), flat_layout(models.params)
        self._shared = cluster.put(Models(to_numpy(models.params), to_numpy(models.frozen)))
        self._version, self._restarts = 0, 0
        self._faults: list[Fault] = []
        self._done: list[tuple[str, tuple[Any, ...]]] = []  # methods called since the snapshot that changed the state
        self._local: LocalExecutor | None = None  # takes over when no restart is left
        first = ShardState(0, flatten(models.params, self._layout).numpy(), None)
        self._snapshot = _Snapshot(0, [cluster.put(first)], cluster.put({}))
        workers, servers = self._dist.num_workers, self._dist.num_servers
        names = [f"worker {n}" for n in range(workers)] + [f"server {n}" for n in range(servers)]
        members = cluster.start(names, range(len(names)))
        self._workers, self._servers = members[:workers], members[workers:]
        self._loaded: list[Member] = []  # who has the program
        self._intact = False  # whether the shards hold the present version, or can be brought to it
        self._lasting(self._begin)

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
        results: dict[int, Tree] = {}
        self._lasting(lambda: self._map(name, batches, results))
        if self._local:
            results |= dict(enumerate(self._local.map(name, batches)))
        return [results[number] for number in range(len(batches))]

    def step(self, name: str, batches: Sequence[Any]) -> dict[str, float]:
        """See `Executor.step`."""
        update: _Update | None = None
        while not self._local:
            try:
                update = update or self._reduce(name, batches)
                self._call(self._members, "apply", name, self._version, update.scale)
            except _LostError as lost:
                if not self._recover(lost):
                    update = None  # the shards were restored, and have forgotten the gradient
            else:
                self._version += 1
                self._done.append(("step", (name, batches)))
                if self._version % self._dist.snapshot_every == 0:
                    self._lasting(self._take_snapshot)
                return update.metrics
        return self._local.step(name, batches)

    def blend(self, name: str) -> None:
        """See `Executor.blend`."""
        self._change("blend", name)

    def reset_optimizer(self) -> None:
        """See `Executor.reset_optimizer`."""
        self._change("reset_optimizer")

    def params(self) -> Params:
        """See `Executor.params`."""
        flat = self._lasting(lambda: self._call(self._workers[:1], "params")[0])
        if self._local:
            return self._local.params()
        params: Params = unflatten(from_numpy(flat, _CPU), self._layout)
        return params

    def snapshot(self) -> dict[str, Tensor]:
        """See `Executor.snapshot`."""
        parts = self._lasting(lambda: self._collect(self._copy_calls()))
        return self._local.snapshot() if self._local else self._named(parts[:-1], parts[-1])

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """See `Executor.restore`."""
        if self._local:
            self._local.restore(state, version)
            return
        params = flatten(self._models.params, self._layout)
        opt_state = self._program.optimizer.init(params)
        blended = {name: tree_map(torch.clone, self._models.frozen[name]) for name in self._program.blends}
        copy_state(named_state(params, opt_state, blended, self._layout), state)
        whole = ShardState(0, params.numpy(), [leaf.numpy() for leaf in leaves(opt_state)])
        self._snapshot = _Snapshot(version, [self._cluster.put(whole)], self._cluster.put(to_numpy(blended)))
        self._done, self._version = [], version
        self._lasting(self._load_snapshot)

    def peak_bytes(self) -> int:
        """See `Executor.peak_bytes`."""
        peaks = self._lasting(lambda: self._call(self._members, "peak_bytes"))
        return self._local.peak_bytes() if self._local else max(peaks)

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

    def _call(self, members: Sequence[Member], method: str, *arguments: Any) -> list[Any]:
        """Call a method of several members with the same arguments; their results.

        Raises:
            _LostError: a member is lost, or their group has failed.
        """
        calls = [(member, member.call(method, *arguments)) for member in members]
        return self._collect(calls, together=method in ("reduce", "apply", "publish"))

    def _collect(self, calls: Sequence[tuple[Member, Any]], *, together: bool = False) -> list[Any]:
        results, lost, failed = self._cluster.collect(calls, together=together)
        if lost or failed:
            raise _LostError(lost)
        return results

    def _map(self, name: str, batches: Sequence[Any], results: dict[int, Tree]) -> None:
        waiting = collections.deque(number for number in range(len(batches)) if number not in results)
        calls: dict[Any, Member] = {}
        numbers: dict[Any, int] = {}
        lost: list[Member] = []

        def hand_out(member: Member) -> None:
            if waiting and member not in lost:
                number = waiting.popleft()
                call = member.call("map", name, self._version, to_numpy(batches[number]))
                calls[call], numbers[call] = member, number

        for member in self._workers:
            hand_out(member)
        while calls:
            call, end, result = self._cluster.next_ended(calls)
            member = calls.pop(call)
            if end is not End.DONE:
                lost += [member] if member not in lost else []
            else:
                results[numbers[call]] = from_numpy(result, _CPU, copy=True)
                hand_out(member)
        if lost:
            raise _LostError(lost)

    def _reduce(self, name: str, batches: Sequence[Any]) -> _Update:
        """Gradients of all micro-batches, added up at the shards' owners."""
        shares = deal(len(batches), len(self._workers))
        arrays = [to_numpy(batch) for batch in batches]
        calls = [
            member.call("gradient", name, self._version, share, len(batches), arrays[slice(*share)])
            for member, share in zip(self._workers, shares, strict=True)
        ]
        by_worker = self._collect(list(zip(self._workers, calls, strict=True)))
        results = [from_numpy(result, _CPU, copy=True) for of_worker in by_worker for result in of_worker]
        parts = [part for part in self._call(self._members, "reduce", shares, self._dist.reduce) if part is not None]
        squares = torch.cat([from_numpy(part, _CPU) for part in parts])
        scale, metrics = plan_update(results, squares, self._program.steps[name].max_grad_norm)

        def is_finite(batch: Any) -> bool:
            return self._call(self._workers[:1], "is_finite", name, to_numpy(batch))[0]

        check_update(name, batches, results, metrics["grad_norm"], is_finite)
        return _Update(scale, metrics)

    def _change(self, method: str, *arguments: Any) -> None:
        """Do something to the state that is no step; a recovery in the midst of it brings back the state before."""
        self._lasting(lambda: self._repeat(method, *arguments))
        if self._local:
            getattr(self._local, method)(*arguments)
        else:
            self._done.append((method, arguments))

    def _repeat(self, method: str, *arguments: Any) -> None:
        """Do to the state what a method of this class does, without making it last."""
        if method == "step":
            name, batches = arguments
            self._call(self._members, "apply", name, self._version, self._reduce(name, batches).scale)
            self._version += 1
        else:
            self._call(self._workers if method == "blend" else self._members, method, *arguments)

    def _lasting(self, work: Callable[[], Any]) -> Any:
        """Do something that may be done again, until it has succeeded; None once this process has taken over."""
        while not self._local:
            try:
                return work()
            except _LostError as lost:
                self._recover(lost)
        return None

    def _recover(self, lost: _LostError) -> bool:
        """Bring the processes back to the present version; whether all shards are still what they were.

        A shard is lost with its owner; then all go back to the last snapshot, and what was done since is done again.
        """
        begun, what = time.monotonic(), str(lost)
        while True:
            self._restarts += 1
            try:
                if self._restarts > self._dist.max_restarts:
                    raise UserError(f"{self._dist.max_restarts} faults were made good, and no more are allowed")
                owners = self._servers or self._workers
                self._intact &= not self._program.blends and not any(owner in lost.members for owner in owners)
                kept = self._intact
                self._mend(lost.members)
                break
            except _LostError as again:
                lost = again
            except UserError as error:
                self._take_over()
                what, kept = f"{what}; {error}", False
                break
        fault = Fault(what, time.monotonic() - begun, final=self._local is not None)
        self._faults.append(fault)
        how = "going on in this process" if fault.final else "going on"
        self._tell(f"lost {fault.what}; {how} after {fault.recovery_s:.1f} s")
        return kept

    def _mend(self, lost: Sequence[Member]) -> None:
        """Form a new generation without the lost members, or with others in their places."""
        self._cluster.kill(lost)
        shrinks = self._dist.on_failure == "shrink" and any(member not in lost for member in self._workers)
        if shrinks:
            self._workers = [member for member in self._workers if member not in lost]
        places = [member for member in self._members if member in lost]
        fresh = self._cluster.start([member.name for member in places], [member.bundle for member in places])
        heirs = {member.name: member for member in fresh}
        self._workers = [heirs.get(member.name, member) for member in self._workers]
        self._servers = [heirs.get(member.name, member) for member in self._servers]
        self._form()
        if self._intact:
            self._call(self._members, "publish", self._version)
        else:
            self._load_snapshot()

    def _begin(self) -> None:
        if not self._intact:
            self._form()
            self._load_snapshot()

    def _form(self) -> None:
        """Let new members load the program, then all of them form the next generation."""
        workers, members = len(self._workers), self._members
        fresh = [member for member in members if member not in self._loaded]
        self._collect([(member, self._cluster.load(member, self._make_program, self._shared)) for member in fresh])
        self._loaded = members
        self._cluster.generation += 1
        owners = tuple(range(workers, len(members)) if self._servers else range(workers))
        seats = [Seat(self._cluster.generation, rank, len(members)) for rank in range(len(members))]
        store = (self._cluster.host, self._cluster.store.port)
        self._collect(
            [
                (member, member.call("join", Place(seat, workers, owners), *store))
                for member, seat in zip(members, seats, strict=True)
            ],
            together=True,
        )

    def _copy_calls(self) -> list[tuple[Member, Any]]:
        """Ask all owners for copies of their shards, and a worker for the frozen models that change."""
        owners = self._servers or self._workers
        calls = [(member, member.call("snapshot")) for member in owners]
        return [*calls, (self._workers[0], self._workers[0].call("blended"))]

    def _take_snapshot(self) -> None:
        calls = self._copy_calls()
        self._collect(calls)
        copies = [call for _, call in calls]
        self._snapshot, self._done = _Snapshot(self._version, copies[:-1], copies[-1]), []

    def _load_snapshot(self) -> None:
        """Bring all members to the last snapshot, then to the present version."""
        self._intact, self._version = False, self._snapshot.version
        self._call(self._members, "restore", self._version, self._snapshot.blended, *self._snapshot.state)
        for method, arguments in self._done:
            self._repeat(method, *arguments)
        self._intact = True

    def _take_over(self) -> None:
        """Do the rest in this process."""
        self._cluster.kill(self._members)
        local = LocalExecutor(self._program, self._models, _CPU)
        state = [self._cluster.get(copy) for copy in self._snapshot.state]
        local.restore(self._named(state, self._cluster.get(self._snapshot.blended)), self._snapshot.version)
        for method, arguments in self._done:
            getattr(local, method)(*arguments)
        self._local = local

    def _named(self, state: Sequence[ShardState], blended: dict[str, Any]) -> dict[str, Tensor]:
        """A snapshot as `Executor.snapshot` gives it."""
        shard = read_shard(state, self._program.optimizer, (0, self._layout.size), 0, _CPU)
        frozen = {name: self._models.frozen[name] for name in self._program.blends} | from_numpy(blended, _CPU)
        return named_state(shard.params, shard.opt_state, frozen, self._layout)
