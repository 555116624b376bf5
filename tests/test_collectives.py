"""Messages within a group; what several processes do with them is tested through the executors."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

from rlhf.distributed import collectives, exchange, shared_memory
from rlhf.distributed.collectives import Group, GroupError, RankInfo, local_address

ALONE = RankInfo(generation=0, rank=0, workers=1, servers=0)


class StrictNCCL:
    """As NCCL's group, which makes no work of nothing."""

    begun = 0

    def _start_coalescing(self):
        self.begun += 1

    def _end_coalescing(self):
        return None

    def abort(self):
        pass


def test_a_group_of_one_has_nothing_to_wait_for(monkeypatch):
    backend = StrictNCCL()
    monkeypatch.setattr(collectives, "_nccl", lambda *settings: backend)
    for name in ("nccl", "gloo", "shared"):
        group = Group(HashStore(), ALONE, backend=name, timeout_s=5.0)
        group.exchange_within([], []).finish()
        own = torch.arange(3.0)
        assert group.all_gather(own, [3]) == [own]
        group.close()
    assert backend.begun == 0


def in_group(size, backend, work, capacity=0):
    """`work(group)` of every member, each in a thread, by rank."""
    store, end = HashStore(), threading.Barrier(size, timeout=20.0)

    def member(rank):
        group = Group(store, RankInfo(0, rank, size, 0), backend=backend, timeout_s=20.0, capacity=capacity)
        try:
            return work(group)
        finally:
            end.wait()  # one that leaves early would fail those that still connect to each other
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


def message(turn, sender, receiver, number, length):
    return torch.arange(length) + 1000.0 * (number + 10 * (receiver + 10 * (sender + 10 * turn)))


@pytest.mark.parametrize(("backend", "small"), [("gloo", 0), ("shared", 1 << 20), ("shared", 0)])
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(  # by turn, sender and receiver
        st.lists(st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=3, max_size=3), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    in_pieces=st.booleans(),
    late=st.integers(0, 2),
)
def test_tensors_arrive_in_the_order_in_which_they_were_sent(monkeypatch, backend, small, lengths, in_pieces, late):
    """Also when a member is slow to read while the others are writing what comes next."""

    def messages(turn, sender, receiver):
        sent = lengths[turn][sender][receiver] if sender != receiver else []
        return [message(turn, sender, receiver, *of) for of in enumerate([9] * len(sent) if in_pieces else sent)]

    def work(group):
        me, found = group.rank_info.rank, []
        for turn in range(len(lengths)):
            sends = [(rank, sent) for rank in range(3) for sent in messages(turn, me, rank)]
            places = [(rank, torch.full_like(sent, -1)) for rank in range(3) for sent in messages(turn, rank, me)]
            receives = [(rank, len(place)) for rank, place in places] if in_pieces else places
            pending = group.exchange_within(sends, receives)
            if me == late:
                time.sleep(0.003)
            pieces = [parts for _, parts in pending.segments(9)] if backend == "gloo" else [pending.arrived()]
            arrived = [[part.clone() for part in parts] for parts in pieces] if in_pieces else []
            pending.finish()
            found.append([torch.cat(parts) for parts in zip(*arrived, strict=True)] or [place for _, place in places])
        return found

    monkeypatch.setattr(exchange, "SEGMENT", 4)
    monkeypatch.setattr(shared_memory, "_SMALL", small)
    for me, found in enumerate(in_group(3, backend, work, capacity=4 * 6 * 40)):
        for turn, got in enumerate(found):
            expected = [sent for rank in range(3) for sent in messages(turn, rank, me)]
            assert [tensor.tolist() for tensor in got] == [sent.tolist() for sent in expected]


def test_what_several_receive_is_placed_once():
    own = torch.arange(100_000.0)

    def work(group):
        others = [rank for rank in range(3) if rank != group.rank_info.rank]
        places = [(rank, torch.zeros_like(own)) for rank in others]
        group.exchange_within([(rank, own) for rank in others], places).finish()
        with pytest.raises(ValueError, match=r"exchange: 2 sends of over \d+ bytes, expected up to \d+"):
            group._shared.write([(rank, own + rank) for rank in others])
        return [tensor for _, tensor in places]

    for found in in_group(3, "shared", work, capacity=own.nbytes):  # no room for two
        assert all(torch.equal(tensor, own) for tensor in found)


@pytest.mark.parametrize("cause", ["another machine", "no such memory"])
def test_one_that_cannot_share_lets_all_send(monkeypatch, cause):
    def fail(*arguments):
        if next(calls) == 1:
            raise OSError(cause)
        return real(*arguments)

    name = "open_area" if cause == "another machine" else "make_area"
    real, calls = getattr(shared_memory, name), iter(range(100))
    monkeypatch.setattr(collectives, name, fail)

    def work(group):
        me, place = group.rank_info.rank, torch.zeros(2)
        group.exchange_within([(1 - me, torch.full((2,), float(me)))], [(1 - me, place)]).finish()
        return group._shared, place.tolist()

    assert in_group(2, "shared", work, capacity=8) == [(None, [1.0, 1.0]), (None, [0.0, 0.0])]


def test_only_the_area_itself_is_opened():
    descriptor, address = shared_memory.make_area(100)
    area = shared_memory.open_area(address)
    area[500] = 7
    assert shared_memory.open_area(address)[500] == 7
    with pytest.raises(OSError, match="another machine"):
        shared_memory.open_area(address + torch.tensor([1, 0, 0, 0]))
    with pytest.raises(OSError, match="another file"):
        shared_memory.open_area(address + torch.tensor([0, 0, 0, 1]))
    os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        shared_memory.open_area(address)


def test_the_address_of_a_machine_is_that_of_the_network_to_the_server():
    """The name of the host may stand for another one, such as 127.0.1.1, at which no other machine connects."""
    assert local_address("127.0.0.1", 1) == "127.0.0.1"
    assert local_address("127.0.0.9", 1).startswith("127.")
    assert local_address("::1", 1) == "::1"


def test_the_user_may_name_the_network_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    Group(HashStore(), ALONE, backend="gloo", timeout_s=5.0).close()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    with pytest.raises(GroupError):
        Group(HashStore(), ALONE, backend="gloo", timeout_s=5.0)
