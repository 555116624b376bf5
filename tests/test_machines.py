"""Workers on several machines: the bits of one process, and everything between machines sent once per machine."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toy

from rlhf.distributed import shared_memory
from rlhf.distributed.collectives import Group, RankInfo, serve_store
from rlhf.distributed.messages import ShardState, to_numpy
from rlhf.distributed.partition import assign_micro_batches
from rlhf.distributed.worker import Worker
from rlhf.execution.executor import LocalExecutor
from rlhf.tree import flat_layout, flatten

STEPS = 3
LAYOUT = flat_layout(toy.models().params)


def train(machines, servers, backend, micro_batches):
    """Parameters of every worker after some steps; (machine, other machine, elements) of what was sent between them.

    Every member is a thread.
    """
    size, store = len(machines), serve_store("127.0.0.1")
    assignment = assign_micro_batches(micro_batches, size - servers) + ((micro_batches, micro_batches),) * servers
    sent = []

    class CountedGroup(Group):
        def exchange(self, sends, receives):
            own, *others = map(self.rank_info.machine_of, [self.rank_info.rank, *(rank for rank, _ in sends)])
            large = [len(tensor) if tensor.dtype == torch.float32 else 0 for _, tensor in sends]
            sent.extend((own, *pair) for pair in zip(others, large, strict=True) if pair[0] != own and pair[1])
            return super().exchange(sends, receives)

    def member(rank):
        worker = Worker(device="cpu", threads=1, backend=backend, timeout_s=20.0)
        worker.load(toy.make_program, LAYOUT, to_numpy(toy.models().frozen))
        worker.join(RankInfo(0, rank, size - servers, servers, machines), "127.0.0.1", store.port)
        assert (worker._group._shared is not None) == (backend == "shared" and len(set(machines)) < size)
        try:
            worker.restore(0, {}, ShardState(0, flatten(toy.models().params, LAYOUT).numpy(), None))
            for step in range(STEPS):
                batches = [to_numpy(batch) for batch in make_batches(step, micro_batches)]
                worker.step("main", step, assignment, "tree", batches[slice(*assignment[rank])])
            return torch.tensor(worker.params(STEPS)) if rank < size - servers else None
        finally:
            worker.leave()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as pool:
        patch.setattr("rlhf.distributed.worker.Group", CountedGroup)
        found = list(pool.map(member, range(size)))
    return found[: size - servers], sent


def make_batches(step, micro_batches):
    return [toy.batch(5, 100 * step + number) for number in range(micro_batches)]


def one_process(micro_batches):
    local = LocalExecutor(toy.make_program(), toy.models(), torch.device("cpu"))
    for step in range(STEPS):
        local.step("main", make_batches(step, micro_batches))
    return flatten(local.params(), LAYOUT)


@pytest.mark.parametrize(("backend", "small"), [("shared", 1 << 24), ("shared", 0), ("gloo", 0)])
@pytest.mark.parametrize(
    ("machines", "servers"),
    [
        ((0, 0, 1, 1), 0),
        ((7, 7, 7, 3), 0),
        ((0, 1, 1, 2, 2, 2), 0),
        ((0, 1, 2), 0),
        ((0, 0, 1, 1, 0, 1), 2),
        ((0, 0, 1, 2, 2), 2),
        ((0, 1, 1, 0), 1),
    ],
)
def test_any_machines_give_the_bits_of_one_process(monkeypatch, machines, servers, backend, small):
    monkeypatch.setattr(shared_memory, "_SMALL", small)
    for micro_batches in (1, 7):
        found, _ = train(machines, servers, backend, micro_batches)
        expected = one_process(micro_batches)
        assert all(torch.equal(params, expected) for params in found)


@pytest.mark.parametrize("backend", ["shared", "gloo"])
@pytest.mark.parametrize(
    ("machines", "size"), [((0, 0, 1, 1), 2), ((0, 0, 0, 0, 1, 1, 1, 1), 2), ((0, 0, 1, 1, 2, 2, 3, 3), 4)]
)
def test_sums_and_parameters_cross_once_per_machine(machines, size, backend):
    """Of 8 micro-batches, every machine has one subtree; with a machine per worker, each worker would send as much."""
    _, sent = train(machines, 0, backend, 8)
    assert len({(own, other) for own, other, _ in sent}) == size * (size - 1)
    assert sum(elements for *_, elements in sent) == STEPS * 2 * (size - 1) * LAYOUT.size
