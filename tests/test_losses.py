import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    TOLERANCE,
    assert_close,
    assert_compiles,
    assert_hidden_ignored,
    assert_pure,
    assert_rows_independent,
    assert_same_bits,
    assert_vmaps,
    coins,
    floats,
    gradients,
    numpy,
)
from torch.func import grad, grad_and_value, jvp

from rlhf import losses
from rlhf.tree import tree_sum

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


class Loss(NamedTuple):
    """A loss as a function of (tensors, mask), its oracle, and in which of the tensors it is differentiated; the others
    are constant."""

    function: object
    oracle: object
    inputs: int
    differentiated: tuple[int, ...]


def sft_loss(log_probs, mask, **options):
    """This and the next three take tensors by position, as the oracles do."""
    return losses.sft_loss(log_probs, mask=mask, **options)


def reward_loss(chosen, rejected, mask=None, **options):
    return losses.reward_loss(chosen, rejected_scores=rejected, mask=mask, **options)


def ppo_policy_loss(log_probs, old_log_probs, advantages, mask, **options):
    tensors = {"old_log_probs": old_log_probs, "advantages": advantages, "mask": mask}
    return losses.ppo_policy_loss(log_probs, **tensors, **options)


def ppo_value_loss(values, old_values, returns, mask, **options):
    return losses.ppo_value_loss(values, old_values=old_values, returns=returns, mask=mask, **options)


def margin_loss(chosen, rejected, margin, mask, **options):
    return reward_loss(chosen, rejected, mask, margin=margin, centre_coef=0.3, **options)


def margin_oracle(chosen, rejected, margin, mask):
    return oracles.reward_loss(chosen, rejected, mask, margin=margin, centre_coef=0.3)


LOSSES = {
    "sft": Loss(sft_loss, oracles.sft_loss, 1, (0,)),
    "reward": Loss(reward_loss, oracles.reward_loss, 2, (0, 1)),
    "reward_margin_centred": Loss(margin_loss, margin_oracle, 3, (0, 1)),
    "policy": Loss(partial(ppo_policy_loss, clip_eps=0.3), partial(oracles.ppo_policy_loss, clip_eps=0.3), 3, (0,)),
    "policy_dual_clip": Loss(
        partial(ppo_policy_loss, clip_eps=0.1, dual_clip=1.5),
        partial(oracles.ppo_policy_loss, clip_eps=0.1, dual_clip=1.5),
        3,
        (0,),
    ),
    "value": Loss(
        partial(ppo_value_loss, value_clip_eps=0.5), partial(oracles.ppo_value_loss, value_clip_eps=0.5), 3, (0,)
    ),
}
LOSS_CASES = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch(loss, seed, *shape, dtype=torch.float64):
    """(tensors, mask). The first two tensors tie at the first position, which the mask keeps."""
    tensors = [0.6 * floats(seed + number, *shape, dtype=dtype) for number in range(loss.inputs)]
    mask = coins(seed, *shape)
    first = (0,) * len(shape)
    mask[first] = True
    if loss.inputs > 1:
        tensors[1][first] = tensors[0][first]
    return tensors, mask


@LOSS_CASES
@DTYPES
@given(seed=SEEDS, rows=st.integers(1, 5))
def test_loss_value(loss, dtype, seed, rows):
    tensors, mask = batch(loss, seed, rows, 6, dtype=dtype)
    value, metrics = loss.function(*tensors, mask)
    assert (value.dtype, value.shape) == (dtype, ())
    assert_close((value, metrics), loss.oracle(*numpy(*tensors, mask)), 10 * TOLERANCE[dtype])


@LOSS_CASES
def test_loss_gradient(loss):
    tensors, mask = batch(loss, 2, 3, 5)
    for number in loss.differentiated:
        tensors[number].requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: loss.function(*inputs, mask)[0], tensors)


@LOSS_CASES
def test_invariant_2_masked_positions_change_no_loss_metric_nor_gradient(loss):
    tensors, mask = batch(loss, 3, 3, 5)
    assert_hidden_ignored(loss.function, tensors, mask)


@LOSS_CASES
def test_loss_of_nothing_is_zero_with_zero_gradient(loss):
    tensors = [torch.full((2, 3), torch.nan, dtype=torch.float64) for _ in range(loss.inputs)]
    mask = torch.zeros(2, 3, dtype=torch.bool)
    value, metrics = loss.function(*tensors, mask)
    assert_close((value, metrics), (0.0, dict.fromkeys(metrics, 0.0)))
    assert not any(gradient.any() for gradient in gradients(lambda *x: loss.function(*x, mask)[0], tensors))


@LOSS_CASES
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 24), max_size=5))
def test_invariant_3_any_split_gives_the_same_loss_metrics_and_gradients(loss, seed, cuts):
    tensors, mask = batch(loss, seed, 24)
    bounds = [0, *sorted(cuts), 24]
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    step = grad_and_value(loss.function, argnums=loss.differentiated, has_aux=True)
    whole_gradients, whole = step(*tensors, mask)
    results = [step(*(x[part] for x in tensors), mask[part]) for part in parts]
    assert_close(tree_sum(result for _, result in results), whole)
    split_gradients = [torch.cat(pieces) for pieces in zip(*(gradient for gradient, _ in results), strict=True)]
    assert_same_bits(split_gradients, list(whole_gradients))


@LOSS_CASES
def test_loss_follows_a_permutation_and_its_gradient_treats_rows_alone(loss):
    tensors, mask = batch(loss, 5, 6, 4)
    order = torch.from_numpy(np.random.default_rng(5).permutation(6))
    permuted = loss.function(*(x[order] for x in tensors), mask[order])
    assert_close(permuted, loss.function(*tensors, mask))
    gradient = grad(lambda *x: loss.function(*x)[0], argnums=loss.differentiated)
    assert_rows_independent(gradient, *tensors, mask)


@LOSS_CASES
def test_loss_shape_does_not_matter(loss):
    tensors, mask = batch(loss, 6, 4, 5)
    flat = loss.function(*(x.flatten() for x in tensors), mask.flatten())
    assert_close(flat, loss.function(*tensors, mask))


@LOSS_CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_loss_of_half_precision_is_that_of_float32(loss, dtype):
    tensors, mask = batch(loss, 7, 3, 4, dtype=dtype)
    assert_same_bits(loss.function(*tensors, mask), loss.function(*(x.float() for x in tensors), mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_clips_at_half_precision_constants_are_those_of_float32(dtype):
    """Where clips bind, constants are computed with among themselves, before they meet anything in float32."""
    half, mask = floats(31, 64, dtype=dtype), torch.ones(64, dtype=torch.bool)
    wide, zeros = half.float(), torch.zeros(64)
    far = wide + 2.0

    def policy(advantages):
        return ppo_policy_loss(far, zeros, advantages, mask, dual_clip=1.3)

    def value(old_values):
        return ppo_value_loss(far, old_values, zeros, mask, value_clip_eps=0.123)

    assert_same_bits(policy(half), policy(wide))
    assert_same_bits(value(half), value(wide))


@LOSS_CASES
def test_constant_inputs_receive_no_gradient(loss):
    """Neither from a backward pass, nor under one or two levels of torch.func.grad, nor as a tangent."""
    tensors, mask = batch(loss, 20, 3, 5)
    constants = [number for number in range(loss.inputs) if number not in loss.differentiated]

    def value(*inputs):
        return loss.function(*inputs, mask)[0]

    inputs = [x.clone().requires_grad_() for x in tensors]
    value(*inputs).backward()
    for number, x in enumerate(inputs):
        assert (x.grad is None) == (number in constants)
    for number in constants:
        assert not grad(value, argnums=number)(*tensors).any()
        assert not grad(lambda *x, n=number: grad(value)(*x).sum(), argnums=number)(*tensors).any()
        tangents = [torch.ones_like(x) if n == number else torch.zeros_like(x) for n, x in enumerate(tensors)]
        assert jvp(value, tuple(tensors), tuple(tangents))[1] == 0


@LOSS_CASES
@pytest.mark.parametrize("weighting", ["token", "sequence", "constant"])
def test_weights_say_any_weighting_and_any_split_gives_the_same(loss, weighting):
    """The loss of each row or entry by itself, times its weight: so a division by the count gives what papers have."""
    tensors, mask = batch(loss, 40, 5, 6)
    entries, lengths = mask.sum().double(), mask.sum(dim=1, keepdim=True).clamp(min=1).double()
    weights = {
        "token": floats(41, 5, 6).abs(),
        "sequence": entries / (len(mask) * lengths),
        "constant": entries / (len(mask) * 24),
    }[weighting].double()
    alone = torch.zeros(5, 6, dtype=torch.float64)
    for row, column in mask.nonzero().tolist():
        only = torch.zeros_like(mask)
        only[row, column] = True
        alone[row, column] = loss.function(*tensors, only)[0]
    value, sums = loss.function(*tensors, mask, weights=weights)
    assert_close(value, (alone * weights).sum())
    name = next(name for name in sums if name.startswith("loss/"))
    assert_close(sums[name], value)
    plain = loss.function(*tensors, mask)[1]
    assert_close({key: sums[key] for key in sums if key != name}, {key: plain[key] for key in plain if key != name})
    expected = {"sequence": (alone / lengths).sum() / 5, "constant": alone.sum() / (5 * 24)}
    assert_close(value / sums["count"], expected.get(weighting, value / entries))
    parts = [
        loss.function(*(x[part] for x in tensors), mask[part], weights=weights[part] if weights.ndim else weights)
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert_close(tree_sum(parts), (value, sums))
    hidden = torch.where(mask, weights.expand(5, 6), torch.nan).requires_grad_()
    again, _ = loss.function(*(x.requires_grad_() for x in tensors), mask, weights=hidden)
    again.backward()
    assert_close(again.detach(), value)
    assert hidden.grad is None
    assert_same_bits(loss.function(*tensors, mask, weights=torch.ones(()))[0], loss.function(*tensors, mask)[0])


@LOSS_CASES
def test_weights_of_another_shape_are_refused(loss):
    tensors, mask = batch(loss, 42, 2, 3)
    with pytest.raises(ValueError, match=r"loss: weights.shape is \(2,\), expected to broadcast to \(2, 3\)"):
        loss.function(*tensors, mask, weights=torch.ones(2))


@LOSS_CASES
def test_loss_metrics_are_detached_scalars(loss):
    tensors, mask = batch(loss, 8, 3, 4)
    value, metrics = loss.function(*(x.requires_grad_() for x in tensors), mask)
    assert value.requires_grad
    assert not any(metric.requires_grad for metric in metrics.values())
    assert {metric.shape for metric in metrics.values()} == {torch.Size([])}
    assert {name for name, metric in metrics.items() if not metric.is_floating_point()} == {"count"}


@LOSS_CASES
def test_losses_are_pure(loss):
    tensors, mask = batch(loss, 9, 3, 4)
    assert_pure(loss.function, *tensors, mask)
    assert_pure(grad_and_value(loss.function, argnums=loss.differentiated, has_aux=True), *tensors, mask)


@LOSS_CASES
def test_losses_compile_with_their_gradients(loss):
    tensors, mask = batch(loss, 10, 3, 4)
    assert_compiles(grad_and_value(loss.function, argnums=loss.differentiated, has_aux=True), *tensors, mask)


@LOSS_CASES
def test_losses_vmap_with_their_gradients(loss):
    tensors, mask = batch(loss, 11, 4, 3, 5)
    assert_vmaps(grad_and_value(loss.function, argnums=loss.differentiated, has_aux=True), *tensors, mask)


def test_sft_gradient_is_minus_one_on_each_token_that_counts():
    mask = torch.tensor([True, False, True])
    assert_close(grad(lambda x: sft_loss(x, mask)[0])(floats(1, 3)), [-1.0, 0.0, -1.0])


@DTYPES
def test_invariant_10_preference_loss_is_log_2_at_a_tie(dtype):
    scores = floats(1, 5, dtype=dtype)
    loss, metrics = reward_loss(scores, scores.clone())
    assert_close(loss, 5 * math.log(2), TOLERANCE[dtype])
    assert metrics["reward/accuracy_sum"] == 2.5
    gradient = grad(lambda c, r: reward_loss(c, r)[0], argnums=(0, 1))(scores, scores)
    assert_close(gradient, ([-0.5] * 5, [0.5] * 5))


@given(seed=SEEDS, constant=st.floats(-100.0, 100.0))
def test_invariant_10_preference_loss_is_unchanged_by_a_constant_added_to_both(seed, constant):
    chosen, rejected = floats(seed, 6), floats(seed + 1, 6)
    assert_close(reward_loss(chosen + constant, rejected + constant), reward_loss(chosen, rejected), 1e-11)


@DTYPES
@pytest.mark.parametrize(
    ("chosen", "rejected", "loss", "gradient"),
    [
        pytest.param(1e4, 0.0, 0.0, 0.0, id="right_by_1e4"),
        pytest.param(0.0, 1e4, 1e4, -1.0, id="wrong_by_1e4"),
        pytest.param(-1e4, -2e4, 0.0, 0.0, id="right_among_negatives"),
        pytest.param(-1e4, 1e4, 2e4, -1.0, id="wrong_by_2e4"),
    ],
)
def test_invariant_10_preference_loss_is_finite_at_any_margin(dtype, chosen, rejected, loss, gradient):
    scores = torch.tensor([[chosen], [rejected]], dtype=dtype)
    gradients_found, value = grad_and_value(lambda c, r: reward_loss(c, r)[0], argnums=(0, 1))(*scores)
    assert_close(value, loss, TOLERANCE[dtype])
    assert_close(gradients_found, ([gradient], [-gradient]), TOLERANCE[dtype])


@given(difference=st.floats(-40.0, 40.0))
def test_reward_gradient_is_minus_the_sigmoid_of_the_deficit(difference):
    chosen, rejected = torch.tensor([difference], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    expected = oracles.reward_gradient(difference)
    found = grad(lambda c, r: reward_loss(c, r)[0], argnums=(0, 1))(chosen, rejected)
    assert_close(found, ([expected], [-expected]))


def test_reward_loss_defaults_count_all_pairs_with_neither_margin_nor_centring():
    chosen, rejected = floats(12, 6), floats(13, 6)
    everything = torch.ones(6, dtype=torch.bool)
    explicit = reward_loss(chosen, rejected, everything, margin=torch.zeros(6), centre_coef=0.0)
    assert_close(reward_loss(chosen, rejected), explicit)


def test_reward_centring_pulls_the_sum_of_each_pair_to_zero():
    scores = torch.tensor([2.0, -3.0], dtype=torch.float64)
    with_centring = grad(lambda x: reward_loss(x, x.detach(), centre_coef=0.1)[0])(scores)
    assert_close(with_centring, [-0.5 + 0.1 * 2 * 4.0, -0.5 + 0.1 * 2 * -6.0])


def ratios_and_advantages():
    """Log-ratios on both sides of 1 - eps and 1 + eps for eps = 0.2, and far out, each with A > 0, A < 0 and A = 0."""
    ratios = torch.tensor([0.01, 0.5, 0.7999, 0.8001, 0.95, 1.0, 1.1, 1.1999, 1.2001, 1.5, 20.0], dtype=torch.float64)
    advantages = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)
    return [x.flatten() for x in torch.meshgrid(ratios, advantages, indexing="ij")]


def policy_gradient(ratios, advantages, **options):
    mask = torch.ones_like(ratios, dtype=torch.bool)
    return grad(lambda x: ppo_policy_loss(x, torch.zeros_like(x), advantages, mask, **options)[0])(ratios.log())


def test_invariant_1_identical_policies_have_ratio_1_kl_0_and_clip_fraction_0():
    log_probs, advantages, mask = floats(14, 4, 5), floats(15, 4, 5), coins(14, 4, 5)
    loss, metrics = ppo_policy_loss(log_probs, log_probs.clone(), advantages, mask)
    assert metrics["val/ratio_sum"] == metrics["count"] == mask.sum()
    assert metrics["policy/approxkl_avg_sum"] == metrics["policy/clipfrac_avg_sum"] == 0
    assert_close(loss, -advantages[mask].sum())


def test_invariant_8_clipped_surrogate_gradient_is_zero_exactly_where_the_clip_binds():
    ratios, advantages = ratios_and_advantages()
    binds = ((advantages > 0) & (ratios > 1.2)) | ((advantages < 0) & (ratios < 0.8))
    gradient = policy_gradient(ratios, advantages, clip_eps=0.2)
    assert binds.sum() == 6
    assert torch.equal(gradient == 0, binds | (advantages == 0))
    assert_close(gradient, torch.where(binds, 0.0, -ratios * advantages))


@given(seed=SEEDS, clip_eps=st.floats(0.01, 0.9))
def test_invariant_8_clipped_surrogate_gradient_at_random(seed, clip_eps):
    ratios, advantages = (0.7 * floats(seed, 40)).exp(), floats(seed + 1, 40)
    binds = ((advantages > 0) & (ratios > 1 + clip_eps)) | ((advantages < 0) & (ratios < 1 - clip_eps))
    gradient = policy_gradient(ratios, advantages, clip_eps=clip_eps)
    assert torch.equal(gradient == 0, binds)
    assert_close(gradient, torch.where(binds, 0.0, -ratios * advantages))


def test_invariant_8_without_clipping_the_surrogate_is_the_policy_gradient():
    ratios, advantages = ratios_and_advantages()
    assert_close(policy_gradient(ratios, advantages, clip_eps=1e9), -ratios * advantages)
    # At the policy that sampled this is REINFORCE: minus the advantage times the gradient of the log-prob.
    ones = torch.ones_like(ratios)
    assert_close(policy_gradient(ones, advantages, clip_eps=1e9), -advantages)


@pytest.mark.parametrize("log_ratio", [20.0, 21.0, 89.0, 1000.0, -89.0, -1000.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@DTYPES
def test_invariant_8_loss_and_gradient_are_finite_at_any_log_ratio(dtype, dual_clip, log_ratio):
    """The gradient is 0 where a clip binds, and brings a bad token back where none does."""
    advantages = torch.tensor([2.0, -3.0, 0.0], dtype=dtype)
    mask = torch.ones(3, dtype=torch.bool)
    step = grad_and_value(partial(ppo_policy_loss, dual_clip=dual_clip), has_aux=True)
    log_probs = torch.full_like(advantages, log_ratio)
    gradient, (loss, metrics) = step(log_probs, torch.zeros_like(log_probs), advantages, mask)
    assert all(torch.isfinite(x).all() for x in (gradient, loss, *metrics.values()))
    assert gradient[2] == 0
    if log_ratio > 0:
        assert gradient[0] == 0
        assert gradient[1] == 0 if dual_clip else gradient[1] >= 3.0 * math.exp(20.0) * (1 - 1e-6)
    else:
        assert gradient[1] == 0
        assert_close(gradient[0], -2.0 * math.exp(log_ratio))


def test_policy_dual_clip_bounds_the_loss_of_bad_tokens_alone():
    ratios, advantages = ratios_and_advantages()
    gradient = policy_gradient(ratios, advantages, clip_eps=0.2, dual_clip=1.4)
    bound = (advantages < 0) & (ratios > 1.4)
    assert bound.sum() == 2
    assert_close(gradient, torch.where(bound, 0.0, policy_gradient(ratios, advantages, clip_eps=0.2)))
    everything = torch.ones(1, dtype=torch.bool)
    loss, _ = ppo_policy_loss(torch.tensor([10.0]), torch.zeros(1), torch.tensor([-3.0]), everything, dual_clip=1.4)
    assert_close(loss, 1.4 * 3.0, 1e-6)


def test_policy_loss_defaults_to_clip_eps_02_and_no_dual_clip():
    tensors, mask = batch(LOSSES["policy"], 16, 5, 6)
    explicit = ppo_policy_loss(*tensors, mask, clip_eps=0.2, dual_clip=None)
    assert_same_bits(ppo_policy_loss(*tensors, mask), explicit)


@given(seed=SEEDS, value_clip_eps=st.floats(0.01, 2.0))
def test_invariant_9_clipped_value_loss_is_never_below_the_unclipped_one(seed, value_clip_eps):
    for number in range(8):  # one token each, so that no sum hides a single one
        tensors = [floats(seed + 8 * x + number, 1) for x in range(3)]
        everything = torch.ones(1, dtype=torch.bool)
        clipped, _ = ppo_value_loss(*tensors, everything, value_clip_eps=value_clip_eps)
        assert clipped >= ppo_value_loss(*tensors, everything, value_clip_eps=math.inf)[0]


def test_value_loss_without_clipping_is_half_the_squared_error():
    values, old_values, returns = (floats(seed, 6) for seed in (17, 18, 19))
    everything = torch.ones(6, dtype=torch.bool)
    step = grad_and_value(partial(ppo_value_loss, value_clip_eps=math.inf), has_aux=True)
    gradient, (loss, metrics) = step(values, old_values, returns, everything)
    assert_close(loss, 0.5 * (values - returns).square().sum())
    assert_close(gradient, values - returns)
    assert metrics["val/clipfrac_avg_sum"] == 0


def test_value_loss_gradient_is_zero_where_the_clipped_error_is_the_larger():
    """From V_old = 0 and eps = 0.2: inside, outside away from the target, and outside towards it."""
    values = torch.tensor([0.1, 1.0, 1.0], dtype=torch.float64)
    returns = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    everything = torch.ones(3, dtype=torch.bool)
    gradient, (_, metrics) = grad_and_value(ppo_value_loss, has_aux=True)(values, values * 0, returns, everything)
    assert_close(gradient, [0.1 - 2.0, 1.0 + 1.0, 0.0])
    assert metrics["val/clipfrac_avg_sum"] == 1


TRUE, ZEROS = torch.ones(3, dtype=torch.bool), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: sft_loss(ZEROS, TRUE[:2]),
            ValueError,
            r"sft_loss: mask has shape \(2,\), expected \(3,\) like log_probs",
            id="sft_shape",
        ),
        pytest.param(
            lambda: sft_loss(ZEROS, ZEROS), TypeError, "sft_loss: mask has dtype torch.float32, .*", id="sft_mask"
        ),
        pytest.param(
            lambda: reward_loss(ZEROS, ZEROS[:2]),
            ValueError,
            r"reward_loss: rejected_scores has shape \(2,\), expected \(3,\) like chosen_scores",
            id="reward_shape",
        ),
        pytest.param(
            lambda: reward_loss(ZEROS, ZEROS, TRUE[:2]),
            ValueError,
            r"reward_loss: mask has shape \(2,\), expected \(3,\) like chosen_scores",
            id="reward_mask_shape",
        ),
        pytest.param(
            lambda: reward_loss(ZEROS, ZEROS, margin=ZEROS[:2]),
            ValueError,
            r"reward_loss: margin has shape \(2,\), expected \(3,\) like chosen_scores",
            id="reward_margin",
        ),
        pytest.param(
            lambda: reward_loss(ZEROS, ZEROS, centre_coef=-0.1),
            ValueError,
            "reward_loss: centre_coef is -0.1, expected at least 0",
            id="reward_centre_coef",
        ),
        pytest.param(
            lambda: reward_loss(ZEROS, ZEROS, ZEROS),
            TypeError,
            "reward_loss: mask has dtype torch.float32, .*",
            id="reward_mask",
        ),
        pytest.param(
            lambda: ppo_policy_loss(ZEROS, ZEROS[:2], ZEROS, TRUE),
            ValueError,
            r"ppo_policy_loss: old_log_probs has shape \(2,\), expected \(3,\) like log_probs",
            id="policy_old_log_probs",
        ),
        pytest.param(
            lambda: ppo_policy_loss(ZEROS, ZEROS, ZEROS[:2], TRUE),
            ValueError,
            r"ppo_policy_loss: advantages has shape \(2,\), expected \(3,\) like log_probs",
            id="policy_advantages",
        ),
        pytest.param(
            lambda: ppo_policy_loss(ZEROS, ZEROS, ZEROS, TRUE, clip_eps=0.0),
            ValueError,
            "ppo_policy_loss: clip_eps is 0.0, expected above 0",
            id="policy_clip_eps",
        ),
        pytest.param(
            lambda: ppo_policy_loss(ZEROS, ZEROS, ZEROS, TRUE, dual_clip=1.0),
            ValueError,
            "ppo_policy_loss: dual_clip is 1.0, expected None or above 1",
            id="policy_dual_clip",
        ),
        pytest.param(
            lambda: ppo_policy_loss(ZEROS, ZEROS, ZEROS, ZEROS),
            TypeError,
            "ppo_policy_loss: mask has dtype torch.float32, .*",
            id="policy_mask",
        ),
        pytest.param(
            lambda: ppo_value_loss(ZEROS, ZEROS[:2], ZEROS, TRUE),
            ValueError,
            r"ppo_value_loss: old_values has shape \(2,\), expected \(3,\) like values",
            id="value_old_values",
        ),
        pytest.param(
            lambda: ppo_value_loss(ZEROS, ZEROS, ZEROS[:2], TRUE),
            ValueError,
            r"ppo_value_loss: returns has shape \(2,\), expected \(3,\) like values",
            id="value_returns",
        ),
        pytest.param(
            lambda: ppo_value_loss(ZEROS, ZEROS, ZEROS, TRUE, value_clip_eps=0.0),
            ValueError,
            "ppo_value_loss: value_clip_eps is 0.0, expected above 0",
            id="value_clip_eps",
        ),
        pytest.param(
            lambda: ppo_value_loss(ZEROS, ZEROS, ZEROS, ZEROS),
            TypeError,
            "ppo_value_loss: mask has dtype torch.float32, .*",
            id="value_mask",
        ),
    ],
)
def test_losses_reject(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call()
