"""Memory in which processes of one machine hand large tensors over: twice as fast as connections between them.

Every member of a group writes into an area of its own and reads what it wants from the others'. Areas have no names:
the system frees them with the last process that holds them, however that ends.
"""

import functools
import hashlib
import mmap
import os
import secrets
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

_ALIGN = 64
"""Bytes; what an area holds begins at multiples of it."""
_SENDS = 2000
"""The most in one exchange."""
_TABLE = 1 << 15
"""Bytes before the tensors: the number of sends, then receiver and first byte of each."""

_SMALL = 1 << 24
"""Bytes up to which an area is halved: for so few, waiting for each other once more would take longer than copies."""


class SharedMemory:
    """All members' areas. Small ones have two halves, written in turn: who goes on first spoils nothing still read."""

    def __init__(self, rank: int, areas: Sequence[mmap.mmap], capacity: int) -> None:
        """Args: this member's rank; the areas by rank; the capacity that they were made with."""
        self.halved = _parts(capacity) == 2
        self._rank, self._start, self._size = rank, 0, len(areas[rank]) // _parts(capacity)
        self._bytes = [torch.frombuffer(area, dtype=torch.uint8) for area in areas]
        self._words = [memoryview(area).cast("q") for area in areas]

    def write(self, sends: Sequence[tuple[int, Tensor]]) -> None:
        """Begin an exchange: place tensors for others, one that several receive once. `read` when all have done so.

        Where areas are not halved, all must have read what the last exchange brought.

        Args:
            sends: (rank, [n] float32).

        Raises:
            ValueError: there are more than there is room for.
        """
        if self.halved:
            self._start = self._size - self._start
        end, table, places = _TABLE, array("q", [len(sends)]), dict[tuple[int, int], int]()
        for rank, tensor in sends:
            key = tensor.data_ptr(), len(tensor)
            if key not in places:
                places[key], end = end, end + -(-tensor.nbytes // _ALIGN) * _ALIGN
                if end > self._size or len(sends) > _SENDS:
                    raise ValueError(f"exchange: {len(sends)} sends of over {end} bytes, expected up to {self._size}")
                self._at(self._rank, places[key], len(tensor)).copy_(tensor)
            table.extend((rank, places[key]))
        first = self._start // 8
        self._words[self._rank][first : first + len(table)] = table

    def read(self, receives: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What others have placed for this member, where it lies; it is there until the next exchange begins.

        Args:
            receives: (rank, n of the tensor), a rank's in the order in which it sent them.
        """
        places = {rank: self._places(rank) for rank, _ in receives}
        return [self._at(rank, next(places[rank]), size) for rank, size in receives]

    def _places(self, rank: int) -> Iterator[int]:
        words, first = self._words[rank], self._start // 8 + 1
        last = first + 2 * words[first - 1]
        return (words[at + 1] for at in range(first, last, 2) if words[at] == self._rank)

    def _at(self, rank: int, place: int, size: int) -> Tensor:
        start = self._start + place
        return self._bytes[rank][start : start + 4 * size].view(torch.float32)


def make_area(capacity: int) -> tuple[int, Tensor]:
    """A new area, which takes no memory before it is written to.

    Args:
        capacity: bytes that one exchange may send.

    Returns:
        (its file descriptor, [4] int64: where other processes of this machine find it while that is open).

    Raises:
        OSError: this system has no such memory, or may refuse it when it is written to.
    """
    if not hasattr(os, "memfd_create") or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        raise OSError("no memory without a name, or none that is certain to be there")
    descriptor = os.memfd_create("rlhf")
    try:
        pages = -(-(_TABLE + capacity + _SENDS * _ALIGN) // mmap.PAGESIZE)
        os.ftruncate(descriptor, pages * mmap.PAGESIZE * _parts(capacity))
        token = secrets.randbits(62)
        os.pwrite(descriptor, array("q", [token]).tobytes(), 0)
        return descriptor, torch.tensor([_machine(), os.getpid(), descriptor, token])
    except OSError:
        os.close(descriptor)
        raise


def open_area(address: Tensor) -> mmap.mmap:
    """The area that another process has made, or this one.

    Raises:
        OSError: it is on another machine, hidden or gone, or may not be mapped.
    """
    machine, process, number, token = address.tolist()
    if machine != _machine():
        raise OSError("on another machine")
    descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    try:
        if os.pread(descriptor, 8, 0) != array("q", [token]).tobytes():  # a copy of this machine, with our numbers
            raise OSError("another file")
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _parts(capacity: int) -> int:
    """How many exchanges an area holds: two where it is halved."""
    return 2 if capacity <= _SMALL else 1


@functools.cache
def _machine() -> int:
    """The same in all processes of this machine that have the same numbers for processes."""
    names = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return int.from_bytes(hashlib.sha256(names.encode()).digest()[:7])
