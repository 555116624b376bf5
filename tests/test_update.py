"""The decision about a step: clipping together and apart."""

import functools
import math

import pytest
import torch
import toy
from laws import assert_same_bits

from rlhf import random
from rlhf.execution.executor import LocalExecutor
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.execution.update import clip_models, model_ranges, plan_update
from rlhf.optim import Optimizer
from rlhf.tree import CHUNK, chunked_squared_norms, flat_layout, flatten, leaves, tree_map, unflatten

CPU = torch.device("cpu")
SGD = Optimizer(lambda params: (), lambda grads, state, params: (tree_map(torch.sub, params, grads), state))
PARAMS = {
    "policy": {"w": torch.zeros(70, 60), "b": torch.zeros(5)},
    "critic": {"w": torch.zeros(90, 50), "b": torch.zeros(3)},
}


def linear(params, frozen, batch):
    """A loss whose gradient is the batch."""
    products = tree_map(lambda weight, gradient: (weight * gradient).sum(), params, batch["gradients"])
    return torch.stack(leaves(products)).sum(), {"count": batch["count"]}


def gradients(seed, critic=1.0):
    key = random.fold_in(random.key(7), seed)
    tree = tree_map(lambda leaf: random.normal(random.fold_in(key, leaf.numel()), leaf.shape), PARAMS)
    return tree | {"critic": tree_map(lambda leaf: critic * leaf, tree["critic"])}


def stepped(max_norm, batches):
    program = Program({"main": StepSpec(linear, SGD, max_norm)}, {}, {})
    executor = LocalExecutor(program, ModelState(PARAMS, {}), CPU)
    metrics = executor.step("main", batches)
    return executor.params(), metrics


def batches_of(seeds, critic=1.0):
    return [{"gradients": gradients(seed, critic), "count": torch.tensor(3)} for seed in seeds]


def clipped_by_torch(seeds, critic, limits):
    """(-gradient of each model, its norm) by `torch.nn.utils.clip_grad_norm_` in float64."""
    found, norms = {}, {}
    for name, limit in limits.items():
        parts = [leaves(gradients(seed, critic)[name]) for seed in seeds]
        weights = [torch.nn.Parameter(torch.zeros_like(leaf, dtype=torch.float64)) for leaf in parts[0]]
        for place, weight in enumerate(weights):
            weight.grad = sum(part[place].double() for part in parts) / (3 * len(seeds))
        norms[name] = float(torch.nn.utils.clip_grad_norm_(weights, limit))
        found[name] = [-weight.grad.float() for weight in weights]
    return found, norms


@pytest.mark.parametrize("limits", [(1.0, 0.5), (math.inf, 0.5), (1e3, 1e3)])
@pytest.mark.parametrize("critic", [1.0, 1e3])
def test_models_clipped_apart_are_each_clipped_as_torch_does(limits, critic):
    limits = dict(zip(("policy", "critic"), limits, strict=True))
    params, metrics = stepped(limits, batches_of(range(3), critic))
    expected, norms = clipped_by_torch(range(3), critic, limits)
    for name in limits:
        torch.testing.assert_close(leaves(params[name]), expected[name], rtol=1e-5, atol=1e-6 * critic)
        assert metrics[f"grad_norm/{name}"] == pytest.approx(norms[name], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-5)


def test_a_large_value_loss_shrinks_the_policys_step_only_if_both_are_clipped_together():
    apart = [stepped({"policy": 1.0, "critic": 1.0}, batches_of([0], critic))[0]["policy"] for critic in (1.0, 1e4)]
    assert_same_bits(*apart)
    together = [stepped(1.0, batches_of([0], critic))[0]["policy"]["w"].norm() for critic in (1.0, 1e4)]
    assert together[1] < 1e-3 * together[0]


def test_clipping_together_has_the_layout_and_logs_the_norm_as_before():
    program = Program({"main": StepSpec(linear, SGD, 1.0)}, {}, {})
    assert program.layout(PARAMS) == flat_layout(PARAMS)
    assert stepped(1.0, batches_of([0]))[1].keys() == {"grad_norm"}


@pytest.mark.parametrize("names", [["policy"], ["policy", "critic", "other"], []])
def test_limits_name_every_model(names):
    program = Program({"main": StepSpec(linear, SGD, dict.fromkeys(names, 1.0))}, {}, {})
    with pytest.raises(ValueError, match=r"max_grad_norm has the keys \[.*\], expected \['critic', 'policy'\]"):
        program.layout(PARAMS)


def test_any_cut_into_shards_gives_the_bits_of_the_whole():
    limits = {"policy": 0.5, "critic": 0.25}
    spec = StepSpec(linear, SGD, limits)
    layout = Program({"main": spec}, {}, {}).layout(PARAMS)
    gradient = flatten(gradients(0), layout)
    table = torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64)
    update = plan_update(table, chunked_squared_norms(gradient), spec, layout)
    assert model_ranges(layout) == {"critic": (0, 2 * CHUNK), "policy": (2 * CHUNK, 4 * CHUNK)}
    whole = gradient.clone()
    clip_models(whole, update, layout)
    for cut in range(0, layout.size + 1, CHUNK):
        parts = [gradient[:cut].clone(), gradient[cut:].clone()]
        for start, part in zip((0, cut), parts, strict=True):
            clip_models(part, update, layout, start=start)
        assert torch.equal(torch.cat(parts), whole)
    tree, expected = unflatten(whole, layout), gradients(0)
    for name, factor in update.model_factors.items():
        assert factor < 1
        assert_same_bits(tree[name], tree_map(lambda leaf, f=factor: leaf * f, expected[name]))


def test_a_gradient_that_is_not_finite_in_one_model_refuses_the_step():
    table = torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64)
    spec = StepSpec(linear, SGD, {"policy": 1.0, "critic": 1.0})
    layout = Program({"main": spec}, {}, {}).layout(PARAMS)
    squares = chunked_squared_norms(flatten(gradients(0, critic=math.inf), layout))
    assert not plan_update(table, squares, spec, layout).is_finite


def test_adam_with_a_factor_of_one_is_adam_without_clipping():
    program = functools.partial(toy.make_program, {"w": math.inf, "b": math.inf})
    results = []
    for make in (program, functools.partial(toy.make_program, math.inf)):
        executor = LocalExecutor(make(), toy.models(), CPU)
        executor.step("main", [toy.batch(6, 1), toy.batch(6, 2)])
        results.append(executor.params())
    assert_same_bits(*results)
