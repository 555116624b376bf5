"""The kernel against what it takes the place of: `adamw`'s update, written into the buffers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_same_bits, floats

from rlhf.execution.shard import write_update
from rlhf.optim import AdamState, Optimizer, adamw
from rlhf.schedules import constant_schedule, cosine_schedule
from rlhf.tree import leaves, tree_map

SHAPES = {"wte.weight": (70, 131), "ln.weight": (257,), "ln.bias": (257,), "frozen": (12, 3)}
REFERENCE = write_update.__wrapped__


def factors(params):
    return {name: {"frozen": 0.0, "wte.weight": 0.5}.get(name, 1.0) for name in params}


OPTIMIZER = adamw(
    cosine_schedule(1e-2, 10, warmup_steps=2), b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, lr_multiplier=factors
)


def normals(seed, dtype):
    return {name: floats(10 * seed + n, *SHAPES[name], dtype=dtype) for n, name in enumerate(SHAPES)}


def run(write, steps, *, dtype=torch.float32, optimizer=OPTIMIZER, learning_rate=None):
    """Parameters and state after some steps, on gradients that are four times as large."""
    params = normals(0, dtype)
    state = optimizer.init(params)
    for step in range(steps):
        grads = tree_map(lambda grad: 4.0 * grad, normals(1 + step, dtype))
        options = {"scale": 0.25, "learning_rate": learning_rate}
        state = write(optimizer, grads, state, params, optimizer.hyperparameters(params), **options)
    return params, state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("learning_rate", [None, 0.02])
def test_it_equals_the_update(dtype, tolerance, learning_rate):
    found, expected = (run(write, 6, dtype=dtype, learning_rate=learning_rate) for write in (write_update, REFERENCE))
    assert_close(found, expected, tolerance)
    assert not torch.equal(found[0]["wte.weight"], normals(0, dtype)["wte.weight"])
    assert_same_bits(found[0]["frozen"], normals(0, dtype)["frozen"])


def test_one_step_differs_by_two_units_in_the_last_place_at_most():
    """Of the larger of the old and the new number: their difference may be small."""
    start = normals(0, torch.float32)
    (params, state), (other, other_state) = (run(write, 1) for write in (write_update, REFERENCE))
    for found, expected, before in (
        (params, other, start),
        (state.mu, other_state.mu, other_state.mu),
        (state.nu, other_state.nu, other_state.nu),
    ):
        for name, leaf in expected.items():
            size = torch.maximum(leaf.abs(), before[name].abs())
            unit = torch.nextafter(size, torch.tensor(torch.inf)) - size
            assert ((found[name] - leaf).abs() <= 2 * unit).all(), name


def test_the_kernel_runs(monkeypatch):
    called = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **options: called.append(1) or kernel(*args, **options))
    run(REFERENCE, 1)
    assert not called
    run(write_update, 1)
    assert len(called) == 3, "one call for each group of equal hyperparameters"


@pytest.mark.parametrize("write", [write_update, REFERENCE], ids=["kernel", "reference"])
def test_it_writes_into_the_buffers_of_params_and_state_but_not_into_counters(write):
    params = normals(0, torch.float32)
    state = OPTIMIZER.init(params)
    addresses = [leaf.data_ptr() for leaf in leaves((params, state.mu, state.nu))]
    records = OPTIMIZER.hyperparameters(params)
    found = write(OPTIMIZER, normals(1, torch.float32), state, params, records, scale=1.0, learning_rate=None)
    assert [leaf.data_ptr() for leaf in leaves((params, state.mu, state.nu))] == addresses
    assert all(leaf.any() for leaf in leaves((state.mu, state.nu)))
    assert (int(state.step), int(found.step)) == (0, 1)  # a buffer may be updated in parts with one counter


def test_negative_zeros_of_a_leaf_with_multiplier_0_stay():
    params, grads = ({"frozen": torch.full((32,), value)} for value in (-0.0, -1.0))
    state, records = OPTIMIZER.init(params), OPTIMIZER.hyperparameters(params)
    write_update(OPTIMIZER, grads, state, params, records, scale=1.0, learning_rate=None)
    assert_same_bits(params, {"frozen": torch.full((32,), -0.0)})
    assert state.mu["frozen"].all()


def test_invariant_12_learning_rate_0_keeps_the_bits_of_all_parameters():
    optimizer = adamw(constant_schedule(0.0), weight_decay=0.1)
    assert_same_bits(run(write_update, 5, optimizer=optimizer)[0], normals(0, torch.float32))


@pytest.mark.parametrize("records", [None, {}, {"w": "plain"}], ids=str)
def test_other_optimisers_are_left_to_the_reference(records):
    def update(grads, state, params, **options):
        assert options == {"learning_rate": 0.1} | ({} if records is None else {"hyperparameters": records})
        return tree_map(torch.sub, params, grads), AdamState(state.step + 1, state.mu, state.nu)

    params = {"w": torch.full((8,), 3.0)}
    optimizer = Optimizer(OPTIMIZER.init, update)
    state = optimizer.init(params)
    write_update(optimizer, {"w": torch.ones(8)}, state, params, records, scale=2.0, learning_rate=0.1)
    assert_same_bits(params, {"w": torch.ones(8)})


@given(cuts=st.sets(st.integers(1, 312), max_size=6))
def test_its_bits_do_not_depend_on_how_a_buffer_is_cut(cuts):
    """As executors cut it: at multiples of a cache line."""
    parts = [slice(16 * start, 16 * stop) for start, stop in pairwise([0, *sorted(cuts), 313])]
    optimizer = adamw(cosine_schedule(1e-2, 10, warmup_steps=2), weight_decay=0.1)
    grads, params = ({"w": floats(seed, 5003, dtype=torch.float32)} for seed in (6, 7))
    whole, pieces = tree_map(torch.clone, params), tree_map(torch.clone, params)
    records = optimizer.hyperparameters({"w": torch.empty(1, 5003)})

    def cut(tree, part):
        return tree_map(lambda leaf: leaf[part] if leaf.ndim else leaf, tree)

    def write(grads, state, params):
        write_update(optimizer, tree_map(torch.clone, grads), state, params, records, scale=0.3, learning_rate=None)

    write(grads, optimizer.init(whole), whole)
    state = optimizer.init(pieces)
    for part in parts:
        write(cut(grads, part), cut(state, part), cut(pieces, part))
    assert_same_bits(pieces, whole)
