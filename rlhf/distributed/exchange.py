"""Exchanges of tensors between the members of a group: through the backend in segments, or through shared memory."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

SEGMENT = 1 << 24
"""Number of elements of a message (64 MB of float32). The next segments arrive while one is added."""

Receive = tuple[int, Tensor | int]
"""Pair of a rank, and a contiguous flat tensor to receive into or the number of float32 elements to receive."""


class Segment(NamedTuple):
    """A part of a tensor, which is one message."""

    rank: int
    """Rank of the receiver or sender."""
    tensor: Tensor
    """Elements of the part."""
    start: int
    """Index of the first element in the whole tensor."""


class Arrival(NamedTuple):
    """A segment to be received."""

    segment: Segment
    """The part of the tensor."""
    buffer: Tensor
    """Tensor of the segment, or a host buffer if it is on a GPU."""
    work: Any
    """Handle of the receive, from the backend."""


class Exchange(Protocol):
    """An exchange that has begun."""

    def arrived(self) -> list[Tensor]:
        """Wait until everything is received, and return the received tensors."""

    def finish(self) -> None:
        """Wait until everything is sent, and is received into the tensors."""


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
            tensors: tensors to receive.
            arrivals: segments of these tensors, in order of start.
            sends: handles of the sends, from the backend.
            guard: function that calls a function and raises GroupError if it fails.
        """
        self._tensors, self._arrivals = tensors, collections.deque(arrivals)
        self._sends, self._guard = sends, guard

    def segments(self, size: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield slices that make up 0..size-1, each with that part of all received tensors after it has arrived.

        Args:
            size: number of elements of each tensor.
        """
        for start in range(0, size, SEGMENT):
            while self._arrivals and self._arrivals[0].segment.start <= start:
                self._receive()
            part = slice(start, min(start + SEGMENT, size))
            yield part, [tensor[part] for tensor in self._tensors]

    def arrived(self) -> list[Tensor]:
        """Wait until everything is received, and return the received tensors."""
        while self._arrivals:
            self._receive()
        return self._tensors

    def finish(self) -> None:
        """Wait until everything is sent, and is received into the tensors."""
        self.arrived()
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
            arrived: elements of these tensors in shared memory.
            device: device of the results.
            leave: function that is called at the end.
        """
        self._receives, self._arrived, self._device, self._leave = receives, arrived, device, leave

    def arrived(self) -> list[Tensor]:
        """Wait until everything is received, and return the received tensors."""
        return [tensor.to(self._device) for tensor in self._arrived]

    def finish(self) -> None:
        """Wait until everything is sent, and is received into the tensors."""
        for (_, target), tensor in zip(self._receives, self._arrived, strict=True):
            if not isinstance(target, int):
                target.copy_(tensor)
        self._leave()


def split_segments(tensors: Sequence[tuple[int, Tensor]]) -> list[Segment]:
    """Return the first segments of all pairs (rank, tensor), then the second segments, and so on."""
    longest = max((tensor.numel() for _, tensor in tensors), default=0)
    return [
        Segment(rank, tensor[start : start + SEGMENT], start)
        for start in range(0, longest, SEGMENT)
        for rank, tensor in tensors
        if start < tensor.numel()
    ]
