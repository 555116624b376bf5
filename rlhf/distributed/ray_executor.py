"""The executor whose micro-batches run on Ray workers, with recovery from lost processes.

The driver holds no parameters. It assigns the work and records the calls that have changed the state since the last
snapshot. After a loss, a new generation of processes restores the snapshot and repeats these calls, which gives the
same bits.
"""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf.distributed.cluster import Cluster, Member
from rlhf.distributed.members import Members
from rlhf.distributed.messages import ShardState, copy_arrays, from_numpy, read_shard, to_numpy
from rlhf.distributed.partition import assign_micro_batches
from rlhf.distributed.ray_calls import LostError, RayLostError
from rlhf.execution.executor import Fault, LocalExecutor, copy_state, named_state
from rlhf.execution.program import ModelState, Program
from rlhf.execution.update import nonfinite_error, step_metrics
from rlhf.io.user_log import log_user
from rlhf.tree import flatten, leaves, tree_map, unflatten
from rlhf.types import Params, Tree

_CPU = torch.device("cpu")

_Result = TypeVar("_Result")


class _Snapshot(NamedTuple):
    """Copy of the whole state in the memory of the driver, which survives the loss of other processes and machines."""

    version: int
    """Number of steps applied."""
    shards: list[ShardState]
    """All shards, in the order of the buffer."""
    frozen: Any
    """Frozen models that are updated, as arrays."""


class RayExecutor:
    """Executor on Ray workers, with parameters on a sharded server. Results have the bits of `LocalExecutor`."""

    def __init__(
        self,
        cluster: Cluster,
        make_program: Callable[[], Program],
        models: ModelState,
        log: Callable[[str], None] = log_user,
    ) -> None:
        """Start the processes.

        Args:
            cluster: cluster with resources for the processes.
            make_program: importable function that returns the program, or a partial of one.
            models: initial state. Processes of this machine read the frozen models in shared memory.
            log: function that is called with a line for the user at every fault.

        Raises:
            ValueError: an optimiser needs whole leaves.
        """
        self._cluster, self._dist, self._log = cluster, cluster.dist, log
        self._program, self._models = make_program(), models
        self._layout = self._program.layout(models.params)
        self._program.check_optimizers()
        self._version = self._restarts = 0
        self._faults: list[Fault] = []
        self._calls: list[tuple[str, tuple[Any, ...]]] = []  # methods that changed the state since the snapshot
        self._local: LocalExecutor | None = None  # replaces all processes when no restart is left
        shard = ShardState(0, flatten(models.params, self._layout).numpy(), None)
        updated = {name: to_numpy(models.frozen[name]) for name in self._program.frozen_updates}
        self._snapshot = _Snapshot(0, [shard], updated)
        self._members = Members(cluster, (make_program, self._layout, cluster.put(to_numpy(models.frozen))), log)
        self._retry(self._join, lambda local: None)

    @property
    def version(self) -> int:
        """Version of the parameters: the number of optimiser steps applied since the beginning of the run."""
        return self._local.version if self._local else self._version

    @property
    def compiled(self) -> bool:
        """True if the steps run as compiled code."""
        return self._program.compile_to is not None

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """Return the results of an evaluation function. The next micro-batch goes to the next free worker."""
        results: dict[int, Tree] = {}  # kept when a worker is lost
        return self._retry(lambda: self._map(name, batches, results), lambda local: local.map(name, batches))

    def step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
        *,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches, as `Executor.step` describes."""
        metrics: dict[str, float] = self._change("step", name, batches, learning_rate, overlap=overlap)
        return metrics

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by its updated form."""
        self._change("update_frozen", name)

    def reset_optimizer(self) -> None:
        """Reset the optimiser's state to its initial value."""
        self._change("reset_optimizer")

    def params(self) -> Params:
        """Return the current parameters on the CPU."""

        def read() -> Params:
            (flat,) = self._members.call(self._members.workers[:1], "params", self._version)
            return unflatten(from_numpy(flat, _CPU), self._layout)

        return self._retry(read, LocalExecutor.params)

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything that the next step reads, by dotted name."""
        return self._retry(lambda: self._named(self._read_state()), LocalExecutor.snapshot)

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps."""
        params = flatten(self._models.params, self._layout)
        opt_state = self._program.optimizer.init(params)
        frozen = {name: tree_map(torch.clone, self._models.frozen[name]) for name in self._program.frozen_updates}
        copy_state(named_state(params, opt_state, frozen, self._layout), state)
        shard = ShardState(0, params.numpy(), [leaf.numpy() for leaf in leaves(opt_state)])
        self._snapshot = _Snapshot(version, [shard], to_numpy(frozen))
        self._calls = []
        self._retry(self._load_snapshot, lambda local: local.restore(state, version))

    def peak_bytes(self) -> int:
        """Return the peak memory of the largest process in bytes, or 0 if the system does not report it."""
        members = self._members
        return self._retry(lambda: max(members.call(members.all, "peak_bytes")), LocalExecutor.peak_bytes)

    def faults(self) -> list[Fault]:
        """Return the faults since the last call."""
        faults, self._faults = self._faults, []
        return faults

    def close(self) -> None:
        """End all processes."""
        self._members.kill()

    def _retry(self, work: Callable[[], _Result], fallback: Callable[[LocalExecutor], _Result]) -> _Result:
        """Return the result of `work`, which is repeated after each loss, or of `fallback` if no restart is left."""
        while not self._local:
            try:
                return work()
            except LostError as lost:
                self._recover(lost)
        return fallback(self._local)

    def _change(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Change the state, and record the call until the next snapshot. Options do not affect the state."""
        result = self._retry(
            lambda: self._execute(method, *arguments, **options), lambda local: getattr(local, method)(*arguments)
        )
        if not self._local:
            self._calls.append((method, arguments))
            if len(self._calls) >= self._dist.snapshot_every:
                self._retry(self._take_snapshot, lambda local: None)
        return result

    def _execute(self, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "step":
            return self._step(*arguments, **options)
        members = self._members.workers if method == "update_frozen" else self._members.all
        return self._members.call(members, method, *arguments)

    def _step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        members, total = self._members, len(batches)
        assignment = assign_micro_batches(total, len(members.workers)) + ((total, total),) * len(members.servers)
        arrays = [to_numpy(batch) for batch in batches]
        arguments = (name, self._version, assignment, self._dist.reduce)
        calls = members.begin(
            (member, "step", *arguments, arrays[first:stop], learning_rate)
            for member, (first, stop) in zip(members.all, assignment, strict=True)
        )
        overlap()
        replies = members.collect(calls)
        update = replies[0][1]
        results = [from_numpy(result, _CPU, copy=True) for member_results, _ in replies for result in member_results]

        def is_finite(batch: Any) -> bool:
            return members.call(members.workers[:1], "is_batch_finite", name, to_numpy(batch))[0]

        if not update.is_finite:
            raise nonfinite_error(name, batches, results, update, is_finite)
        self._version += update.within_limit
        return step_metrics(results, update)

    def _map(self, name: str, batches: Sequence[Any], results: dict[int, Tree]) -> list[Tree]:
        waiting = collections.deque(number for number in range(len(batches)) if number not in results)
        pending: dict[Any, Member] = {}
        numbers: dict[Any, tuple[int, Member]] = {}

        def assign(members: Sequence[Member]) -> None:
            assigned = [(waiting.popleft(), member) for member in members[: len(waiting)]]
            if not assigned:
                return
            calls = self._members.begin(
                (member, "map", name, self._version, to_numpy(batches[number])) for number, member in assigned
            )
            pending.update(calls)
            numbers.update(zip(calls, assigned, strict=True))

        assign(self._members.workers)
        for call, result in self._cluster.results(pending):
            number, member = numbers[call]
            results[number] = from_numpy(result, _CPU, copy=True)
            assign([member])
        return [results[number] for number in range(len(batches))]

    def _read_state(self) -> _Snapshot:
        """Read the shards from their owners, and updated frozen models from a worker."""
        members, version = self._members, self._version
        calls = [(member, "snapshot", version) for member in members.servers or members.workers]
        calls.append((members.workers[0], "frozen_masters", version))
        *shards, frozen = members.collect(members.begin(calls))
        return _Snapshot(version, shards, frozen)

    def _take_snapshot(self) -> None:
        version, shards, frozen = self._read_state()
        self._snapshot, self._calls = _Snapshot(version, copy_arrays(shards), copy_arrays(frozen)), []

    def _recover(self, lost: LostError) -> None:
        """Restore the current version on the remaining and new processes, or in this process if no restart is left."""
        start, what = time.monotonic(), str(lost)
        while not self._local:
            self._restarts += 1
            if isinstance(lost, RayLostError):
                what = str(lost)
                self._continue_locally(abandon=True)
                break
            if self._restarts > self._dist.max_restarts:
                what += f"; the run has recovered from {self._dist.max_restarts} faults, and no more are allowed"
                self._continue_locally()
                break
            try:
                self._members.replace(lost.members)
                self._join()
                break
            except LostError as error:
                lost = error
        fault = Fault(what, time.monotonic() - start, final=self._local is not None)
        self._faults.append(fault)
        where = "continued in this process" if fault.final else "continued"
        self._log(f"lost {fault.what}; {where} after {fault.recovery_s:.1f} s")

    def _join(self) -> None:
        """Form the next generation and restore the current version on it."""
        self._members.join()
        self._load_snapshot()

    def _load_snapshot(self) -> None:
        """Restore the last snapshot on all members and repeat the calls since then."""
        self._version = self._snapshot.version
        put = self._cluster.put
        copies = [put(self._snapshot.frozen), *map(put, self._snapshot.shards)]
        self._members.call(self._members.all, "restore", self._version, *copies)
        for method, arguments in self._calls:
            self._execute(method, *arguments)

    def _continue_locally(self, *, abandon: bool = False) -> None:
        """End all processes and continue in this one. With `abandon`, Ray is not called any more."""
        self._members.kill(abandon=abandon)
        local = LocalExecutor(self._program, self._models, _CPU)
        local.restore(self._named(self._snapshot), self._snapshot.version)
        for method, arguments in self._calls:
            getattr(local, method)(*arguments)
        self._local = local

    def _named(self, snapshot: _Snapshot) -> dict[str, Tensor]:
        """Return a snapshot in the form of `Executor.snapshot`."""
        shard = read_shard(snapshot.shards, self._program.optimizer, (0, self._layout.size), 0, _CPU)
        return named_state(shard.params, shard.opt_state, from_numpy(snapshot.frozen, _CPU), self._layout)
