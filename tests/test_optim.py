import math
from itertools import pairwise

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import TOLERANCE, assert_close, assert_pure, assert_same_bits, floats
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf import random
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.heads import init_reward_head, init_value_head
from rlhf.optim import AdamState, adamw, clip_by_global_norm, clip_scale
from rlhf.schedules import constant_schedule, cosine_schedule
from rlhf.tree import flat_layout, global_norm, leaves, named_leaves, tree_map, tree_map_named

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
DECAYING = ("h.0.attn.c_attn.weight", "wte.weight")


def example_params(*, dtype=torch.float64):
    return {
        "wte": {"weight": floats(1, 5, 4, dtype=dtype)},
        "h": [{"ln_1": {"weight": floats(2, 4, dtype=dtype)}, "attn": {"c_attn": linear_params(dtype)}}],
    }


def linear_params(dtype):
    return {"weight": floats(3, 4, 6, dtype=dtype), "bias": floats(4, 6, dtype=dtype)}


def example_grads(params, step):
    """Gradients of very different sizes."""
    return tree_map(lambda leaf: floats(10 + step, *leaf.shape, dtype=leaf.dtype) * 10.0 ** (step % 5 - 3), params)


def halves(params):
    return tree_map(lambda leaf: 0.5, params)


def run(optimizer, params, steps, *, update=None):
    state = optimizer.init(params)
    for step in range(steps):
        params, state = (update or optimizer.update)(example_grads(params, step), state, params)
    return params, state


@pytest.mark.parametrize(
    "make_schedule",
    [lambda: constant_schedule(1e-2), lambda: cosine_schedule(1e-2, 100, warmup_steps=10, final=1e-4)],
    ids=["constant", "cosine"],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)], ids=["b999", "b95"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_adamw_equals_torch(make_schedule, weight_decay, eps, betas, dtype, tolerance):
    schedule = make_schedule()
    params = example_params(dtype=dtype)
    theirs = {name: leaf.clone().requires_grad_() for name, leaf in named_leaves(params).items()}
    groups = [
        {"params": [leaf for name, leaf in theirs.items() if (name in DECAYING) == decays], "weight_decay": decay}
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    reference = torch.optim.AdamW(groups, betas=betas, eps=eps, foreach=False)
    optimizer = adamw(schedule, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay)
    state = optimizer.init(params)
    for step in range(100):
        grads = example_grads(params, step)
        for name, grad in named_leaves(grads).items():
            theirs[name].grad = grad
        for group in reference.param_groups:
            group["lr"] = float(schedule(torch.tensor(step)))
        reference.step()
        params, state = optimizer.update(grads, state, params)
    assert_close(named_leaves(params), theirs, tolerance)
    assert state.step == 100


@DTYPES
@given(
    b1=st.floats(0.0, 0.99),
    b2=st.floats(0.0, 0.999),
    eps=st.floats(1e-6, 1.0),
    weight_decay=st.floats(0.0, 0.5),
    warmup_steps=st.integers(0, 3),
)
def test_adamw_value(dtype, b1, b2, eps, weight_decay, warmup_steps):
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    params = {"w": floats(5, 4, dtype=dtype)}
    schedule = constant_schedule(1e-2, warmup_steps=warmup_steps)
    found, _ = run(adamw(schedule, weight_decay_mask=lambda params: {"w": True}, **options), params, 8)
    gradients = torch.stack([example_grads(params, step)["w"] for step in range(8)])
    rates = [oracles.warmed(1e-2, step, warmup_steps) for step in range(8)]
    expected = [oracles.adamw(float(params["w"][at]), gradients[:, at].tolist(), rates, **options) for at in range(4)]
    assert_close(found["w"], expected, TOLERANCE[dtype])


def test_adamw_defaults():
    explicit = adamw(constant_schedule(1e-2), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    assert_same_bits(run(adamw(constant_schedule(1e-2)), example_params(), 3), run(explicit, example_params(), 3))


def test_adamw_decays_matrices_alone():
    params = example_params()
    zero = tree_map(torch.zeros_like, params)
    optimizer = adamw(constant_schedule(0.5), weight_decay=0.1)
    found, _ = optimizer.update(zero, optimizer.init(params), params)
    for name, leaf in named_leaves(found).items():
        before = named_leaves(params)[name]
        assert_close(leaf, before * 0.95 if name in DECAYING else before)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda params: tree_map_named(lambda name, leaf: name.endswith("ln_1.weight"), params), ["h.0.ln_1.weight"]),
        (lambda params: tree_map(lambda leaf: leaf.shape == (5, 4), params), ["wte.weight"]),
        (lambda params: tree_map(lambda leaf: False, params), []),
    ],
    ids=["by_name", "by_shape", "none"],
)
def test_adamw_decays_what_the_mask_says(mask, expected):
    params = example_params()
    optimizer = adamw(constant_schedule(0.5), weight_decay=0.1, weight_decay_mask=mask)
    found, _ = optimizer.update(tree_map(torch.zeros_like, params), optimizer.init(params), params)
    changed = [name for name, leaf in named_leaves(found).items() if not torch.equal(leaf, named_leaves(params)[name])]
    assert changed == expected


def test_adamw_decays_of_gpt2_all_but_biases_and_norms():
    """As OpenAI's names tell them, in all trees that are trained."""
    key = random.key(0)
    trunk = gpt2.init(GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=2, n_head=2), key=key)
    reward = {"trunk": trunk, "head": init_reward_head(8, key=key)}
    params = {"policy": trunk, "value_head": init_value_head(8), "critic": reward | {"head": init_value_head(8)}}
    for tree in (trunk, reward, params):
        records = adamw(constant_schedule(0.1), weight_decay=0.1).hyperparameters(tree)
        decaying = {name for name, record in named_leaves(records).items() if record.weight_decay}
        names = flat_layout(tree).names
        assert decaying == {name for name in names if not name.endswith("bias") and "ln_" not in name}
        assert 0 < len(decaying) < len(names)


def test_adamw_lr_multiplier_0_keeps_the_bits_of_a_leaf():
    def multiplier(params):
        return tree_map_named(lambda name, leaf: 0.0 if name.startswith("h.") else 1.0, params)

    params = example_params(dtype=torch.float32)
    params["h"][0]["attn"]["c_attn"]["bias"].fill_(-0.0)  # adding 0.0 would change its sign
    found, _ = run(adamw(constant_schedule(1e-2), weight_decay=0.1, lr_multiplier=multiplier), params, 5)
    everywhere, _ = run(adamw(constant_schedule(1e-2), weight_decay=0.1), params, 5)
    assert_same_bits(found["h"], params["h"])
    assert_same_bits(found["wte"], everywhere["wte"])


def test_adamw_takes_the_callers_learning_rate_in_place_of_the_schedules():
    params, grads = {"w": torch.ones(4, 4)}, {"w": torch.linspace(-1, 1, 16).view(4, 4)}
    scheduled, other = (adamw(constant_schedule(rate), weight_decay=0.1) for rate in (0.5, 0.1))
    found, _ = other.update(grads, other.init(params), params, learning_rate=0.5)
    assert_same_bits(found, scheduled.update(grads, scheduled.init(params), params)[0])


def test_adamw_takes_the_hyperparameters_of_whole_leaves_for_parts_of_them():
    params, grads = {"w": floats(1, 8, 2)}, {"w": floats(2, 8, 2)}
    optimizer = adamw(constant_schedule(0.1), weight_decay=0.1)
    whole, _ = optimizer.update(grads, optimizer.init(params), params)
    part, part_grads = {"w": params["w"].view(-1)[:6]}, {"w": grads["w"].view(-1)[:6]}
    records = optimizer.hyperparameters(params)
    found, _ = optimizer.update(part_grads, optimizer.init(part), part, hyperparameters=records)
    assert_same_bits(found["w"], whole["w"].view(-1)[:6])


def test_adamw_lr_multiplier_multiplies_the_rate():
    found, _ = run(adamw(constant_schedule(1e-2), weight_decay=0.1, lr_multiplier=halves), example_params(), 5)
    assert_same_bits(found, run(adamw(constant_schedule(5e-3), weight_decay=0.1), example_params(), 5)[0])


def test_invariant_12_learning_rate_0_keeps_the_bits_of_all_parameters():
    params = example_params(dtype=torch.float32)
    found, _ = run(adamw(constant_schedule(0.0), weight_decay=0.1), params, 5)
    assert_same_bits(found, params)


def test_adamw_pairs_leaves_by_name_whatever_the_order_of_keys():
    params = {"a": torch.zeros(4), "b": torch.zeros(4)}
    grads = {"b": torch.full((4,), -1.0), "a": torch.ones(4)}
    optimizer = adamw(constant_schedule(0.1))
    found, _ = optimizer.update(grads, optimizer.init(params), params)
    assert (found["a"] < 0).all()
    assert (found["b"] > 0).all()


def test_adamw_zero_gradient_and_zero_decay_keep_the_bits_of_all_parameters():
    params = example_params(dtype=torch.float32)
    optimizer = adamw(constant_schedule(1e-2))
    state = optimizer.init(params)
    found = params
    for _ in range(3):
        found, state = optimizer.update(tree_map(torch.zeros_like, params), state, found)
    assert_same_bits(found, params)


def cut(tree, part):
    return tree_map(lambda leaf: leaf[part] if leaf.ndim else leaf, tree)


def joined(trees):
    return tree_map(lambda *parts: torch.cat(parts) if parts[0].ndim else parts[0], *trees)


@given(cuts=st.sets(st.integers(1, 5002), max_size=6))
def test_adamw_bits_do_not_depend_on_how_a_buffer_is_cut(cuts):
    """Odd sizes leave tails for the processor's vectors, which must round as their bodies do."""
    parts = [slice(start, stop) for start, stop in pairwise([0, *sorted(cuts | {1, 8}), 5003])]
    optimizer = adamw(cosine_schedule(1e-2, 10, warmup_steps=2), weight_decay=0.1)
    params = {"w": floats(6, 5003, dtype=torch.float32)}
    whole = pieces = params, optimizer.init(params)
    for step in range(3):
        grads = {"w": floats(20 + step, 5003, dtype=torch.float32)}
        whole = optimizer.update(grads, whole[1], whole[0])
        pieces = joined(
            [optimizer.update(cut(grads, part), cut(pieces[1], part), cut(pieces[0], part)) for part in parts]
        )
    assert_same_bits(pieces, whole)


def test_adamw_init_is_zero():
    state = adamw(constant_schedule(1.0)).init(example_params())
    zeros = tree_map(torch.zeros_like, example_params())
    assert_same_bits(state, AdamState(torch.tensor(0), zeros, zeros))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
def test_adamw_keeps_the_tree_shapes_and_dtypes(dtype):
    params = example_params(dtype=dtype) | {"log_temperature": torch.tensor(0.5, dtype=dtype)}
    optimizer = adamw(cosine_schedule(1e-2, 10), weight_decay=0.1)
    state = optimizer.init(params)
    found = optimizer.update(example_grads(params, 0), state, params)

    def kinds(tree):
        return tree_map(lambda leaf: (str(leaf.dtype), tuple(leaf.shape)), tree)

    assert kinds(found) == kinds((params, state))


def test_adamw_is_pure():
    params = example_params()
    optimizer = adamw(constant_schedule(1e-2), weight_decay=0.1)
    _, state = run(optimizer, params, 2)
    assert_pure(optimizer.init, params)
    assert_pure(optimizer.update, example_grads(params, 2), state, params)


def test_adamw_compiles_once_for_all_steps_and_keeps_its_bits():
    torch.compiler.reset()
    optimizer = adamw(cosine_schedule(1e-2, 10, warmup_steps=2), weight_decay=0.1, lr_multiplier=halves)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimizer.update, backend=counter, fullgraph=True)
    params = example_params(dtype=torch.float32)
    assert_same_bits(run(optimizer, params, 5, update=compiled), run(optimizer, params, 5))
    assert counter.frame_count == 1


def test_adamw_converges_on_a_parabola():
    target = {"w": torch.tensor([3.0, -2.0]), "b": torch.tensor([100.0])}
    params = tree_map(torch.zeros_like, target)
    optimizer = adamw(cosine_schedule(2.0, 300))
    state = optimizer.init(params)
    for _ in range(300):
        params, state = optimizer.update(tree_map(torch.sub, params, target), state, params)
    assert_close(params, target, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1 is 1.0, expected in \[0, 1\)"),
        ({"b1": -0.1}, r"b1 is -0.1, expected in \[0, 1\)"),
        ({"b2": 1.0}, r"b2 is 1.0, expected in \[0, 1\)"),
        ({"b2": -0.1}, r"b2 is -0.1, expected in \[0, 1\)"),
        ({"eps": 0.0}, "eps is 0.0, expected above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected at least 0"),
    ],
    ids=["b1_above", "b1_below", "b2_above", "b2_below", "eps", "weight_decay"],
)
def test_adamw_rejects(options, message):
    with pytest.raises(ValueError, match=f"^adamw: {message}$"):
        adamw(constant_schedule(1.0), **options)


@DTYPES
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 5.0, 1e3])
def test_clip_by_global_norm_equals_torch(dtype, max_norm):
    grads = tree_map(lambda leaf: 0.5 * leaf, example_params(dtype=dtype))
    theirs = [torch.zeros_like(leaf, requires_grad=True) for leaf in leaves(grads)]
    for parameter, grad in zip(theirs, leaves(grads), strict=True):
        parameter.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    found, found_norm = clip_by_global_norm(grads, max_norm)
    assert_close(leaves(found), [parameter.grad for parameter in theirs], TOLERANCE[dtype])
    assert_close(found_norm, norm, TOLERANCE[dtype])
    assert (found_norm.dtype, found_norm.shape) == (torch.float64, ())


@pytest.mark.parametrize("max_norm", [20.0, math.inf])
def test_clip_by_global_norm_keeps_the_bits_of_small_gradients(max_norm):
    grads = example_params(dtype=torch.float32)
    assert global_norm(grads) < 20.0
    assert_same_bits(clip_by_global_norm(grads, max_norm)[0], grads)


def test_clip_by_global_norm_without_limit_keeps_what_is_not_finite():
    grads = {"w": torch.tensor([1.0, math.inf])}
    assert_same_bits(clip_by_global_norm(grads, math.inf)[0], grads)


def test_clip_by_global_norm_brings_large_gradients_to_the_norm_in_their_direction():
    grads = tree_map(lambda leaf: 1e6 * leaf, example_params())
    clipped, _ = clip_by_global_norm(grads, 2.0)
    assert_close(global_norm(clipped), 2.0, 1e-10)
    assert_close(tree_map(lambda leaf: leaf / 2.0, clipped), tree_map(lambda leaf: leaf / global_norm(grads), grads))


def test_clip_by_global_norm_of_a_part_uses_the_norm_of_the_whole():
    grads = example_params()
    whole, norm = clip_by_global_norm(grads, 0.5)
    part, part_norm = clip_by_global_norm(grads["h"], 0.5, norm=global_norm(grads))
    assert_same_bits(part, whole["h"])
    assert_same_bits(part_norm, norm)
    assert clip_by_global_norm(grads, 0.5, norm=torch.tensor(2.0))[1].dtype == torch.float64


def test_clip_by_global_norm_of_nothing_but_zeros_is_zero():
    found, norm = clip_by_global_norm(tree_map(torch.zeros_like, example_params()), 1.0)
    assert not any(leaf.any() for leaf in leaves(found))
    assert norm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_clip_by_global_norm_keeps_dtypes(dtype):
    found, _ = clip_by_global_norm(example_params(dtype=dtype), 0.1)
    assert {leaf.dtype for leaf in leaves(found)} == {dtype}


def test_clip_by_global_norm_is_pure():
    assert_pure(lambda grads: clip_by_global_norm(grads, 0.5), example_params())


def test_clip_by_global_norm_compiles():
    grads = example_params()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: clip_by_global_norm(x, 0.5), backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(grads), clip_by_global_norm(grads, 0.5))


@pytest.mark.parametrize("norm", [0.0, 0.3, 2.0, 1e9, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 2.0, math.inf])
def test_clip_scale_value(norm, max_norm):
    found = clip_scale(torch.tensor(norm, dtype=torch.float64), max_norm)
    expected = 1.0 if max_norm == math.inf else min(1.0, max_norm / (norm + 1e-6))
    assert (found.item(), found.dtype) == (expected, torch.float64)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_clip_by_global_norm_rejects(max_norm):
    with pytest.raises(ValueError, match=rf"^clip_by_global_norm: max_norm is {max_norm}, expected above 0$"):
        clip_by_global_norm(example_params(), max_norm)
