"""The processes that a configuration asks for, as Ray actors: their calls, and who of them is still alive."""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf.config import DistConfig
from rlhf.distributed.collectives import GroupError, serve_store
from rlhf.distributed.ray_calls import Daemon, LostError, RayCalls, RayLostError, is_alive
from rlhf.distributed.ray_session import START_S, connected, daemons, leave
from rlhf.distributed.worker import Worker
from rlhf.errors import UserError, WorkersLostError

_LOOK_S = 0.5
"""Between looks at who is silent, while waiting for results."""

_SETUP_S = 30.0
"""Within this a new process answers."""


_MOVE_S = 25.0
"""Within this Ray has noticed that a machine is lost, and has sought other places for what was there."""


class Member(NamedTuple):
    """A process of the parameter server."""

    actor: Any
    name: str
    """As users know it: worker 1, server 0."""
    bundle: int
    """Of the placement group; a replacement takes it over."""
    loaded: Any
    """Reference that is there once the process has loaded its program."""


class Cluster:
    """A running Ray, with room for the processes that a configuration asks for."""

    def __init__(self, dist: DistConfig) -> None:
        """Use `open_cluster`."""
        import ray

        self.dist, self._ray = dist, ray
        self._run = RayCalls(daemons())
        self.host: str = ray.util.get_node_ip_address()
        self.store = serve_store(self.host)
        self._group = self._reserve()
        self._pings: dict[Any, tuple[Any, float]] = {}
        self._pids: dict[Any, int] = {}

    def start(self, name: str, bundle: int, *arguments: Any) -> Member:
        """Start a process that makes its `Worker` and calls the worker's `load`.

        Args:
            name: as users know it.
            bundle: of the placement group.
            arguments: of `load`.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        dist = self.dist
        options = _actor_class().options(
            num_cpus=dist.threads_per_worker,
            num_gpus=dist.gpus_per_worker,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
        )
        actor = self._run(options.remote)
        alone = dist.gpus_per_worker == 1  # NCCL refuses two processes on one GPU
        backend = dist.backend if dist.backend != "auto" else ("nccl" if alone else "shared")
        device = "cuda" if dist.gpus_per_worker else "cpu"
        make_worker = functools.partial(
            Worker, device=device, threads=dist.threads_per_worker, backend=backend, timeout_s=dist.timeout_s
        )
        self._pings[actor] = (self._run(actor.ping.remote), time.monotonic())
        return Member(actor, name, bundle, self._run(actor.load.remote, make_worker, *arguments))

    def call(self, member: Member, method: str, *arguments: Any) -> Any:
        """Call a method of a member's `Worker`; a reference to what it will return."""
        return self._run(member.actor.call.remote, method, *arguments)

    def find_room(self, members: Sequence[Member]) -> list[Member]:
        """Those whose places another process can take: on a machine that is there, perhaps after Ray has moved them.

        Ray itself seeks other places for those of a lost machine; it is waited for.
        """
        deadline = time.monotonic() + _MOVE_S
        while True:
            table = self._run(self._ray.util.placement_group_table, self._group)
            placed = placed_bundles(table, self._run(self._ray.nodes), lambda node: is_alive(node, 2.0))
            roomy = [member for member in members if member.bundle in placed]
            if len(roomy) == len(members) or time.monotonic() > deadline:
                return roomy
            time.sleep(_LOOK_S)

    def results(self, calls: dict[Any, Member]) -> Iterator[tuple[Any, Any]]:
        """Yield (reference, result) of calls in the order in which they end; processes that fall silent are ended.

        Args:
            calls: whose method returned which reference. Emptied on the way; the caller may add to it between yields.

        Raises:
            LostError: at the end, if a process was lost or a group has failed; at once, if Ray is lost.
            Exception: what a member's own code raised.
        """
        lost: list[Member] = []
        failed = False
        while calls:
            done, _ = self._run(self._ray.wait, list(calls), num_returns=1, timeout=_LOOK_S)
            for call in done:
                member = calls.pop(call)
                try:
                    result = self._run(self._ray.get, call)
                except self._ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, GroupError):
                        raise (error.cause if isinstance(error.cause, Exception) else error) from None
                    failed = True
                except self._ray.exceptions.RayError:  # the process has died, or its machine
                    lost += [member] if member not in lost else []
                else:
                    yield call, result
            if not done:
                self.kill([member for member in set(calls.values()) if self._is_silent(member)])
        if lost or failed:
            raise LostError(", ".join(member.name for member in lost) or "a collective failed", lost)

    def put(self, value: Any) -> Any:
        """Place arrays in shared memory, where every process of this machine reads them without a copy."""
        return self._run(self._ray.put, value)

    def kill(self, members: Sequence[Member]) -> None:
        """End processes at once, also stopped ones."""
        for member in members:
            if not self._kill_here(member):
                self._run(self._ray.kill, member.actor)

    def _kill_here(self, member: Member) -> bool:
        """End a process of this machine without Ray, which waits for seconds for a stopped one."""
        pid = self._pids.get(member.actor)
        if self.host != "127.0.0.1" or pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def abandon(self, members: Sequence[Member]) -> None:
        """End processes and the connection to a Ray that is lost; no other call is made."""
        for member in members:
            self._kill_here(member)
        leave(lost=True)

    def close(self) -> None:
        """Give the resources back."""
        with contextlib.suppress(self._ray.exceptions.RayError, LostError):
            if self._ray.is_initialized():
                self._run(self._ray.util.remove_placement_group, self._group)
        self._run.close()

    def _is_silent(self, member: Member) -> bool:
        """Whether a process has not answered for `heartbeat_s`, or has not started in time; asks it on the way."""
        now = time.monotonic()
        ping, asked = self._pings[member.actor]
        if self._run(self._ray.wait, [ping], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):  # whoever waits for its work learns of its death
                self._pids[member.actor] = self._run(self._ray.get, ping)
            self._pings[member.actor] = (self._run(member.actor.ping.remote), now)
            return False
        return now - asked > (self.dist.heartbeat_s if member.actor in self._pids else _SETUP_S)

    def _reserve(self) -> Any:
        """A placement group; refused within seconds where the cluster has not the room."""
        dist = self.dist
        bundle = {"CPU": float(dist.threads_per_worker)}
        if dist.gpus_per_worker:
            bundle["GPU"] = dist.gpus_per_worker
        count = dist.num_workers + dist.num_servers
        group = self._run(self._ray.util.placement_group, [bundle] * count, strategy=dist.placement.upper())
        if not self._run(self._ray.wait, [self._run(group.ready)], timeout=START_S)[0]:
            self._run(self._ray.util.remove_placement_group, group)
            there = self._run(self._ray.available_resources)
            have = ", ".join(f"{there.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
            asked = " and ".join(f"{amount * count:g} {name}" for name, amount in bundle.items())
            raise UserError(
                f"--dist: {dist.num_workers} workers and {dist.num_servers} servers ask for {asked}, but the cluster "
                f"has {have} free; lower --dist.num-workers or --dist.threads-per-worker"
            )
        return group


@contextlib.contextmanager
def open_cluster(dist: DistConfig) -> Iterator[Cluster]:
    """Connect, and reserve room for the workers and servers.

    Raises:
        UserError: the cluster cannot be reached, or has too few resources.
        WorkersLostError: Ray is lost before there is anything to go on with.
    """
    with connected(dist):
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
    """The bundles of a placement group that are on machines that answer.

    Args:
        table: of the placement group, as Ray gives it.
        nodes: of the cluster, as Ray gives them.
        answers: asks a machine's raylet.
    """
    alive = {
        node["NodeID"]
        for node in nodes
        if node["Alive"] and answers(Daemon("raylet", node["NodeManagerAddress"], node["NodeManagerPort"], False))
    }
    return {bundle for bundle, node in table["bundles_to_node_id"].items() if node in alive}


def _actor_class() -> Any:
    """A process with a `Worker` in it, that answers pings while it computes and is never restarted behind our back."""
    import ray

    class Process:
        @ray.method(concurrency_group="health")  # type: ignore[untyped-decorator]
        def ping(self) -> int:
            return os.getpid()

        def load(self, make_worker: Callable[[], Worker], *arguments: Any) -> None:
            self.worker = make_worker()  # here, so that pings are answered while torch is imported
            self.worker.load(*arguments)

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self.worker, method)(*arguments)

    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1})(Process)
