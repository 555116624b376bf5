"""The parameter server's inside: any cut gives the same bits, and a step is applied once."""

import itertools

import pytest
import torch
from laws import assert_same_bits

from rlhf import random
from rlhf.execution import shard as shard_module
from rlhf.execution.shard import apply, init_shard, slice_shard, update_scale
from rlhf.optim import Optimizer, adamw, clip_scale
from rlhf.schedules import linear_schedule
from rlhf.tree import CHUNK, chunked_squared_norms, flat_layout, flatten, leaves, tree_map, unflatten

OPTIMIZER = adamw(linear_schedule(1e-2, 50), weight_decay=0.1)


def normals(seed: int):
    """A tree with leaves of odd sizes that cross chunks; some of them decay."""
    shapes = ((70, 131), (257,), (257,), (60, 50), (5, 2469))
    a, b, c, d, e = (
        random.normal(random.fold_in(random.key(seed), place), shape) for place, shape in enumerate(shapes)
    )
    return {"wte": {"weight": a}, "ln_1": {"weight": b, "bias": c}, "h": [{"weight": d}, {"weight": e}]}


TREE = normals(1)
LAYOUT = flat_layout(TREE)


def applied(shard, step, gradient, scale=1.0):
    return apply(shard, step, slice_shard(shard, gradient, OPTIMIZER, LAYOUT), scale, OPTIMIZER)


def run(cuts: list[int], steps: int = 5) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Parameters and optimiser state after some steps, with shards cut at these chunks."""
    flat = flatten(TREE, LAYOUT)
    bounds = [0, *(slice_shard * CHUNK for slice_shard in cuts), LAYOUT.size]
    shards = [init_shard(flat, OPTIMIZER, start=a, stop=b) for a, b in itertools.pairwise(bounds)]
    for step in range(steps):
        gradient = flatten(normals(10 + step), LAYOUT)
        squares = torch.cat([chunked_squared_norms(gradient[a:b]) for a, b in itertools.pairwise(bounds)])
        scale, _ = update_scale(squares, 3.0, 0.5)
        shards = [
            applied(shard, step, gradient[shard.start : shard.start + len(shard.params)], scale) for shard in shards
        ]
    states = [leaves(shard.opt_state) for shard in shards]
    return torch.cat([s.params for s in shards]), [
        torch.cat(p) if p[0].ndim else p[0] for p in zip(*states, strict=True)
    ]


@pytest.mark.parametrize("cuts", [[1], [3], [1, 2, 5], [2, 4, 6], [0], [0, 3, 3]], ids=str)
def test_apply_gives_the_same_bits_for_any_cut(cuts):
    params, state = run([])
    cut_params, cut_state = run(cuts)
    assert torch.equal(params, cut_params)
    assert all(torch.equal(a, b) for a, b in zip(state, cut_state, strict=True))


def test_invariant_14_apply_equals_the_optimiser_on_the_tree():
    params, state = TREE, OPTIMIZER.init(TREE)
    for step in range(5):
        gradient = normals(10 + step)
        norm = torch.cat([leaf.flatten() for leaf in leaves(gradient)]).double().norm() / 3.0
        scale = min(1.0, 0.5 / (norm.item() + 1e-6)) / 3.0
        params, state = OPTIMIZER.update(tree_map(lambda g, s=scale: g * s, gradient), state, params)
    flat, (count, mu, nu) = run([])
    assert count.item() == 5
    for got, expected in ((flat, params), (mu, state.mu), (nu, state.nu)):
        for one, two in zip(leaves(unflatten(got, LAYOUT)), leaves(expected), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group", [CHUNK // 8, 3 * CHUNK])
def test_apply_gives_the_same_bits_for_any_group_size(group, monkeypatch):
    params, _ = run([])
    monkeypatch.setattr("rlhf.execution.shard._GROUP", group)
    assert torch.equal(run([])[0], params)


def test_apply_without_kernels_is_the_optimisers_update(monkeypatch):
    params, state = run([])
    monkeypatch.setattr(shard_module, "write_update", shard_module.write_update.__wrapped__)
    pure_params, pure_state = run([])
    torch.testing.assert_close(pure_params, params, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pure_state, state, rtol=1e-5, atol=1e-7)
    tree, state = TREE, OPTIMIZER.init(TREE)
    for step in range(5):
        gradient = flatten(normals(10 + step), LAYOUT)
        scale, _ = update_scale(chunked_squared_norms(gradient), 3.0, 0.5)
        tree, state = OPTIMIZER.update(tree_map(lambda g, s=scale: g * s, normals(10 + step)), state, tree)
    for one, two in zip(
        (unflatten(pure_params, LAYOUT), *(unflatten(s, LAYOUT) for s in pure_state[1:])),
        (tree, state.mu, state.nu),
        strict=True,
    ):
        assert_same_bits(one, two)


def test_masks_read_names_and_shapes_of_whole_leaves_however_they_are_cut(monkeypatch):
    """By structure, by size, and by a name; the parts in a shard show none of them."""

    def mask(params):
        wide = tree_map(lambda leaf: leaf.numel() > 10_000, params)
        return wide | {"ln_1": {"weight": True, "bias": False}}

    seen = []

    def multiplier(params):
        seen.append(flat_layout(params))
        return tree_map(lambda leaf: 0.5 if leaf.ndim == 1 else 1.0, params)

    optimizer = adamw(linear_schedule(1e-2, 50), weight_decay=0.5, weight_decay_mask=mask, lr_multiplier=multiplier)
    monkeypatch.setattr(f"{__name__}.OPTIMIZER", optimizer)
    params, _ = run([])
    assert seen == [LAYOUT], "computed once"
    assert torch.equal(run([1, 2, 5])[0], params)
    tree, state = TREE, optimizer.init(TREE)
    for step in range(5):
        gradient = flatten(normals(10 + step), LAYOUT)
        scale, _ = update_scale(chunked_squared_norms(gradient), 3.0, 0.5)
        tree, state = optimizer.update(tree_map(lambda g, s=scale: g * s, normals(10 + step)), state, tree)
    torch.testing.assert_close(unflatten(params, LAYOUT), tree, rtol=1e-5, atol=1e-7)


def test_apply_of_an_optimiser_that_takes_no_learning_rate_and_treats_all_leaves_alike():
    plain = Optimizer(lambda params: (), lambda grads, state, params: (tree_map(torch.sub, params, grads), state))
    shard = init_shard(flatten(TREE, LAYOUT), plain)
    apply(shard, 0, slice_shard(shard, flatten(normals(2), LAYOUT), plain, LAYOUT), 0.5, plain)
    assert_same_bits(unflatten(shard.params, LAYOUT), tree_map(lambda p, g: p - g * 0.5, TREE, normals(2)))


def test_apply_is_exactly_once():
    flat, gradient = flatten(TREE, LAYOUT), flatten(normals(2), LAYOUT)
    shard = applied(init_shard(flat, OPTIMIZER), 0, gradient)
    before = shard.params.clone()
    assert applied(shard, 0, gradient) is shard
    assert torch.equal(shard.params, before)
    assert shard.version == 1
    for step in (2, 7, -1):
        with pytest.raises(ValueError, match=f"apply: step is {step}, expected 1"):
            applied(shard, step, gradient)


def test_init_shard_does_not_alias_and_refuses_other_cuts():
    flat = flatten(TREE, LAYOUT)
    shard = init_shard(flat, OPTIMIZER)
    shard.params.zero_()
    assert flat.any()
    with pytest.raises(ValueError, match="multiples of 4096"):
        init_shard(flat, OPTIMIZER, start=100)


def test_update_scale_is_mean_and_clip():
    squares = torch.tensor([9.0, 16.0], dtype=torch.float64)
    assert update_scale(squares, 2.0, float("inf")) == (0.5, 2.5)
    scale, norm = update_scale(squares, 2.0, 1.0)
    assert norm == 2.5
    assert scale == pytest.approx(1 / 2.5 / 2, rel=1e-5)


@pytest.mark.parametrize("count", [0.0, 1.0, 3.0, 997.0])
@pytest.mark.parametrize("max_norm", [0.3, 1.0, float("inf")])
def test_update_scale_has_the_bits_of_the_formula_in_python_numbers(count, max_norm):
    squares = torch.linspace(0.1, 7.0, 11, dtype=torch.float64)
    norm = float(squares.sum().sqrt()) / (count or 1.0)
    assert update_scale(squares, count, max_norm) == (min(1.0, max_norm / (norm + 1e-6)) / (count or 1.0), norm)
    assert float(clip_scale(torch.tensor(norm, dtype=torch.float64), max_norm)) == min(1.0, max_norm / (norm + 1e-6))


def test_update_scale_of_nothing_is_finite():
    assert update_scale(torch.zeros(2, dtype=torch.float64), 0.0, 1.0) == (1.0, 0.0)
