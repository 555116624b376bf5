"""Shared memory for large tensors between processes of one machine, which is twice as fast as connections.

Every member of a group writes to its own area and reads from the areas of the others on its machine. Areas have no
names, so that the system frees them with the last process that holds them, even if it is killed.
"""

import functools
import hashlib
import mmap
import os
import secrets
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_ALIGN = 64
"""Alignment of tensors in an area, in bytes."""
_SENDS = 2000
"""Maximum number of sends in one exchange."""
_TABLE = 1 << 15
"""Size in bytes of the table before the tensors: number of sends, then receiver and first byte of each send."""

_SMALL = 1 << 24
"""Capacity in bytes up to which an area is halved. For small areas, another barrier takes longer than the copies."""


class SharedMemory:
    """Areas of a machine. Small areas have two halves, written in turn, so that no write overlaps a pending read."""

    def __init__(self, rank: int, areas: Mapping[int, mmap.mmap], capacity: int) -> None:
        """Map the areas.

        Args:
            rank: rank of this member.
            areas: areas of the members of this machine, by rank.
            capacity: capacity that was passed to `make_area`.
        """
        self.halved = _parts(capacity) == 2
        self._rank, self._start, self._size = rank, 0, len(areas[rank]) // _parts(capacity)
        self._bytes = {member: torch.frombuffer(area, dtype=torch.uint8) for member, area in areas.items()}
        self._words = {member: memoryview(area).cast("q") for member, area in areas.items()}

    def write(self, sends: Sequence[tuple[int, Tensor]]) -> None:
        """Begin an exchange by writing tensors for other members. All members write before any of them reads.

        A tensor that several members receive is written once. If areas are not halved, all members must have finished
        reading the last exchange.

        Args:
            sends: pairs (rank, [n] float32).

        Raises:
            ValueError: the tensors exceed the capacity.
        """
        if self.halved:
            self._start = self._size - self._start
        end, table, offsets = _TABLE, array("q", [len(sends)]), dict[tuple[int, int], int]()
        for rank, tensor in sends:
            key = tensor.data_ptr(), len(tensor)
            if key not in offsets:
                offsets[key], end = end, end + -(-tensor.nbytes // _ALIGN) * _ALIGN
                if end > self._size or len(sends) > _SENDS:
                    raise ValueError(f"exchange: {len(sends)} sends of over {end} bytes, expected up to {self._size}")
                self._view(self._rank, offsets[key], len(tensor)).copy_(tensor)
            table.extend((rank, offsets[key]))
        first = self._start // 8
        self._words[self._rank][first : first + len(table)] = table

    def read(self, receives: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return views of the tensors that other members have written for this one, valid until the next exchange.

        Args:
            receives: pairs (rank, length of the tensor), in the order in which each rank sends them.
        """
        offsets = {rank: self._offsets(rank) for rank, _ in receives}
        return [self._view(rank, next(offsets[rank]), size) for rank, size in receives]

    def _offsets(self, rank: int) -> Iterator[int]:
        """Return the first bytes of the tensors that a member has written for this one."""
        words, first = self._words[rank], self._start // 8 + 1
        last = first + 2 * words[first - 1]
        return (words[row + 1] for row in range(first, last, 2) if words[row] == self._rank)

    def _view(self, rank: int, offset: int, size: int) -> Tensor:
        start = self._start + offset
        return self._bytes[rank][start : start + 4 * size].view(torch.float32)


def make_area(capacity: int) -> tuple[int, Tensor]:
    """Create an area, which takes no memory until it is written to.

    Args:
        capacity: maximum number of bytes of one exchange.

    Returns:
        (file descriptor, [4] int64 address for other processes of this machine). The address is valid while the
        descriptor is open.

    Raises:
        OSError: the system has no such memory, or might refuse it at a write.
    """
    if not hasattr(os, "memfd_create") or Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        raise OSError("the system has no memory without a name, or might refuse it later")
    descriptor = os.memfd_create("rlhf")
    try:
        pages = -(-(_TABLE + capacity + _SENDS * _ALIGN) // mmap.PAGESIZE)
        os.ftruncate(descriptor, pages * mmap.PAGESIZE * _parts(capacity))
        token = secrets.randbits(62)
        os.pwrite(descriptor, array("q", [token]).tobytes(), 0)
        return descriptor, torch.tensor([machine_number(), os.getpid(), descriptor, token])
    except OSError:
        os.close(descriptor)
        raise


def open_area(address: Tensor) -> mmap.mmap:
    """Map the area of any process of this machine.

    Raises:
        OSError: the area is on another machine, inaccessible or gone.
    """
    machine, process, number, token = address.tolist()
    if machine != machine_number():
        raise OSError("on another machine")
    descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    try:
        if os.pread(descriptor, 8, 0) != array("q", [token]).tobytes():  # a clone of this machine
            raise OSError("another file")
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _parts(capacity: int) -> int:
    """Return the number of parts of an area: two if it is halved."""
    return 2 if capacity <= _SMALL else 1


@functools.cache
def machine_number() -> int:
    """Return a number that is the same in all processes of this machine and process namespace."""
    names = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return int.from_bytes(hashlib.sha256(names.encode()).digest()[:7])
