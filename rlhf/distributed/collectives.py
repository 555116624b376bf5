"""A group of processes that exchange tensors: torch.distributed, numbered by generation, with a time-out everywhere.

A group that has failed once is closed at once, which closes its connections, so that its other members fail too
instead of waiting. It is never used again: whoever is left forms the next generation.
"""

import datetime
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore


class GroupError(Exception):
    """A member of the group died, stopped or was too slow. The group is closed; nothing it was about to give counts."""


class Seat(NamedTuple):
    """A process's place in a group."""

    generation: int
    """Of the group; each is formed once."""
    rank: int
    size: int
    """Processes in the group."""


class Group:
    """One generation of processes; each method but `close` raises GroupError when the group has failed."""

    def __init__(self, store: Store, seat: Seat, *, backend: str, timeout_s: float) -> None:
        """Wait for all members.

        Args:
            store: reached by all of them.
            seat: this process's place.
            backend: gloo or nccl.
            timeout_s: of every operation, in seconds.
        """
        self.seat, self._staged = seat, backend == "gloo"
        self._guard(
            lambda: torch_dist.init_process_group(
                backend,
                store=PrefixStore(f"generation-{seat.generation}", store),
                rank=seat.rank,
                world_size=seat.size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        )

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> "Exchange":
        """Begin to send and receive; between two ranks, tensors arrive in the order in which they were sent.

        Args:
            sends: (rank, tensor), contiguous, not to be changed before the exchange has ended.
            receives: (rank, tensor that is written into), contiguous.
        """
        buffers = [self._host(tensor, copy=False) for _, tensor in receives]
        outgoing = [torch_dist.P2POp(torch_dist.isend, self._host(tensor), rank) for rank, tensor in sends]
        incoming = [
            torch_dist.P2POp(torch_dist.irecv, buffer, rank)
            for (rank, _), buffer in zip(receives, buffers, strict=True)
        ]
        both = [op for pair in itertools.zip_longest(incoming, outgoing) for op in pair if op is not None]
        works = self._guard(lambda: torch_dist.batch_isend_irecv(both)) if both else []
        if len(works) < len(both):  # NCCL: one work for all
            works = works * len(both)
        by_op = dict(zip(map(id, both), works, strict=True))
        arriving = [
            (by_op[id(op)], target, buffer) for op, (_, target), buffer in zip(incoming, receives, buffers, strict=True)
        ]
        return Exchange(self, arriving, [by_op[id(op)] for op in outgoing])

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all members, in the backend's own order."""
        buffer = self._host(tensor)
        self._guard(lambda: torch_dist.all_reduce(buffer))
        if buffer is not tensor:
            tensor.copy_(buffer)

    def close(self) -> None:
        """Close all connections; may be called twice."""
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        else:  # a formation that failed has counted itself, and the count is part of the keys of the next one
            torch_dist.distributed_c10d._world.group_count = 0

    def _host(self, tensor: Tensor, *, copy: bool = True) -> Tensor:
        """The tensor, or where gloo has to carry one of a GPU, a buffer on the host."""
        if not (self._staged and tensor.is_cuda):
            return tensor
        return tensor.cpu() if copy else torch.empty_like(tensor, device="cpu")

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, ValueError) as error:  # torch_dist.DistBackendError is a RuntimeError
            self.close()
            raise GroupError(f"generation {self.seat.generation}, rank {self.seat.rank}: {error}") from error


class Exchange:
    """Tensors on their way."""

    def __init__(self, group: Group, arriving: list[tuple[Any, Tensor, Tensor]], leaving: list[Any]) -> None:
        """Made by `Group.exchange`: (work, tensor, buffer it arrives in) of each receive, works of the sends."""
        self._group, self._arriving, self._leaving = group, arriving, leaving

    def received(self, number: int) -> None:
        """Wait for the tensor of that number among those to be received."""
        work, target, buffer = self._arriving[number]
        self._group._guard(work.wait)
        if buffer is not target:
            target.copy_(buffer)

    def finish(self) -> None:
        """Wait until everything has been sent; `received` must have been called for each tensor."""
        for work in self._leaving:
            self._group._guard(work.wait)


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
