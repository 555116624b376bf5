"""Groups of processes that exchange tensors through torch.distributed. Groups are numbered by generation.

One operation, in which sends and receives begin together, serves all patterns except the ring, which is the backend's
own allreduce. A reduce-scatter is an all-to-all whose receiver chooses the order of additions. A broadcast and an
all-gather send one tensor to several members. Between members of one machine, tensors may pass through shared memory,
and gloo only synchronises the members.

Every operation has a time-out. A group that fails is closed immediately, so that its other members fail too instead of
waiting. It is never used again; the remaining members form the next generation.
"""

import contextlib
import datetime
import functools
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rlhf.distributed.exchange import (
    Arrival,
    BackendExchange,
    Exchange,
    MemoryExchange,
    Receive,
    Segment,
    split_segments,
)
from rlhf.distributed.shared_memory import SharedMemory, make_area, open_area


class GroupError(Exception):
    """A member of the group died, stopped or timed out. The group is closed, and unfinished results are discarded."""


class RankInfo(NamedTuple):
    """Rank of a process in a group. The first ranks are the workers."""

    generation: int
    """Number of the group. Each number is used once."""
    rank: int
    """Rank of this process."""
    workers: int
    """Number of workers, which have the ranks 0..workers-1 and compute."""
    servers: int
    """Number of servers, which have the following ranks and own the shards. Without servers, the workers own them."""
    machines: tuple[int, ...] = ()
    """Machine of each rank; () if all are on one. The workers of a machine have consecutive ranks."""

    @property
    def size(self) -> int:
        """Number of processes in the group."""
        return self.workers + self.servers

    @property
    def owners(self) -> range:
        """Ranks of the owners of the shards, in the order of the shards."""
        return range(self.workers if self.servers else 0, self.size)

    def machine_of(self, rank: int) -> int:
        """Return the machine of a rank."""
        return self.machines[rank] if self.machines else 0


class Group:
    """One generation of processes. All methods except `close` raise GroupError if the group has failed."""

    def __init__(
        self,
        store: Store,
        rank_info: RankInfo,
        *,
        backend: str,
        timeout_s: float,
        device: torch.device | None = None,
        capacity: int = 0,
        address: str = "127.0.0.1",
    ) -> None:
        """Form the group, after waiting for all members.

        Args:
            store: store that all members can reach.
            rank_info: rank of this process.
            backend: gloo, nccl, or shared, which is gloo with shared memory between the members of each machine.
            timeout_s: time-out of every operation, in seconds.
            device: device of the tensors. None stands for the CPU.
            capacity: maximum number of bytes that a member sends in an exchange through shared memory.
            address: address of this machine, at which gloo accepts the connections of the other members.
        """
        self.rank_info, self._staged, self._device = rank_info, backend != "nccl", device or torch.device("cpu")
        self._buffers: dict[tuple[int, int], Tensor] = {}
        prefixed = PrefixStore(f"generation-{rank_info.generation}", store)
        make = functools.partial(_gloo, address) if self._staged else _nccl
        timeout = datetime.timedelta(seconds=timeout_s)
        self._backend: Any = None
        self._backend = self._guard(lambda: make(prefixed, rank_info.rank, rank_info.size, timeout))
        some_share = len({rank_info.machine_of(rank) for rank in range(rank_info.size)}) < rank_info.size
        self._shared = self._map_memory(capacity) if backend == "shared" and some_share else None

    def exchange_within(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Exchange:
        """Begin to send and receive, as `exchange` does, between members of one machine. All members call this method.

        Finish it before the next exchange within machines begins. One through the backend may begin and finish earlier.
        """
        if self._shared is None:
            return self.exchange(sends, receives)
        self._shared.write(sends)
        self._fence()
        sizes = [(rank, target if isinstance(target, int) else len(target)) for rank, target in receives]
        leave = (lambda: None) if self._shared.halved else self._fence
        return MemoryExchange(receives, self._shared.read(sizes), self._device, leave)

    def _fence(self) -> None:
        """Wait for all members."""
        self._guard(lambda: self._backend.barrier().wait())

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> BackendExchange:
        """Begin to send and receive through the backend.

        Finish an exchange with a member before the next one begins. The tensors that it yields are valid until then.

        Args:
            sends: pairs (rank, tensor). Tensors are contiguous and flat, and must not change until the exchange ends.
                Between two ranks, tensors arrive in the order in which they are sent.
            receives: tensors to receive from other ranks.
        """
        rank, size = self.rank_info.rank, self.rank_info.size
        targets = [
            (sender, self._buffer((sender, number), target) if isinstance(target, int) else target)
            for number, (sender, target) in enumerate(receives)
        ]
        # Each member starts with its neighbour, so that they do not all send to the same member at once.
        outgoing = split_segments(sorted(sends, key=lambda send: (send[0] - rank) % size))
        incoming = split_segments(sorted(targets, key=lambda target: (rank - target[0]) % size))
        buffers = [self._host(segment.tensor, copy=False) for segment in incoming]
        receive_works, send_works = self._guard(lambda: self._post(incoming, buffers, outgoing))
        arrivals = [Arrival(*fields) for fields in zip(incoming, buffers, receive_works, strict=True)]
        return BackendExchange([tensor for _, tensor in targets], arrivals, send_works, self._guard)

    def _buffer(self, key: tuple[int, int], size: int) -> Tensor:
        """Return a tensor to receive into. The next exchange with the same sender reuses it."""
        if key not in self._buffers or len(self._buffers[key]) != size:
            self._buffers[key] = torch.empty(size, device=self._device)
        return self._buffers[key]

    def _map_memory(self, capacity: int) -> SharedMemory | None:
        """Open the memory of this machine's members. All members return None if one of them fails to do so."""
        info, areas = self.rank_info, dict[int, mmap.mmap]()
        members = [rank for rank in range(info.size) if info.machine_of(rank) == info.machine_of(info.rank)]
        with contextlib.ExitStack() as stack:
            address = torch.full((4,), -1)
            with contextlib.suppress(OSError):
                descriptor, address = make_area(capacity)
                stack.callback(os.close, descriptor)
            addresses = self.all_gather(address, [4] * info.size)
            with contextlib.suppress(OSError):
                areas = {rank: open_area(addresses[rank]) for rank in members}
            failures = torch.tensor([int(not areas)])
            self.all_reduce(failures)
        return None if int(failures) else SharedMemory(info.rank, areas, capacity)

    def all_gather(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return the vectors of all members, by rank.

        Args:
            vector: [n] vector of this member.
            sizes: length n of every member's vector.
        """
        me = self.rank_info.rank
        vectors = [vector if rank == me else vector.new_empty(size) for rank, size in enumerate(sizes)]
        peers = [rank for rank in range(len(sizes)) if rank != me]
        sends, receives = [(rank, vector) for rank in peers], [(rank, vectors[rank]) for rank in peers]
        self.exchange(sends, receives).finish()
        return vectors

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all members, added in the order of the backend."""
        buffer = self._host(tensor)
        self._guard(lambda: self._backend.allreduce([buffer]).wait())
        if buffer is not tensor:
            tensor.copy_(buffer)

    def close(self) -> None:
        """Close all connections. May be called twice."""
        if self._backend is not None and not self._staged:
            self._backend.abort()
        self._backend = self._shared = None  # which closes gloo's connections

    def _post(
        self, incoming: Sequence[Segment], buffers: Sequence[Tensor], outgoing: Sequence[Segment]
    ) -> tuple[list[Any], list[Any]]:
        """Begin the receives and sends, and return the backend's handles of both."""
        receive_works: list[Any] = []
        send_works: list[Any] = []
        if not (incoming or outgoing):  # NCCL returns no handle for nothing
            return receive_works, send_works
        if not self._staged:
            self._backend._start_coalescing()
        for number in range(max(len(incoming), len(outgoing))):
            if number < len(incoming):
                receive_works.append(self._backend.recv([buffers[number]], incoming[number].rank, 0))
            if number < len(outgoing):
                tensor = self._host(outgoing[number].tensor)
                send_works.append(self._backend.send([tensor], outgoing[number].rank, 0))
        if not self._staged:
            work = self._backend._end_coalescing()  # one handle for all
            return [work] * len(receive_works), [work]
        return receive_works, send_works

    def _host(self, tensor: Tensor, *, copy: bool = True) -> Tensor:
        """Return the tensor, or a host buffer if it is on a GPU, from which gloo cannot send."""
        if not (self._staged and tensor.is_cuda):
            return tensor
        return tensor.cpu() if copy else torch.empty_like(tensor, device="cpu")

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:  # DistBackendError of torch.distributed is a RuntimeError
            self.close()
            raise GroupError(f"generation {self.rank_info.generation}, rank {self.rank_info.rank}: {error}") from error


def _gloo(address: str, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    gloo: Any = torch_dist.ProcessGroupGloo
    options, interface = gloo._Options(), os.environ.get("GLOO_SOCKET_IFNAME")
    where = {"interface": interface} if interface else {"hostname": address}  # by default that of the host name
    options._devices = [gloo.create_device(**where)]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an operation that times out raises instead of ending the process
    options = torch_dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch_dist.ProcessGroupNCCL(store, rank, size, options)


def serve_store(host: str) -> TCPStore:
    """Serve the store through which groups are formed, from this process and only on `host`."""
    with socket.create_server((host, 0), backlog=512) as listener:
        port = listener.getsockname()[1]
        return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to the store of another process."""
    return TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s))


def local_address(host: str, port: int) -> str:
    """Return the address of this machine in the network through which it reaches a server.

    The address of the host name may be another one, such as 127.0.1.1 of Debian, at which no other machine connects.
    """
    family, kind, _, _, server = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(server)  # which sends nothing
        return str(probe.getsockname()[0])
