"""A group of processes that exchange tensors: torch.distributed, numbered by generation, with a time-out everywhere.

Everything is made of one operation, sends and receives that begin together: a reduce-scatter is an all-to-all whose
receiver adds in an order of its own, a broadcast and an all-gather send the same tensor to many. Only the ring, the
backend's own allreduce, is not. Where all members are on one machine, the tensors of `Group.exchange` may pass through
memory that they share; then gloo only tells when they are there.

A group that has failed once is closed at once, which closes its connections, so that its other members fail too
instead of waiting. It is never used again: whoever is left forms the next generation.
"""

import collections
import contextlib
import datetime
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from rlhf.distributed.shared_memory import SharedMemory, make_area, open_area

SEGMENT = 1 << 24
"""Elements sent at once (64 MB of float32): while one segment is added up, the next ones are on their way."""


class GroupError(Exception):
    """A member of the group died, stopped or was too slow. The group is closed; nothing it was about to give counts."""


class RankInfo(NamedTuple):
    """A process's place in a group, whose first ranks are the workers."""

    generation: int
    """Of the group; each is formed once."""
    rank: int
    workers: int
    """Ranks 0..workers-1 compute."""
    servers: int
    """Ranks from `workers` on own the shards; where there are none, the workers do."""

    @property
    def size(self) -> int:
        """Processes in the group."""
        return self.workers + self.servers

    @property
    def owners(self) -> range:
        """Rank of each shard's owner."""
        return range(self.workers if self.servers else 0, self.size)


Receive = tuple[int, Tensor | int]
"""(rank, tensor that what arrives is laid into, contiguous and flat; or how many float32 to read where they arrive)."""


class Group:
    """One generation of processes; each method but `close` raises GroupError when the group has failed."""

    def __init__(
        self,
        store: Store,
        place: RankInfo,
        *,
        backend: str,
        timeout_s: float,
        device: torch.device | None = None,
        capacity: int = 0,
    ) -> None:
        """Wait for all members.

        Args:
            store: reached by all of them.
            place: this process's.
            backend: gloo, nccl, or shared: gloo, and where all members are on one machine, memory that they share.
            timeout_s: of every operation, in seconds.
            device: of the tensors; the CPU by default.
            capacity: the most bytes that a member sends in an exchange, if memory is shared.
        """
        self.place, self._staged, self._device = place, backend != "nccl", device or torch.device("cpu")
        self._boxes: dict[int, Tensor] = {}
        own = PrefixStore(f"generation-{place.generation}", store)
        make = _gloo if self._staged else _nccl
        self._backend: Any = None
        self._backend = self._guard(lambda: make(own, place.rank, place.size, datetime.timedelta(seconds=timeout_s)))
        self._shared = self._share(capacity) if backend == "shared" and place.size > 1 else None

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> "Exchange":
        """Begin to send and receive; all members do, also those that have nothing to send or receive.

        One exchange has to be finished before the next begins, and what it yields is valid until then.

        Args:
            sends: (rank, tensor), contiguous and flat, not to be changed before the exchange has ended. Between two
                ranks, tensors arrive in the order in which they were sent.
            receives: from other ranks.
        """
        if self._shared is None:
            return self._transfer(sends, receives)
        self._shared.write(sends)
        self._fence()
        found = self._shared.read([(rank, place if isinstance(place, int) else len(place)) for rank, place in receives])
        return _Handover(receives, found, self._device, (lambda: None) if self._shared.halved else self._fence)

    def _fence(self) -> None:
        """Wait for all members."""
        self._guard(lambda: self._backend.barrier().wait())

    def _transfer(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> "Exchange":
        """`exchange` through the backend."""
        me, size = self.place.rank, self.place.size
        boxes = [
            (rank, self._box(number, place) if isinstance(place, int) else place)
            for number, (rank, place) in enumerate(receives)
        ]
        outgoing = _in_segments(sorted(sends, key=lambda send: (send[0] - me) % size))  # not all to the same at once
        incoming = _in_segments(sorted(boxes, key=lambda receive: (me - receive[0]) % size))
        buffers = [self._host(piece.tensor, copy=False) for piece in incoming]
        arriving, leaving = self._guard(lambda: self._post(incoming, buffers, outgoing))
        arrivals = [_Arrival(*found) for found in zip(incoming, buffers, arriving, strict=True)]
        return _Transfer([box for _, box in boxes], arrivals, leaving, self._guard)

    def _box(self, number: int, size: int) -> Tensor:
        """A tensor to receive into, kept for the next exchange."""
        if number not in self._boxes or len(self._boxes[number]) != size:
            self._boxes[number] = torch.empty(size, device=self._device)
        return self._boxes[number]

    def _share(self, capacity: int) -> SharedMemory | None:
        """Open all members' memory; None, and so for all of them, if one cannot reach another's."""
        areas: list[mmap.mmap] = []
        with contextlib.ExitStack() as opened:
            address = torch.full((4,), -1)
            with contextlib.suppress(OSError):
                descriptor, address = make_area(capacity)
                opened.callback(os.close, descriptor)
            addresses = self.all_gather(address, [4] * self.place.size)
            with contextlib.suppress(OSError):
                areas = [open_area(address) for address in addresses]
            reached = torch.tensor([len(areas)])
            self.all_reduce(reached)
        return SharedMemory(self.place.rank, areas, capacity) if int(reached) == self.place.size**2 else None

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every member's vector, by rank.

        Args:
            own: [n], this member's.
            sizes: n of each.
        """
        parts = [own if rank == self.place.rank else own.new_empty(size) for rank, size in enumerate(sizes)]
        others = [rank for rank in range(len(sizes)) if rank != self.place.rank]
        self._transfer([(rank, own) for rank in others], [(rank, parts[rank]) for rank in others]).finish()
        return parts

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all members, in the backend's own order."""
        buffer = self._host(tensor)
        self._guard(lambda: self._backend.allreduce([buffer]).wait())
        if buffer is not tensor:
            tensor.copy_(buffer)

    def close(self) -> None:
        """Close all connections; may be called twice."""
        if self._backend is not None and not self._staged:
            self._backend.abort()
        self._backend = self._shared = None  # gloo's connections end with it

    def _post(
        self, incoming: "Sequence[_Piece]", buffers: Sequence[Tensor], outgoing: "Sequence[_Piece]"
    ) -> tuple[list[Any], list[Any]]:
        """Begin; the works of the receives and of the sends."""
        arriving: list[Any] = []
        leaving: list[Any] = []
        if not (incoming or outgoing):  # NCCL makes no work of nothing
            return arriving, leaving
        if not self._staged:
            self._backend._start_coalescing()
        for place in range(max(len(incoming), len(outgoing))):
            if place < len(incoming):
                arriving.append(self._backend.recv([buffers[place]], incoming[place].rank, 0))
            if place < len(outgoing):
                leaving.append(self._backend.send([self._host(outgoing[place].tensor)], outgoing[place].rank, 0))
        if not self._staged:  # one work for all
            together = self._backend._end_coalescing()
            return [together] * len(arriving), [together]
        return arriving, leaving

    def _host(self, tensor: Tensor, *, copy: bool = True) -> Tensor:
        """The tensor, or where gloo has to carry one of a GPU, a buffer on the host."""
        if not (self._staged and tensor.is_cuda):
            return tensor
        return tensor.cpu() if copy else torch.empty_like(tensor, device="cpu")

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:  # DistBackendError of torch.distributed is a RuntimeError
            self.close()
            raise GroupError(f"generation {self.place.generation}, rank {self.place.rank}: {error}") from error


class _Piece(NamedTuple):
    """A segment of a tensor on its way."""

    rank: int
    tensor: Tensor
    start: int
    """Its first element's place in the tensor."""


class _Arrival(NamedTuple):
    """A piece to be received."""

    piece: _Piece
    buffer: Tensor
    """Where it arrives: the piece, or on the host for a GPU."""
    work: Any


class Exchange(Protocol):
    """Tensors on their way."""

    def pieces(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Cut 0..size-1 into pieces, each yielded with that part of all tensors to be received once it has arrived.

        Args:
            size: elements of each of them.
        """

    def finish(self) -> None:
        """Wait until everything has been sent and received, and has been laid into the tensors for it."""


class _Transfer:
    """Through the backend."""

    def __init__(
        self,
        tensors: list[Tensor],
        arrivals: list[_Arrival],
        leaving: list[Any],
        guard: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """Takes the tensors to be received, and their pieces; works of the sends; how to wait for a work."""
        self._tensors, self._arrivals = tensors, collections.deque(arrivals)
        self._leaving, self._guard = leaving, guard

    def pieces(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """See `Exchange.pieces`."""
        for start in range(0, size, SEGMENT):
            while self._arrivals and self._arrivals[0].piece.start <= start:
                self._receive()
            part = slice(start, min(start + SEGMENT, size))
            yield part, [tensor[part] for tensor in self._tensors]

    def finish(self) -> None:
        """See `Exchange.finish`."""
        while self._arrivals:
            self._receive()
        for work in self._leaving:
            self._guard(work.wait)

    def _receive(self) -> None:
        piece, buffer, work = self._arrivals.popleft()
        self._guard(work.wait)
        if buffer is not piece.tensor:
            piece.tensor.copy_(buffer)


class _Handover:
    """Through shared memory: all is there."""

    def __init__(
        self, receives: Sequence[Receive], found: Sequence[Tensor], device: torch.device, leave: Callable[[], None]
    ) -> None:
        """Takes what is to be received, where it lies, the device on which it is wanted; what to do at the end."""
        self._receives, self._found, self._device, self._leave = receives, found, device, leave

    def pieces(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """See `Exchange.pieces`."""
        yield slice(0, size), [found.to(self._device) for found in self._found]

    def finish(self) -> None:
        """See `Exchange.finish`."""
        for (_, place), found in zip(self._receives, self._found, strict=True):
            if not isinstance(place, int):
                place.copy_(found)
        self._leave()


def _in_segments(tensors: Sequence[tuple[int, Tensor]]) -> list[_Piece]:
    """First segments of all tensors, then the second ones, and so on."""
    longest = max((tensor.numel() for _, tensor in tensors), default=0)
    return [
        _Piece(rank, tensor[start : start + SEGMENT], start)
        for start in range(0, longest, SEGMENT)
        for rank, tensor in tensors
        if start < tensor.numel()
    ]


def _gloo(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    return torch_dist.ProcessGroupGloo(store, rank, size, timeout)


def _nccl(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an operation that takes too long raises, and ends no process
    options = torch_dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch_dist.ProcessGroupNCCL(store, rank, size, options)


def serve_store(host: str) -> TCPStore:
    """The store through which groups are formed, in this process, listening on `host` alone."""
    import socket

    with socket.create_server((host, 0), backlog=512) as listener:
        port = listener.getsockname()[1]
        return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """The store that another process serves; gloo uses the loopback device where the store is there."""
    if host == "127.0.0.1":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s))
