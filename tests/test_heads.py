import numpy as np
import oracles
import pytest
import torch
from laws import (
    TOLERANCE,
    assert_close,
    assert_compiles,
    assert_pure,
    assert_rows_independent,
    assert_same_bits,
    assert_vmaps,
    floats,
    numpy,
)

from rlhf.models.heads import apply_head, init_reward_head, init_value_head, value_head_from_reward
from rlhf.random import key, split

WITH_BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["reward", "value"])


def head(with_bias, *, dtype=torch.float64):
    weights = {"weight": floats(1, 1, 6, dtype=dtype)}
    return weights | {"bias": floats(2, 1, dtype=dtype)} if with_bias else weights


def test_init_reward_head_value():
    expected = np.ravel([oracles.normal_pair((0, 3), position) for position in range(3)])[:5] / np.sqrt(6)
    found = init_reward_head(5, key=key(3))
    assert_close(found, {"weight": expected[None]}, 1e-6)
    assert found["weight"].dtype == torch.float32


def test_init_reward_head_scores_have_variance_one_on_normalised_states():
    """The states of a layer norm have squared length n_embd: std 1/sqrt(n_embd + 1) gives scores of variance near 1."""
    weights = torch.vmap(lambda k: init_reward_head(99, key=k)["weight"])(split(key(4), 400))
    assert weights.shape == (400, 1, 99)
    scores = weights.sum(dim=-1)  # of the state (1, ..., 1)
    assert float(scores.square().mean()) == pytest.approx(0.99, abs=4 * (2 / 400) ** 0.5)


def test_init_value_head_is_zero_everywhere():
    found = init_value_head(6)
    assert {name: leaf.shape for name, leaf in found.items()} == {"weight": (1, 6), "bias": (1,)}
    assert_same_bits(apply_head(found, floats(3, 4, 6, dtype=torch.float32)), torch.zeros(4))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.5, 0.5), (-1.0, 3.0)])
def test_value_head_from_reward_predicts_the_normalised_reward(mean, std):
    reward_head, hidden = head(False), floats(4, 5, 6)
    value_head = value_head_from_reward(reward_head, mean=mean, std=std)
    assert {name: leaf.shape for name, leaf in value_head.items()} == {"weight": (1, 6), "bias": (1,)}
    assert_close(apply_head(value_head, hidden), (apply_head(reward_head, hidden) - mean) / std)


def test_value_head_from_reward_predicts_the_reward_unless_told_its_statistics():
    hidden = floats(4, 5, 6)
    assert_close(apply_head(value_head_from_reward(head(False)), hidden), apply_head(head(False), hidden))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_value_head_from_reward_rejects_std_that_is_not_positive(std):
    with pytest.raises(ValueError, match=rf"^value_head_from_reward: std is {std}, expected above 0$"):
        value_head_from_reward(head(False), std=std)


@WITH_BIAS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_apply_head_value(with_bias, dtype):
    weights, hidden = head(with_bias, dtype=dtype), floats(5, 3, 4, 6, dtype=dtype)
    expected = numpy(hidden) @ numpy(weights["weight"])[0] + (numpy(weights["bias"])[0] if with_bias else 0.0)
    found = apply_head(weights, hidden)
    assert found.dtype == dtype
    assert_close(found, expected, 4 * TOLERANCE[dtype])


@WITH_BIAS
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32], ids=["head_bf16", "head_f32"])
def test_apply_head_computes_in_float32_at_least(with_bias, hidden_dtype, head_dtype):
    weights, hidden = head(with_bias, dtype=head_dtype), floats(6, 4, 6, dtype=hidden_dtype)
    wide = {name: leaf.float() for name, leaf in weights.items()}
    assert_same_bits(apply_head(weights, hidden), apply_head(wide, hidden.float()))


@WITH_BIAS
def test_apply_head_gradient(with_bias):
    names = list(head(with_bias))
    arguments = [*(leaf.requires_grad_() for leaf in head(with_bias).values()), floats(7, 3, 6).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda *inputs: apply_head(dict(zip(names, inputs[:-1], strict=True)), inputs[-1]), arguments
    )


@WITH_BIAS
def test_apply_head_is_pure(with_bias):
    assert_pure(apply_head, head(with_bias), floats(8, 3, 6))


@WITH_BIAS
def test_apply_head_treats_rows_alone(with_bias):
    # Small integers, so that a matrix product has no rounding that could depend on its shape.
    weights = {name: (4 * leaf).round() for name, leaf in head(with_bias).items()}
    assert_rows_independent(lambda hidden: apply_head(weights, hidden), (4 * floats(9, 5, 6)).round())


@WITH_BIAS
def test_apply_head_compiles(with_bias):
    assert_compiles(apply_head, head(with_bias), floats(10, 3, 6))


@WITH_BIAS
def test_apply_head_vmaps(with_bias):
    weights = head(with_bias)
    assert_vmaps(lambda hidden: apply_head(weights, hidden), floats(11, 4, 3, 6))


def test_head_makers_are_pure():
    assert_pure(lambda k: init_reward_head(6, key=k), key(12))
    assert_pure(lambda weight: value_head_from_reward({"weight": weight}, mean=1.0, std=2.0), floats(13, 1, 6))
    assert_pure(lambda unused: init_value_head(6), key(14))
