"""Ray workers against the in-process executor: the same bits, whoever computes and whoever dies."""

import functools
import itertools
import json
import os
import re
import time

import pytest
import torch
import toy

from rlhf.config import DistConfig
from rlhf.distributed import cluster, connected, open_executor
from rlhf.errors import NonFiniteError
from rlhf.execution.executor import LocalExecutor

CPU = torch.device("cpu")
STEPS = 6


def slow(*values):
    """A case that only the slow tests run, because a faster one goes through nearly the same code."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory):
    """One Ray for all tests of this file, with room for six processes and `toy` on its path; the file of faults."""
    with pytest.MonkeyPatch.context() as patch:
        fault = tmp_path_factory.mktemp("ray") / "fault.json"
        patch.setenv("PYTHONPATH", os.path.dirname(toy.__file__))
        patch.setenv("RLHF_TEST_FAULT", str(fault))
        with connected(DistConfig(num_workers=6)):
            yield fault


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


APART = functools.partial(toy.make_program, {"w": 0.4, "b": 0.1})
"""The program whose leaves are clipped apart, both at every step."""


def run(dist, steps=STEPS, program=toy.make_program):
    """(what the calls returned, state, faults, lines logged)."""
    lines = []
    with open_executor(program, toy.models(), dist, device=CPU, log=lines.append) as executor:
        seen, state = toy.drive(executor, steps)
        executor.update_frozen("offset")
        more, state = toy.drive(executor, 2)
        seen += more
        params = executor.params()
        assert all(torch.equal(params[name], state[f"params.{name}"]) for name in params)
        return seen, state, executor.faults(), lines


def assert_same(got, expected):
    assert got[0] == expected[0]
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize(
    ("workers", "servers", "backend"),
    [(1, 0, "auto"), (2, 0, "gloo"), (3, 0, "shared"), (2, 1, "gloo"), (2, 2, "shared"), (4, 0, "auto")],
)
def test_invariant_14_any_number_of_workers_and_servers_gives_the_bits_of_one_process(
    one_ray, workers, servers, backend
):
    dist = DistConfig(num_workers=workers, num_servers=servers, backend=backend, snapshot_every=2)
    got = run(dist)
    assert_same(got, run(DistConfig()))
    assert got[2:] == ([], [])


@pytest.mark.parametrize(("workers", "servers"), [slow(1, 0), slow(2, 0), (3, 0), (2, 2)])
def test_clipping_apart_gives_the_bits_of_one_process(one_ray, workers, servers):
    got = run(DistConfig(num_workers=workers, num_servers=servers, snapshot_every=2), program=APART)
    expected = run(DistConfig(), program=APART)
    assert_same(got, expected)
    assert not torch.equal(got[1]["params.w"], run(DistConfig())[1]["params.w"])
    norms = [(seen["grad_norm/w"], seen["grad_norm/b"]) for seen in got[0] if isinstance(seen, dict)]
    assert min(w for w, _ in norms) > 0.4
    assert min(b for _, b in norms) > 0.1


def test_memory_shared_as_by_large_models_changes_no_bit(one_ray, monkeypatch):
    monkeypatch.setattr(cluster, "Worker", toy.LargeWorker)
    assert_same(run(DistConfig(num_workers=3, num_servers=1, backend="shared")), run(DistConfig()))


@pytest.mark.parametrize("moment", [None, "add_up", slow("publish")])
def test_several_machines_change_no_bit_even_when_a_process_is_lost(one_ray, monkeypatch, moment):
    if moment:
        fault = {"moment": moment, "rank": 1, "version": 4, "signal": "SIGKILL"}
        one_ray.write_text(json.dumps(fault))
    monkeypatch.setattr(cluster, "Worker", toy.ScatteredWorker)
    got = run(DistConfig(num_workers=4, snapshot_every=2))
    assert not one_ray.exists()
    assert_same(got, run(DistConfig()))
    assert len(got[2]) == bool(moment)


@pytest.mark.parametrize(("workers", "servers"), [(3, 1), slow(2, 0)])
def test_invariant_14_the_ring_agrees_to_tolerance(one_ray, workers, servers):
    got = run(DistConfig(num_workers=workers, num_servers=servers, reduce="ring"))
    expected = run(DistConfig())
    for name, leaf in expected[1].items():
        torch.testing.assert_close(got[1][name], leaf, rtol=1e-4, atol=1e-5)


def test_fewer_micro_batches_than_workers(one_ray):
    with open_executor(toy.make_program, toy.models(), DistConfig(num_workers=3), device=CPU) as executor:
        local = LocalExecutor(toy.make_program(), toy.models(), CPU)
        for step in range(3):
            batches = [toy.batch(4, step)]
            assert executor.step("main", batches) == local.step("main", batches)


def test_a_snapshot_moves_between_executors(one_ray):
    """Saved with three workers, continued with one process, and the other way round."""
    straight = LocalExecutor(toy.make_program(), toy.models(), CPU)
    toy.drive(straight, 3)
    middle, expected = straight.snapshot(), None
    middle = {name: leaf.clone() for name, leaf in middle.items()}
    expected = toy.drive(straight, 3)
    for dist in (DistConfig(num_workers=3), DistConfig(num_workers=2, num_servers=1)):
        with open_executor(toy.make_program, toy.models(), dist, device=CPU) as executor:
            with pytest.raises(ValueError, match=r"params\.b is missing"):
                executor.restore({name: leaf for name, leaf in middle.items() if name != "params.b"}, 3)
            executor.restore(middle, 3)
            assert executor.version == 3
            assert_same(toy.drive(executor, 3), expected)


def test_workers_have_the_priority_of_their_driver(one_ray):
    """Ray would give them the lowest but four; beside any other program each would then get a thirtieth of a core."""
    import ray

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_what_is_not_finite_is_refused_and_named(one_ray):
    local = LocalExecutor(toy.make_program(), toy.models(), CPU)
    with open_executor(toy.make_program, toy.models(), DistConfig(num_workers=2), device=CPU) as executor:
        batches = [toy.batch(4, number) for number in range(4)]
        executor.step("main", batches)
        local.step("main", batches)
        before = {name: leaf.clone() for name, leaf in executor.snapshot().items()}
        broken = [(inputs.clone(), targets.clone()) for inputs, targets in batches]
        broken[2][1][0] = float("nan")
        messages = []
        for one in (executor, local):
            with pytest.raises(NonFiniteError, match="micro-batch 2") as caught:
                one.step("main", broken)
            assert caught.value.batch is broken[2]
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert all(torch.equal(leaf, before[name]) for name, leaf in executor.snapshot().items())
        assert executor.step("main", batches) == local.step("main", batches)


def test_an_error_of_the_users_function_is_the_users(one_ray):
    """In a map it harms nobody; in a step the others, who wait for the one that failed, are released at once."""
    local = LocalExecutor(toy.make_program(), toy.models(), CPU)
    good, bad = [toy.batch(4, number) for number in range(4)], (torch.ones(2, 3), torch.ones(2))
    with open_executor(toy.make_program, toy.models(), DistConfig(num_workers=2), device=CPU) as executor:
        with pytest.raises(RuntimeError, match=r"size of tensor|mat1 and mat2"):
            executor.map("predict", [bad])
        assert executor.step("main", good) == local.step("main", good)
        assert executor.faults() == []
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"size of tensor|mat1 and mat2"):
            executor.step("main", [*good[:3], bad])
        assert executor.step("main", good) == local.step("main", good)
        assert time.monotonic() - begun < 15
        assert [fault.what for fault in executor.faults()] == ["a collective failed"]


MOMENTS = ("map", "sum_gradients", "reduce", "add_up", "decide", "publish", "snapshot")
TOPOLOGIES = {"colocated": (2, 0), "one server": (2, 1), "two servers": (2, 2)}


def fault_cases():
    """Every moment, who dies, how, and what is done about it; those that no rank can meet are left out."""
    cases = []
    for moment, (name, (workers, servers)) in itertools.product(MOMENTS, TOPOLOGIES.items()):
        owners = range(workers, workers + servers) if servers else range(workers)
        ranks = {"map": range(workers), "add_up": owners, "snapshot": owners}
        for number, rank in enumerate(ranks.get(moment, range(workers + servers))):
            signal = "SIGKILL" if (number + len(moment)) % 2 else "SIGSTOP"
            on_failure = "shrink" if (number + len(name)) % 2 else "replace"
            cases.append((moment, name, rank, signal, on_failure, "gloo" if len(cases) % 3 == 2 else "shared"))
    return cases


FAST = [
    ("map", "colocated", 1, "SIGKILL", "replace", "shared"),
    ("add_up", "colocated", 0, "SIGKILL", "replace", "gloo"),
    ("publish", "one server", 0, "SIGSTOP", "shrink", "gloo"),
    ("publish", "two servers", 3, "SIGKILL", "replace", "shared"),
]


def survive(
    monkeypatch,
    fault,
    moment,
    topology,
    rank,
    signal,
    on_failure,
    backend,
    program=toy.make_program,
    version=4,
    snapshot_every=2,
):
    workers, servers = TOPOLOGIES[topology]
    version += moment == "snapshot"  # of the program's steps; the last snapshot was taken at 3
    fault.write_text(json.dumps({"moment": moment, "rank": rank, "version": version, "signal": signal}))
    monkeypatch.setattr(cluster, "Worker", toy.FaultyWorker)
    topology = {"num_workers": workers, "num_servers": servers, "backend": backend}
    dist = DistConfig(**topology, snapshot_every=snapshot_every, on_failure=on_failure, heartbeat_s=2, timeout_s=20)
    begun = time.monotonic()
    got, expected = run(dist, program=program), run(DistConfig(), program=program)
    assert not fault.exists(), "the fault happened"
    assert_same(got, expected)
    assert len(got[2]) == len(got[3]) == 1
    assert not got[2][0].final
    name = f"worker {rank}" if rank < workers else f"server {rank - workers}"
    assert re.fullmatch(rf"lost {name}; continued after \d+\.\d s", got[3][0])
    assert got[2][0].recovery_s < 15
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("case", FAST, ids=lambda case: "-".join(map(str, case)))
def test_a_lost_process_changes_no_bit(one_ray, monkeypatch, case):
    survive(monkeypatch, one_ray, *case)


def test_frozen_models_updated_before_the_first_snapshot_are_reset_on_the_survivors(one_ray, monkeypatch):
    survive(monkeypatch, one_ray, *FAST[0], version=STEPS, snapshot_every=100)  # the update comes after STEPS


@pytest.mark.slow
@pytest.mark.parametrize("case", FAST[2:], ids=lambda case: "-".join(map(str, case)))
def test_a_lost_process_changes_no_bit_of_a_program_that_clips_apart(one_ray, monkeypatch, case):
    survive(monkeypatch, one_ray, *case, program=APART)


@pytest.mark.slow
@pytest.mark.parametrize("case", fault_cases(), ids=lambda case: "-".join(map(str, case)))
def test_a_lost_process_changes_no_bit_at_any_moment(one_ray, monkeypatch, case):
    survive(monkeypatch, one_ray, *case)
