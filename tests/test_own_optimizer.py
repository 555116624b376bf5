"""An optimiser of the user's, nothing but (init, update), through every executor: the bits of a plain loop."""

import os

import pytest
import sgd
import torch
import toy
from laws import assert_same_bits

from rlhf.config import DistConfig
from rlhf.distributed import connected, open_executor
from rlhf.execution import shard
from rlhf.execution.executor import LocalExecutor
from rlhf.tree import chunked_squared_norms, flat_layout, flatten, named_leaves, realign, tree_map, tree_sum

CPU = torch.device("cpu")
STEPS, HALF = 6, 3
RATES = [None, 2e-3, None, 5e-4, None, None]
BATCHES = [[toy.batch(6, 10 * step + number) for number in range(5)] for step in range(STEPS)]


@pytest.fixture(scope="module")
def one_ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(toy.__file__))
        with connected(DistConfig(num_workers=2)):
            yield


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_loop():
    """Parameters and momentum, on whole trees, with gradients clipped as the program says."""
    models, program = realign(toy.models()), sgd.make_program()
    spec, frozen = program.steps["main"], {name: program.prepare_frozen(name, m) for name, m in models.frozen.items()}
    params, layout = models.params, flat_layout(models.params)
    state = sgd.init(params)
    differentiate = torch.func.grad_and_value(spec.objective, has_aux=True)
    for batches, rate in zip(BATCHES, RATES, strict=True):
        results = [differentiate(params, frozen, realign(batch)) for batch in batches]
        total = tree_sum(grads for grads, _ in results)
        count = sum(float(metrics["count"]) for _, (_, metrics) in results)
        norm = chunked_squared_norms(flatten(total, layout)).sum().sqrt().item() / count
        scale = min(1.0, spec.max_grad_norm / (norm + 1e-6)) / count
        assert scale < 1 / count, "it clips"
        grads = tree_map(lambda grad, scale=scale: grad * scale, total)
        params, state = sgd.update(grads, state, params, learning_rate=rate)
    return named_leaves({"params": params, "optimizer": state})


def go_on(executor, steps):
    for step in steps:
        executor.step("main", BATCHES[step], RATES[step])
    return {name: leaf.clone() for name, leaf in executor.snapshot().items()}


def trained(state):
    return {name: leaf for name, leaf in state.items() if not name.startswith("frozen.")}


def test_it_gives_the_bits_of_a_plain_loop_and_resumes_to_them_anywhere(one_ray):
    expected, halves = plain_loop(), []
    for workers in (0, 2):
        dist = DistConfig(num_workers=workers)
        with open_executor(sgd.make_program, toy.models(), dist, device=CPU) as executor:
            halves.append(go_on(executor, range(HALF)))
            assert_same_bits(trained(go_on(executor, range(HALF, STEPS))), expected)
    assert_same_bits(*halves)
    for workers in (0, 2):
        dist = DistConfig(num_workers=workers)
        with open_executor(sgd.make_program, toy.models(), dist, device=CPU) as executor:
            executor.restore(halves[0], HALF)
            assert_same_bits(trained(go_on(executor, range(HALF, STEPS))), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_optimiser_that_needs_whole_leaves_is_refused_by_name(one_ray, workers):
    dist = DistConfig(num_workers=workers)
    with (
        pytest.raises(
            ValueError, match=r"^step 'needy': its optimizer \(sgd\.update\) has elementwise=False, .*rlhf.adamw"
        ),
        open_executor(sgd.make_whole_leaves_program, toy.models(), dist, device=CPU),
    ):
        pass


def test_without_kernels_nothing_changes(monkeypatch):
    """The optimiser is not one that any kernel knows."""
    local = LocalExecutor(sgd.make_program(), toy.models(), CPU)
    found = go_on(local, range(2))
    monkeypatch.setattr(shard, "write_update", shard.write_update.__wrapped__)
    assert_same_bits(go_on(LocalExecutor(sgd.make_program(), toy.models(), CPU), range(2)), found)
