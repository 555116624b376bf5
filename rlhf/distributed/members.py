"""The processes of the parameter server: calls of several processes, and the group that they form."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf.distributed.cluster import Cluster, Member
from rlhf.distributed.collectives import RankInfo
from rlhf.distributed.ray_calls import RayLostError


class Members:
    """Workers and servers of a cluster, in the order of their ranks: workers first."""

    def __init__(self, cluster: Cluster, load_arguments: Sequence[Any], log: Callable[[str], None]) -> None:
        """Start the processes of the cluster's configuration.

        Args:
            cluster: cluster with resources for the processes.
            load_arguments: arguments of `Worker.load`, also for replacements.
            log: function that is called with a line for the user when a process is not replaced.
        """
        self._cluster, self._load_arguments, self._log = cluster, load_arguments, log
        self._generation = 0
        workers, servers = cluster.dist.num_workers, cluster.dist.num_servers
        self.workers = [self._start(f"worker {number}", number) for number in range(workers)]
        self.servers = [self._start(f"server {number}", workers + number) for number in range(servers)]

    @property
    def all(self) -> list[Member]:
        """All processes, by rank."""
        return self.workers + self.servers

    def begin(self, calls: Iterable[Sequence[Any]]) -> dict[Any, Member]:
        """Start calls (member, method, *arguments). `collect` waits for their results."""
        return self._cluster.call(calls)

    def collect(self, calls: dict[Any, Member]) -> list[Any]:
        """Return the results of calls, in the order of the calls.

        Raises:
            LostError: a process was lost or the group failed.
        """
        results = dict(self._cluster.results(dict(calls), together=True))
        return [results[reference] for reference in calls]

    def call(self, members: Sequence[Member], method: str, *arguments: Any) -> list[Any]:
        """Call a method of several members with the same arguments, and return their results."""
        return self.collect(self.begin((member, method, *arguments) for member in members))

    def join(self) -> None:
        """Make all processes form the next generation of the group, after they have loaded the program."""
        loaded = self.collect({member.loaded: member for member in self.all})
        connected = self._cluster.dist.backend == "gloo"  # as if each process had a machine of its own
        machine = dict(zip(self.all, range(len(loaded)) if connected else loaded, strict=True))
        self.workers.sort(key=lambda worker: machine[worker])  # those of one machine are neighbours in the tree
        self._generation += 1
        workers, servers = len(self.workers), len(self.servers)
        store = (self._cluster.host, self._cluster.store.port)
        machines = tuple(machine[member] for member in self.all)
        ranks = [RankInfo(self._generation, rank, workers, servers, machines) for rank in range(workers + servers)]
        self.collect(self.begin((member, "join", rank, *store) for member, rank in zip(self.all, ranks, strict=True)))

    def replace(self, lost: Sequence[Member]) -> None:
        """Kill the lost members and start replacements, unless the configuration says `shrink`.

        Raises:
            RayLostError: there is no machine left for a worker.
        """
        self._cluster.kill(lost)
        survivors = [member for member in self.workers if member not in lost]
        if self._cluster.dist.on_failure == "shrink" and survivors:
            self.workers = survivors
        missing = [member for member in self.all if member in lost]
        replaceable = self._cluster.find_replaceable(missing) if missing else []
        if dropped := [member.name for member in missing if member not in replaceable]:
            self._log(f"no machine has room for {', '.join(dropped)}; continuing without")
        self.workers, self.servers = (
            [
                self._start(member.name, member.bundle) if member in replaceable else member
                for member in members
                if member in replaceable or member not in missing
            ]
            for members in (self.workers, self.servers)
        )
        if not self.workers:
            raise RayLostError("all workers (no machine has room for one)")

    def kill(self, *, abandon: bool = False) -> None:
        """End all processes. With `abandon`, the connection to a lost Ray is given up too."""
        (self._cluster.abandon if abandon else self._cluster.kill)(self.all)
        self.workers, self.servers = [], []

    def _start(self, name: str, bundle: int) -> Member:
        return self._cluster.start(name, bundle, *self._load_arguments)
