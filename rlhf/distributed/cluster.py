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
from rlhf.distributed.session import START_S, connected
from rlhf.distributed.worker import Worker
from rlhf.errors import UserError

_LOOK_S = 0.5
"""Between looks at who is silent, while waiting for results."""

_SETUP_S = 30.0
"""Within this a new process answers."""


class LostError(Exception):
    """Processes died or fell silent, or their group failed."""

    def __init__(self, members: "Sequence[Member]") -> None:
        """Takes who was lost: none where only the group has failed."""
        super().__init__(", ".join(member.name for member in members) or "a collective failed")
        self.members = members


class Member(NamedTuple):
    """A process of the parameter server."""

    actor: Any
    name: str
    """As users know it: worker 1, server 0."""
    bundle: int
    """Of the placement group; a replacement takes it over."""
    loaded: Any
    """Reference that is there once the process has loaded its program."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the process's `Worker`; a reference to what it will return."""
        return self.actor.call.remote(method, *arguments)


class Cluster:
    """A running Ray, with room for the processes that a configuration asks for."""

    def __init__(self, dist: DistConfig) -> None:
        """Use `open_cluster`."""
        import ray

        self.dist, self._ray = dist, ray
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
        actor = (
            _actor_class()
            .options(
                num_cpus=dist.threads_per_worker,
                num_gpus=dist.gpus_per_worker,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            )
            .remote()
        )
        alone = dist.gpus_per_worker == 1  # NCCL refuses two processes on one GPU
        backend = dist.backend if dist.backend != "auto" else ("nccl" if alone else "shared")
        device = "cuda" if dist.gpus_per_worker else "cpu"
        make_worker = functools.partial(
            Worker, device=device, threads=dist.threads_per_worker, backend=backend, timeout_s=dist.timeout_s
        )
        self._pings[actor] = (actor.ping.remote(), time.monotonic())
        return Member(actor, name, bundle, actor.load.remote(make_worker, *arguments))

    def results(self, calls: dict[Any, Member]) -> Iterator[tuple[Any, Any]]:
        """Yield (reference, result) of calls in the order in which they end; processes that fall silent are ended.

        Args:
            calls: whose method returned which reference. Emptied on the way; the caller may add to it between yields.

        Raises:
            LostError: at the end, if a process was lost or a group has failed.
            Exception: what a member's own code raised.
        """
        lost: list[Member] = []
        failed = False
        while calls:
            done, _ = self._ray.wait(list(calls), num_returns=1, timeout=_LOOK_S)
            for call in done:
                member = calls.pop(call)
                try:
                    result = self._ray.get(call)
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
            raise LostError(lost)

    def put(self, value: Any) -> Any:
        """Place arrays in shared memory, where every process of this machine reads them without a copy."""
        return self._ray.put(value)

    def get(self, reference: Any) -> Any:
        """What `put`, or a member's call, has placed there."""
        return self._ray.get(reference)

    def kill(self, members: Sequence[Member]) -> None:
        """End processes at once, also stopped ones."""
        for member in members:
            pid = self._pids.get(member.actor)
            if self.host == "127.0.0.1" and pid is not None:  # a stopped process keeps ray.kill waiting for seconds
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            else:
                self._ray.kill(member.actor)

    def close(self) -> None:
        """Give the resources back."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.util.remove_placement_group(self._group)

    def _is_silent(self, member: Member) -> bool:
        """Whether a process has not answered for `heartbeat_s`, or has not started in time; asks it on the way."""
        now = time.monotonic()
        ping, asked = self._pings[member.actor]
        if self._ray.wait([ping], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):  # whoever waits for its work learns of its death
                self._pids[member.actor] = self._ray.get(ping)
            self._pings[member.actor] = (member.actor.ping.remote(), now)
            return False
        return now - asked > (self.dist.heartbeat_s if member.actor in self._pids else _SETUP_S)

    def _reserve(self) -> Any:
        """A placement group; refused within seconds where the cluster has not the room."""
        dist = self.dist
        bundle = {"CPU": float(dist.threads_per_worker)}
        if dist.gpus_per_worker:
            bundle["GPU"] = dist.gpus_per_worker
        count = dist.num_workers + dist.num_servers
        group = self._ray.util.placement_group([bundle] * count, strategy=dist.placement.upper())
        if not self._ray.wait([group.ready()], timeout=START_S)[0]:
            self._ray.util.remove_placement_group(group)
            there = self._ray.available_resources()
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
    """
    with connected(dist):
        cluster = Cluster(dist)
        try:
            yield cluster
        finally:
            cluster.close()


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
