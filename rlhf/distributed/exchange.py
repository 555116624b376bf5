"""Exchanges of tensors between the members of a group: through the backend in segments, or through shared memory."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

SEGMENT = 1 << 24
"""Elements of one message (64 MB of float32): the next segments are on their way while one is added up."""

Receive = tuple[int, Tensor | int]
"""(rank, contiguous flat tensor to receive into; or the number of float32 elements to read where they arrive)."""


class Segment(NamedTuple):
    """A part of a tensor that is one message."""

    rank: int
    """Of the receiver or sender."""
    tensor: Tensor
    start: int
    """The index of its first element in the whole tensor."""


class Arrival(NamedTuple):
    """A segment to be received."""

    segment: Segment
    buffer: Tensor
    """The segment's tensor, or a host buffer for one on a GPU."""
    work: Any
    """The backend's handle of the receive."""


class Exchange(Protocol):
    """An exchange that has begun."""

    def segments(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield the slices that make up 0..size-1, each with that part of all received tensors once it has arrived.

        Args:
            size: the number of elements of each tensor.
        """

    def finish(self) -> None:
        """Wait until everything is sent, and received into the tensors for it."""


class BackendExchange:
    """An exchange through the backend's sends and receives."""

    def __init__(
        self,
        tensors: list[Tensor],
        arrivals: list[Arrival],
        sends: list[Any],
        guard: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """Store what `finish` waits for.

        Args:
            tensors: those to be received.
            arrivals: their segments, in order of start.
            sends: the backend's handles of the sends.
            guard: calls a function and raises GroupError if it fails.
        """
        self._tensors, self._arrivals = tensors, collections.deque(arrivals)
        self._sends, self._guard = sends, guard

    def segments(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """See `Exchange.segments`."""
        for start in range(0, size, SEGMENT):
            while self._arrivals and self._arrivals[0].segment.start <= start:
                self._receive()
            part = slice(start, min(start + SEGMENT, size))
            yield part, [tensor[part] for tensor in self._tensors]

    def finish(self) -> None:
        """See `Exchange.finish`."""
        while self._arrivals:
            self._receive()
        for work in self._sends:
            self._guard(work.wait)

    def _receive(self) -> None:
        segment, buffer, work = self._arrivals.popleft()
        self._guard(work.wait)
        if buffer is not segment.tensor:
            segment.tensor.copy_(buffer)


class MemoryExchange:
    """An exchange through shared memory, in which everything has arrived."""

    def __init__(
        self, receives: Sequence[Receive], arrived: Sequence[Tensor], device: torch.device, leave: Callable[[], None]
    ) -> None:
        """Store what `finish` copies.

        Args:
            receives: the requested tensors.
            arrived: their elements in shared memory.
            device: of the results.
            leave: called at the end.
        """
        self._receives, self._arrived, self._device, self._leave = receives, arrived, device, leave

    def segments(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """See `Exchange.segments`."""
        yield slice(0, size), [tensor.to(self._device) for tensor in self._arrived]

    def finish(self) -> None:
        """See `Exchange.finish`."""
        for (_, target), tensor in zip(self._receives, self._arrived, strict=True):
            if not isinstance(target, int):
                target.copy_(tensor)
        self._leave()


def split_segments(tensors: Sequence[tuple[int, Tensor]]) -> list[Segment]:
    """Return the first segments of all (rank, tensor), then the second ones, and so on."""
    longest = max((tensor.numel() for _, tensor in tensors), default=0)
    return [
        Segment(rank, tensor[start : start + SEGMENT], start)
        for start in range(0, longest, SEGMENT)
        for rank, tensor in tensors
        if start < tensor.numel()
    ]
