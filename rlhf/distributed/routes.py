"""The routes of gradients and parameters within machines, and between machines and the owners of shards.

Between a machine and an owner on another one, one worker of the machine, the delegate, adds up what the workers of the
machine send, and passes on to them what the owner sends. Everything crosses once per machine.
"""

from collections.abc import Mapping
from typing import NamedTuple

from rlhf.distributed.collectives import RankInfo
from rlhf.distributed.partition import Range


class Routes(NamedTuple):
    """Routes of one process."""

    workers: list[int]
    """All workers of this machine."""
    neighbours: list[int]
    """All workers of this machine but this process."""
    delegates: dict[int, int]
    """Delegate of this machine to each owner. An owner on this machine needs none, and stands for itself."""
    delegated: dict[int, slice]
    """Range of each owner to which this process is the delegate, itself included."""
    others: dict[int, slice]
    """Range of each other owner."""
    far: dict[int, list[int]]
    """Workers of each other machine, by their delegate to this process, if it is an owner."""


def find_routes(rank_info: RankInfo, ranges: Mapping[int, Range]) -> Routes:
    """Return the routes of a process.

    Args:
        rank_info: rank of this process, and machines of all.
        ranges: range of each owner.
    """
    me, machine_of = rank_info.rank, rank_info.machine_of
    machine, by_machine = machine_of(me), dict[int, list[int]]()
    for rank in range(rank_info.workers):
        by_machine.setdefault(machine_of(rank), []).append(rank)

    def delegate(owner: int, machine: int) -> int:
        workers = [owner] if machine_of(owner) == machine else by_machine.get(machine, [owner])
        return workers[owner % len(workers)]

    workers, parts = by_machine.get(machine, []), {owner: slice(*part) for owner, part in ranges.items()}
    delegates = {owner: delegate(owner, machine) for owner in parts}
    far = {delegate(me, other): workers for other, workers in by_machine.items() if other != machine}
    return Routes(
        workers=workers,
        neighbours=[rank for rank in workers if rank != me],
        delegates=delegates,
        delegated={owner: part for owner, part in parts.items() if delegates[owner] == me},
        others={owner: part for owner, part in parts.items() if delegates[owner] != me},
        far=far if me in parts else {},
    )
