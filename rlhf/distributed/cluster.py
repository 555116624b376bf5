"""The processes of a configuration as Ray actors: their start, calls, health checks and end."""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf.config import DistConfig
from rlhf.distributed import ray_process
from rlhf.distributed.collectives import GroupError, serve_store
from rlhf.distributed.messages import pickle_by_value
from rlhf.distributed.ray_calls import Daemon, LostError, RayCalls, RayLostError, is_alive
from rlhf.distributed.ray_process import software_versions
from rlhf.distributed.ray_session import START_S, daemons, is_private, leave, open_session
from rlhf.distributed.worker import Worker
from rlhf.errors import UserError, WorkersLostError
from rlhf.execution.program import Program
from rlhf.tree import FlatLayout

_CHECK_S = 0.5
"""Interval of health checks while waiting for results, in seconds."""

_SETUP_S = 30.0
"""Time-out of an answer of a process that has not loaded its program yet, in seconds."""

_HEALTH = "health"
"""Name of the actors' concurrency group that answers pings."""

_NOTICE_S = 80.0
"""Time-out after which Ray should have noticed the loss of a machine's network, in seconds."""

_MOVE_S = 10.0
"""Time-out after which Ray should have moved the processes of a lost machine to other machines, in seconds."""


class Member(NamedTuple):
    """A process of the parameter server."""

    actor: Any
    name: str
    """Name for the user, such as worker 1 or server 0."""
    bundle: int
    """Index of the bundle in the placement group, which a replacement also uses."""
    loaded: Any
    """Ray reference to the result of `Process.load`."""


class Cluster:
    """A Ray cluster with reserved resources for the processes of a configuration."""

    def __init__(self, dist: DistConfig) -> None:
        """Reserve the resources. Call `open_cluster` instead, which connects first."""
        import ray

        self.dist, self._ray = dist, ray
        self._run = RayCalls(daemons())
        self._versions = None if is_private() else software_versions()
        self.host: str = ray.util.get_node_ip_address()
        self.store = serve_store(self.host)
        self._group = self._reserve()
        self._pings: dict[Any, tuple[Any, float]] = {}
        self._pids: dict[Any, int] = {}

    def start(
        self, name: str, bundle: int, make_program: Callable[[], Program], layout: FlatLayout, frozen: Any
    ) -> Member:
        """Start a process, which checks its machine, creates its `Worker` and loads a program.

        Args:
            name: name of the process, for the user.
            bundle: index of the bundle in the placement group.
            make_program: function that returns the program.
            layout: layout of the parameters.
            frozen: frozen models, or a reference to them.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        dist = self.dist
        options = _actor_class().options(
            num_cpus=dist.threads_per_worker,
            num_gpus=dist.gpus_per_worker,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
        )
        actor = self._run(options.remote)
        has_gpu = dist.gpus_per_worker == 1  # of its own: NCCL refuses two processes on one GPU
        backend = dist.backend if dist.backend != "auto" else ("nccl" if has_gpu else "shared")
        make_worker = functools.partial(
            Worker, device=self.device, threads=dist.threads_per_worker, backend=backend, timeout_s=dist.timeout_s
        )
        self._pings[actor] = (self._ping(actor), time.monotonic())
        program = pickle_by_value((make_worker, self.device, make_program, layout))
        driver = (self.host, self.store.port)
        return Member(actor, name, bundle, self._run(actor.load.remote, self._versions, driver, program, frozen))

    @property
    def device(self) -> str:
        """Type of the device of the workers."""
        return "cuda" if self.dist.gpus_per_worker else "cpu"

    def call(self, calls: Iterable[Sequence[Any]]) -> dict[Any, Member]:
        """Start calls (member, method, *arguments), and return the member of each reference to a result.

        All calls are one task of the thread that calls Ray, because tasks cost more than calls.
        """
        return self._run(lambda: {member.actor.call.remote(*arguments): member for member, *arguments in calls})

    def find_replaceable(self, members: Sequence[Member]) -> list[Member]:
        """Return the members that can be replaced because their bundles are on machines that answer.

        This method waits until Ray has moved the bundles of lost machines to other machines.
        """
        begin = time.monotonic()
        deadline = begin + _MOVE_S
        while True:
            table = self._run(self._ray.util.placement_group_table, self._group)
            nodes = self._run(self._ray.nodes)
            placed = placed_bundles(table, nodes, lambda node: is_alive(node, 2.0))
            missing = [member for member in members if member.bundle not in placed]
            alive = {node["NodeID"] for node in nodes if node["Alive"]}
            if any(table["bundles_to_node_id"].get(member.bundle) in alive for member in missing):
                deadline = min(time.monotonic(), begin + _NOTICE_S) + _MOVE_S  # Ray has not noticed the loss yet
            if not missing or time.monotonic() > deadline:
                return [member for member in members if member not in missing]
            time.sleep(_CHECK_S)

    def results(self, calls: dict[Any, Member], *, together: bool = False) -> Iterator[tuple[Any, Any]]:
        """Yield (reference, result) of calls in the order in which they finish, and kill silent processes.

        Args:
            calls: member of each reference. The generator empties this dict; the caller may add to it between yields.
            together: wait for all of them at once, which takes less time of this process.

        Raises:
            LostError: a process was lost or the group has failed, at the end; or Ray is lost, immediately.
            Exception: any error of the functions that members call.
        """
        lost: list[Member] = []
        failed = False
        while calls:
            expected = len(calls) if together else 1
            finished = self._run(self._finished, list(calls), expected)
            for call, result in finished.items():
                member = calls.pop(call)
                if isinstance(result, self._ray.exceptions.RayTaskError):
                    if not isinstance(result.cause, GroupError):
                        raise (result.cause if isinstance(result.cause, Exception) else result) from None
                    failed = True
                elif isinstance(result, self._ray.exceptions.RayError):  # the process or its machine is lost
                    lost += [member] if member not in lost else []
                else:
                    yield call, result
            if len(finished) < expected:
                self.kill([member for member in set(calls.values()) if self._is_silent(member)])
        if lost or failed:
            raise LostError(", ".join(member.name for member in lost) or "a collective failed", lost)

    def _finished(self, calls: Sequence[Any], expected: int) -> dict[Any, Any]:
        """Return the results, or Ray's errors, of the calls that have finished when `expected` have or after a time."""

        def result(call: Any) -> Any:
            try:
                return self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                return error

        done, _ = self._ray.wait(calls, num_returns=expected, timeout=_CHECK_S)
        return {call: result(call) for call in done}

    def put(self, value: Any) -> Any:
        """Put arrays into shared memory, which all processes of this machine read without a copy."""
        return self._run(self._ray.put, value)

    def kill(self, members: Sequence[Member]) -> None:
        """Kill processes, including stopped ones."""
        for member in members:
            if not self._kill_here(member):
                self._run(self._ray.kill, member.actor)

    def _kill_here(self, member: Member) -> bool:
        """Kill a process of this machine without Ray, which waits several seconds for a stopped one."""
        pid = self._pids.get(member.actor)
        if not is_private() or pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def abandon(self, members: Sequence[Member]) -> None:
        """Kill processes and close the connection to a Ray that is lost, without calling Ray."""
        for member in members:
            self._kill_here(member)
        leave(lost=True)

    def close(self) -> None:
        """Release the resources."""
        with contextlib.suppress(self._ray.exceptions.RayError, LostError):
            if self._ray.is_initialized():
                self._run(self._ray.util.remove_placement_group, self._group)
        self._run.close()

    def _is_silent(self, member: Member) -> bool:
        """Ping a process, and return True if it has not answered within `heartbeat_s` or has not started in time."""
        now = time.monotonic()
        ping, sent = self._pings[member.actor]
        if self._run(self._ray.wait, [ping], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):  # its calls report its death
                self._pids[member.actor] = self._run(self._ray.get, ping)
            self._pings[member.actor] = (self._ping(member.actor), now)
            return False
        has_loaded = self._run(self._ray.wait, [member.loaded], timeout=0)[0]  # before, imports may hold up the ping
        return now - sent > (self.dist.heartbeat_s if has_loaded else _SETUP_S)

    def _ping(self, actor: Any) -> Any:
        return self._run(actor.ping.options(concurrency_group=_HEALTH).remote)

    def _reserve(self) -> Any:
        """Return a placement group, or raise UserError within seconds if the cluster has too few resources."""
        dist = self.dist
        bundle = {"CPU": float(dist.threads_per_worker)}
        if dist.gpus_per_worker:
            bundle["GPU"] = dist.gpus_per_worker
        count = dist.num_workers + dist.num_servers
        group = self._run(self._ray.util.placement_group, [bundle] * count, strategy=dist.placement.upper())
        if not self._run(self._ray.wait, [self._run(group.ready)], timeout=START_S)[0]:
            self._run(self._ray.util.remove_placement_group, group)
            available = self._run(self._ray.available_resources)
            free = ", ".join(f"{available.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
            needed = " and ".join(f"{amount * count:g} {name}" for name, amount in bundle.items())
            raise UserError(
                f"--dist: {dist.num_workers} workers and {dist.num_servers} servers need {needed}, but the cluster "
                f"has {free} free; lower --dist.num-workers or --dist.threads-per-worker"
            )
        return group


@contextlib.contextmanager
def open_cluster(dist: DistConfig) -> Iterator[Cluster]:
    """Connect to Ray and reserve resources for the workers and servers until the block ends.

    Raises:
        UserError: the cluster is unreachable, or has too few resources.
        WorkersLostError: Ray is lost before the first step.
    """
    with open_session(dist):
        try:
            cluster = Cluster(dist)
            try:
                yield cluster
            finally:
                cluster.close()
        except RayLostError as error:
            leave(lost=True)
            raise WorkersLostError(f"lost {error} before the first step; continue with --resume") from error


def placed_bundles(
    table: dict[str, Any], nodes: Sequence[dict[str, Any]], answers: Callable[[Daemon], bool]
) -> set[int]:
    """Return the bundles of a placement group that are on machines that answer.

    Args:
        table: table of the placement group, from Ray.
        nodes: list of the nodes of the cluster, from Ray.
        answers: function that returns True if the raylet of a machine answers.
    """
    alive = {
        node["NodeID"]
        for node in nodes
        if node["Alive"] and answers(Daemon("raylet", node["NodeManagerAddress"], node["NodeManagerPort"], False))
    }
    return {bundle for bundle, node in table["bundles_to_node_id"].items() if node in alive}


def _actor_class() -> Any:
    """Return the actor class of a `Process`, which Ray never restarts."""
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(ray_process)
    groups = {_HEALTH: 1}  # a thread for pings
    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=groups)(ray_process.Process)
