"""The processes that a configuration asks for, as Ray actors: their calls, and who of them is still alive."""

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
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

_PATIENCE_S = 3.0
"""Left to the members of a group in which one was lost, before they are ended too."""


class Member(NamedTuple):
    """A process of the parameter server."""

    actor: Any
    name: str
    """As users know it: worker 1, server 0."""
    bundle: int
    """Of the placement group; a replacement takes it over."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the process's `Worker`; a reference to what it will return."""
        return self.actor.call.remote(method, *arguments)


class End(Enum):
    """How a call has ended."""

    DONE = "it returned"
    LOST = "its process has died"
    GROUP_FAILED = "its process lives, but another one has failed it"


class Cluster:
    """A running Ray, with room for the processes that a configuration asks for."""

    def __init__(self, dist: DistConfig) -> None:
        """Use `open_cluster`."""
        import ray

        self.dist, self._ray = dist, ray
        self.host: str = ray.util.get_node_ip_address()
        self.store = serve_store(self.host)
        self.generation = 0  # of the last group formed; never used twice on one store
        self._group = self._reserve()
        self._pings: dict[Any, tuple[Any, float]] = {}
        self._pids: dict[Any, int] = {}

    def start(self, names: Sequence[str], bundles: Sequence[int]) -> list[Member]:
        """Start processes; they have loaded nothing yet."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor, members = _actor_class(), []
        for name, bundle in zip(names, bundles, strict=True):
            options = actor.options(
                num_cpus=self.dist.threads_per_worker,
                num_gpus=self.dist.gpus_per_worker,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            )
            members.append(Member(options.remote(), name, bundle))
        for member in members:
            self._pings[member.actor] = (member.actor.ping.remote(), time.monotonic())
        return members

    def load(self, member: Member, *arguments: Any) -> Any:
        """Let a new process make its `Worker`, and call the worker's `load`."""
        dist, device = self.dist, "cuda" if self.dist.gpus_per_worker else "cpu"
        alone = dist.gpus_per_worker == 1  # NCCL refuses two processes on one GPU
        backend = dist.backend if dist.backend != "auto" else ("nccl" if alone else "gloo")
        make_worker = functools.partial(
            Worker, device=device, threads=dist.threads_per_worker, backend=backend, timeout_s=dist.timeout_s
        )
        return member.actor.load.remote(make_worker, *arguments)

    def next_ended(self, calls: Mapping[Any, Member], until: float = math.inf) -> tuple[Any, End, Any]:
        """Wait for the call that ends first, and end processes that are silent meanwhile.

        Args:
            calls: whose method returned which reference.
            until: a time (`time.monotonic`) after which whoever has not ended is ended.

        Returns:
            (the reference, how the call ended, its result).

        Raises:
            Exception: what a member's own code raised.
        """
        while True:
            done, _ = self._ray.wait(list(calls), num_returns=1, timeout=_LOOK_S)
            for call in done:
                try:
                    return call, End.DONE, self._ray.get(call)
                except self._ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, GroupError):
                        return call, End.GROUP_FAILED, None
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                except self._ray.exceptions.RayError:  # the process has died, or its machine
                    return call, End.LOST, None
            hopeless = time.monotonic() > until
            self.kill([member for member in set(calls.values()) if hopeless or self._is_silent(member)])

    def collect(self, calls: Sequence[tuple[Member, Any]], *, together: bool) -> tuple[list[Any], list[Member], bool]:
        """Wait until every call has ended, however it does.

        Args:
            calls: (member, what its method returned).
            together: the members wait for one another, so that after a loss nothing good can come of the other calls.

        Returns:
            (results, None where a call failed; members that were lost; whether the group of some member failed).

        Raises:
            Exception: see `next_ended`.
        """
        results: dict[Any, Any] = {}
        lost: list[Member] = []
        failed, until = False, math.inf
        waiting = {call: member for member, call in calls}
        while waiting:
            call, end, results[call] = self.next_ended(waiting, until)
            member = waiting.pop(call)
            failed |= end is End.GROUP_FAILED
            lost += [member] if end is End.LOST and member not in lost else []
            if together and end is not End.DONE:
                until = min(until, time.monotonic() + _PATIENCE_S)
        return [results[call] for _, call in calls], lost, failed

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
