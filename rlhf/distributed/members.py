"""The processes of the parameter server: calls of several processes, and the group that they form."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf.distributed.cluster import Cluster, Member
from rlhf.distributed.collectives import RankInfo
from rlhf.distributed.machine_check import describe_processor
from rlhf.distributed.ray_calls import LostError, RayLostError
from rlhf.distributed.ray_process import LoadReport
from rlhf.errors import UserError


class Members:
    """Workers and servers of a cluster, in the order of their ranks: workers first."""

    def __init__(self, cluster: Cluster, load_arguments: Sequence[Any], log: Callable[[str], None]) -> None:
        """Start the processes of the cluster's configuration.

        Args:
            cluster: cluster with resources for the processes.
            load_arguments: program, layout and frozen models of `Cluster.start`, also for replacements.
            log: function that is called with a line for the user when a process is not replaced.
        """
        self._cluster, self._load_arguments, self._log = cluster, load_arguments, log
        self._generation = 0
        self._processors = {describe_processor("cpu"): "this process"} if cluster.device == "cpu" else {}
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
        """Make all processes form the next generation of the group, after they have loaded the program.

        Raises:
            UserError: at the beginning, a machine cannot run the program or connect to the others.
            LostError: a process was lost or the group failed.
        """
        members, reports = self.all, self.collect({member.loaded: member for member in self.all})
        self._leave_out_unfit(reports)
        self._log_processors({report.processor: report.address for report in reports if not report.problem})
        connected = self._cluster.dist.backend == "gloo"  # as if each process had a machine of its own
        numbers = range(len(members)) if connected else [report.machine for report in reports]
        machine = dict(zip(members, numbers, strict=True))
        self.workers.sort(key=lambda worker: machine[worker])  # those of one machine are neighbours in the tree
        self._generation += 1
        workers, servers = len(self.workers), len(self.servers)
        store = (self._cluster.host, self._cluster.store.port)
        machines = tuple(machine[member] for member in self.all)
        ranks = [RankInfo(self._generation, rank, workers, servers, machines) for rank in range(workers + servers)]
        try:
            self.collect(
                self.begin((member, "join", rank, *store) for member, rank in zip(self.all, ranks, strict=True))
            )
        except LostError as lost:
            if lost.members or self._generation > 1 or self._cluster.dist.address is None:
                raise
            addresses = " and ".join(sorted({report.address for report in reports}))
            raise self._refusal(
                f"the processes on {addresses} could not connect to each other; open all TCP ports between the machines"
            ) from lost

    def _leave_out_unfit(self, reports: Sequence[LoadReport]) -> None:
        """Refuse the run at the beginning if a machine cannot run the program. Later, leave out what is there."""
        unfit = [(member, report) for member, report in zip(self.all, reports, strict=True) if report.problem]
        names: dict[str, list[str]] = defaultdict(list)  # by problem
        for member, report in unfit:
            names[report.problem].append(f"{member.name} on {report.address}")
        lines = [f"{' and '.join(which)}: {problem}" for problem, which in names.items()]
        if lines and not self._generation:
            raise self._refusal("; ".join(lines))
        for line in lines:
            self._log(f"{line}; continuing without")
        members = [member for member, _ in unfit]
        self._cluster.kill(members)
        self.workers = [member for member in self.workers if member not in members]
        self.servers = [member for member in self.servers if member not in members]
        if not self.workers:
            raise RayLostError("all workers (no machine is left that can run one)")

    def _log_processors(self, found: dict[str, str]) -> None:
        """Log the processors, with the address of a machine of each, if there are several and some are new."""
        known = self._processors
        self._processors = found | known
        if len(self._processors) > max(len(known), 1):
            names = ", ".join(f"{name} ({address})" for name, address in self._processors.items())
            self._log(f"the bits of results depend on which processor computes what, and there are several: {names}")

    def _refusal(self, problem: str) -> UserError:
        return UserError(f"--dist.address {self._cluster.dist.address}: {problem}")

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
