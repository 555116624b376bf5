import math
from itertools import pairwise

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import TOLERANCE, assert_close, assert_pure, assert_same_bits, floats
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf.optim import AdamState, adamw, clip_by_global_norm, is_matrix
from rlhf.schedules import constant_schedule, cosine_schedule
from rlhf.tree import global_norm, leaves, named_leaves, tree_map

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


def run(optimizer, params, steps, *, update=None, in_place=False):
    state = optimizer.init(params)
    if in_place:
        params = tree_map(torch.clone, params)
        for step in range(steps):
            larger = tree_map(lambda grad: 4.0 * grad, example_grads(params, step))
            state = optimizer.update_inplace(larger, state, params, 0.25)
        return params, state
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
    found, _ = run(adamw(constant_schedule(1e-2, warmup_steps=warmup_steps), **options), params, 8)
    gradients = torch.stack([example_grads(params, step)["w"] for step in range(8)])
    rates = [oracles.warmed(1e-2, step, warmup_steps) for step in range(8)]
    expected = [oracles.adamw(float(params["w"][at]), gradients[:, at].tolist(), rates, **options) for at in range(4)]
    assert_close(found["w"], expected, TOLERANCE[dtype])


def test_adamw_defaults():
    explicit = adamw(constant_schedule(1e-2), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, decays=is_matrix)
    assert_same_bits(run(adamw(constant_schedule(1e-2)), example_params(), 3), run(explicit, example_params(), 3))


def test_adamw_decays_matrices_alone():
    params = example_params()
    zero = tree_map(torch.zeros_like, params)
    optimizer = adamw(constant_schedule(0.5), weight_decay=0.1)
    found, _ = optimizer.update(zero, optimizer.init(params), params)
    for name, leaf in named_leaves(found).items():
        before = named_leaves(params)[name]
        assert_close(leaf, before * 0.95 if name in DECAYING else before)


def test_adamw_decays_what_it_is_told():
    params = example_params()
    optimizer = adamw(constant_schedule(0.5), weight_decay=0.1, decays=lambda name: name.endswith("ln_1.weight"))
    found, _ = optimizer.update(tree_map(torch.zeros_like, params), optimizer.init(params), params)
    changed = [name for name, leaf in named_leaves(found).items() if not torch.equal(leaf, named_leaves(params)[name])]
    assert changed == ["h.0.ln_1.weight"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wte.weight", True),
        ("wpe.weight", True),
        ("h.0.attn.c_attn.weight", True),
        ("critic.head.weight", True),
        ("h.0.attn.c_attn.bias", False),
        ("h.0.ln_1.weight", False),
        ("h.11.ln_2.bias", False),
        ("ln_f.weight", False),
        ("value_head.bias", False),
    ],
)
def test_is_matrix_value(name, expected):
    assert is_matrix(name) is expected


@pytest.mark.parametrize("in_place", [False, True], ids=["pure", "in_place"])
def test_adamw_rate_scale_0_keeps_the_bits_of_a_leaf(in_place):
    def scale(name):
        return 0.0 if name.startswith("h.") else 1.0

    params = example_params(dtype=torch.float32)
    params["h"][0]["attn"]["c_attn"]["bias"].fill_(-0.0)  # adding 0.0 would change its sign
    found, _ = run(adamw(constant_schedule(1e-2), weight_decay=0.1, lr_multiplier=scale), params, 5, in_place=in_place)
    everywhere, _ = run(adamw(constant_schedule(1e-2), weight_decay=0.1), params, 5, in_place=in_place)
    assert_same_bits(found["h"], params["h"])
    assert_same_bits(found["wte"], everywhere["wte"])


@pytest.mark.parametrize("in_place", [False, True])
def test_adamw_takes_the_callers_rate_in_place_of_the_schedules(in_place):
    params = {"w": torch.ones(16)}
    grads = {"w": torch.linspace(-1, 1, 16)}
    results = []
    for schedule, options in ((constant_schedule(0.5), {}), (constant_schedule(0.1), {"rate": 0.5})):
        optimizer, own = adamw(schedule, weight_decay=0.1), tree_map(torch.clone, params)
        state = optimizer.init(own)
        if in_place:
            optimizer.update_inplace(tree_map(torch.clone, grads), state, own, 1.0, **options)
        else:
            own, _ = optimizer.update(grads, state, own, **options)
        results.append(own["w"])
    assert torch.equal(*results)


def test_adamw_rate_scale_multiplies_the_rate():
    found, _ = run(
        adamw(constant_schedule(1e-2), weight_decay=0.1, lr_multiplier=lambda name: 0.5), example_params(), 5
    )
    assert_same_bits(found, run(adamw(constant_schedule(5e-3), weight_decay=0.1), example_params(), 5)[0])


@pytest.mark.parametrize("in_place", [False, True], ids=["pure", "in_place"])
def test_invariant_12_learning_rate_0_keeps_the_bits_of_all_parameters(in_place):
    params = example_params(dtype=torch.float32)
    found, _ = run(adamw(constant_schedule(0.0), weight_decay=0.1), params, 5, in_place=in_place)
    assert_same_bits(found, params)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_adamw_in_place_equals_the_pure_step(dtype, tolerance):
    def scale(name):
        return 0.5 if name.startswith("wte") else 1.0

    optimizer = adamw(
        cosine_schedule(1e-2, 10, warmup_steps=2), b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, lr_multiplier=scale
    )
    params = example_params(dtype=dtype)
    assert_close(run(optimizer, params, 6, in_place=True), run(optimizer, params, 6), tolerance)


def test_adamw_in_place_writes_into_the_buffers_of_params_and_state():
    params = example_params()
    optimizer = adamw(constant_schedule(1e-2))
    state = optimizer.init(params)
    addresses = [leaf.data_ptr() for leaf in leaves((params, state.mu, state.nu))]
    found = optimizer.update_inplace(example_grads(params, 0), state, params, 1.0)
    assert [leaf.data_ptr() for leaf in leaves((params, found.mu, found.nu))] == addresses
    assert not torch.equal(params["wte"]["weight"], example_params()["wte"]["weight"])
    assert (int(state.step), int(found.step)) == (0, 1)  # a buffer may be updated in parts with one counter


def test_update_in_place_pairs_leaves_by_name_whatever_the_order_of_keys():
    params = {"a": torch.zeros(4), "b": torch.zeros(4)}
    grads = {"b": torch.full((4,), -1.0), "a": torch.ones(4)}
    optimizer = adamw(constant_schedule(0.1))
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    optimizer.update_inplace(grads, optimizer.init(params), params, 1.0)
    assert (expected["a"] < 0).all()
    assert (expected["b"] > 0).all()
    assert_close(params, expected)


@given(cuts=st.sets(st.integers(1, 312), max_size=6))
def test_adamw_in_place_bits_do_not_depend_on_how_a_buffer_is_cut(cuts):
    """As the parameter server cuts it: at multiples of a cache line."""
    parts = [slice(16 * start, 16 * stop) for start, stop in pairwise([0, *sorted(cuts), 313])]
    optimizer = adamw(cosine_schedule(1e-2, 10, warmup_steps=2), weight_decay=0.1)
    grads, params = ({"w": floats(seed, 5003, dtype=torch.float32)} for seed in (6, 7))
    whole, pieces = tree_map(torch.clone, params), tree_map(torch.clone, params)
    optimizer.update_inplace(tree_map(torch.clone, grads), optimizer.init(whole), whole, 0.3)
    state = optimizer.init(pieces)
    for part in parts:
        optimizer.update_inplace(cut(grads, part), cut(state, part), cut(pieces, part), 0.3)
    assert_same_bits(pieces, whole)


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
    optimizer = adamw(cosine_schedule(1e-2, 10, warmup_steps=2), weight_decay=0.1, lr_multiplier=lambda name: 0.5)
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


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_clip_by_global_norm_rejects(max_norm):
    with pytest.raises(ValueError, match=rf"^clip_by_global_norm: max_norm is {max_norm}, expected above 0$"):
        clip_by_global_norm(example_params(), max_norm)
