import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    HIDDEN,
    TOLERANCE,
    assert_close,
    assert_compiles,
    assert_pure,
    assert_rows_independent,
    assert_same_bits,
    assert_vmaps,
    coins,
    floats,
    numpy,
    prefix_mask,
    ragged_mask,
)

from rlhf.estimators import AdvantageEstimate, Estimator
from rlhf.experience import Experience, make_experience, postprocess_scores

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
ESTIMATORS = pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])


def scored(seed, *, rows=8, width=7, dtype=torch.float64):
    """(scores, log_probs, ref_log_probs, values, mask) of 8 rows, so that their mean length is exact in float32."""
    log_probs = -floats(seed + 1, rows, width, dtype=dtype).abs()
    ref_log_probs = log_probs + 0.3 * floats(seed + 2, rows, width, dtype=dtype)
    values = floats(seed + 3, rows, width, dtype=dtype)
    return floats(seed, rows, dtype=dtype), log_probs, ref_log_probs, values, ragged_mask(seed, rows, width)


def unwhitened(*tensors, **options):
    return make_experience(*tensors, whiten_advantages=False, **{"kl_coef": 0.2, **options})


@DTYPES
@given(seed=SEEDS, penalty=st.floats(0.0, 5.0), clip=st.floats(0.1, 3.0))
def test_shape_scores_value(dtype, seed, penalty, clip):
    scores, ended = floats(seed, 8, dtype=dtype), floats(seed + 1, 8) > 0
    found = postprocess_scores(scores, ended, missing_eos_penalty=penalty, clip=clip)
    assert found.dtype == dtype
    expected = oracles.postprocess_scores(*numpy(scores, ended), missing_eos_penalty=penalty, clip=clip)
    assert_close(found, expected, TOLERANCE[dtype])


def test_shape_scores_penalise_after_the_clip():
    found = postprocess_scores(
        torch.tensor([9.0, -9.0]), torch.tensor([False, False]), missing_eos_penalty=1.0, clip=2.0
    )
    assert_close(found, [1.0, -3.0])


def test_shape_scores_change_nothing_by_default():
    scores = floats(1, 6)
    assert_same_bits(postprocess_scores(scores, torch.zeros(6, dtype=torch.bool)), scores)


def test_shape_scores_laws():
    def function(scores, ended):
        return postprocess_scores(scores, ended, missing_eos_penalty=1.0, clip=0.5)

    scores, ended = floats(2, 6), floats(3, 6) > 0
    assert_pure(function, scores, ended)
    assert_rows_independent(function, scores, ended)
    assert_compiles(function, scores, ended)
    assert_vmaps(function, scores.view(2, 3), ended.view(2, 3))
    assert_same_bits(function(scores.bfloat16(), ended), function(scores.bfloat16().float(), ended))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0, expected at least 0"),
        ({"clip": 0.0}, "clip is 0.0, expected above 0"),
    ],
    ids=["penalty", "clip"],
)
def test_shape_scores_rejects(options, message):
    with pytest.raises(ValueError, match=f"^postprocess_scores: {message}$"):
        postprocess_scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), **options)


@ESTIMATORS
@DTYPES
@given(
    seed=SEEDS,
    options=st.fixed_dictionaries(
        {
            "kl_coef": st.floats(0.0, 2.0),
            "kl_in_loss": st.booleans(),
            "gamma": st.floats(0.5, 1.0),
            "lam": st.floats(0.0, 1.0),
            "whiten_rewards": st.booleans(),
            "whiten_advantages": st.booleans(),
        }
    ),
    holes=st.booleans(),
)
def test_make_experience_value(kl_estimator, dtype, seed, options, holes):
    tensors = scored(seed, dtype=dtype)
    if holes:
        tensors = (*tensors[:4], coins(seed, 8, 7, share=0.5))
    after = floats(seed + 4, 8, dtype=dtype) if seed % 2 else None
    found = make_experience(*tensors, kl_estimator=kl_estimator, bootstrap_value=after, **options)
    scores, log_probs, ref_log_probs, values, mask = numpy(*tensors)
    kl = oracles.kl_estimate(log_probs, ref_log_probs, estimator=kl_estimator)
    advantages, returns, metrics = oracles.experience(
        scores, log_probs, values, kl, mask, bootstrap_value=None if after is None else numpy(after), **options
    )
    tolerance = 20 * TOLERANCE[dtype]  # whitening divides sums of a dozen numbers by their spread
    assert_close(found, Experience(advantages, returns, kl * mask, metrics), tolerance)


def test_make_experience_defaults():
    tensors = scored(1)
    explicit = {
        "kl_estimator": "k1",
        "kl_in_loss": False,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "whiten_advantages": True,
    }
    assert_same_bits(make_experience(*tensors, kl_coef=0.2), make_experience(*tensors, kl_coef=0.2, **explicit))


@ESTIMATORS
@given(seed=SEEDS)
def test_invariant_4_first_return_is_score_minus_kl_penalty(kl_estimator, seed):
    """With gamma = lambda = 1 the first return is the sum of the row's rewards."""
    tensors = scored(seed)
    mask = tensors[-1]
    found = unwhitened(*tensors, kl_estimator=kl_estimator, gamma=1.0, lam=1.0)
    expected = torch.where(mask.any(dim=1), tensors[0] - 0.2 * found.kl.sum(dim=1), 0.0)
    assert_close(found.returns[:, 0], expected)


def test_make_experience_with_the_kl_in_the_loss_rewards_the_score_alone():
    tensors = scored(2)
    found = unwhitened(*tensors, kl_in_loss=True)
    without = unwhitened(*tensors, kl_coef=0.0)
    assert_same_bits((found.advantages, found.returns), (without.advantages, without.returns))
    assert found.metrics["objective/kl"] == unwhitened(*tensors).metrics["objective/kl"] != 0
    assert found.metrics["objective/non_score_reward"] == 0


def test_invariant_6_whitened_advantages_have_masked_mean_0_and_variance_1():
    tensors = scored(3)
    advantages = make_experience(*tensors, kl_coef=0.2).advantages
    mask = tensors[-1]
    assert_close(oracles.masked_mean(*numpy(advantages, mask)), 0.0)
    assert oracles.masked_var(*numpy(advantages, mask)) == pytest.approx(1.0, abs=1e-7)


def test_make_experience_metrics_of_known_values():
    """Values equal to the returns explain all of their variance, values of zero none of it."""
    scores, log_probs, ref_log_probs, values, mask = scored(4)
    nothing = unwhitened(scores, log_probs, ref_log_probs, values * 0, mask, lam=1.0)
    assert_close(nothing.metrics["val/explained_variance"], 0.0)
    perfect = unwhitened(scores, log_probs, ref_log_probs, nothing.returns, mask, lam=1.0)
    assert_close(perfect.metrics["val/explained_variance"], 1.0)
    metrics = perfect.metrics
    assert_close(metrics["objective/scores"] + metrics["objective/non_score_reward"], metrics["objective/rlhf_reward"])


@ESTIMATORS
@pytest.mark.parametrize("value", HIDDEN.values(), ids=HIDDEN)
def test_invariant_2_masked_positions_change_no_bit_of_an_experience(kl_estimator, value):
    scores, *tokens, mask = scored(5)
    hidden = [torch.where(mask, x, value) for x in tokens]
    options = {"kl_coef": 0.2, "kl_estimator": kl_estimator, "whiten_rewards": True}
    shown = make_experience(scores, *tokens, mask, **options)
    assert_same_bits(make_experience(scores, *hidden, mask, **options), shown)
    assert not any(x[~mask].any() for x in shown[:3])


def test_invariant_2_more_padding_changes_no_experience():
    scores, *tokens, mask = scored(6)
    wide = [torch.nn.functional.pad(x, (0, 4), value=torch.nan) for x in tokens]
    found = make_experience(scores, *wide, torch.nn.functional.pad(mask, (0, 4)), kl_coef=0.2)
    expected = make_experience(scores, *tokens, mask, kl_coef=0.2)
    assert_close(found.metrics, expected.metrics)
    assert_close([x[:, :7] for x in found[:3]], list(expected[:3]))


def test_make_experience_of_no_tokens_is_zero_and_finite():
    hidden = torch.full((2, 3), torch.nan)
    found = make_experience(torch.ones(2), hidden, hidden, hidden, prefix_mask([0, 0], 3), kl_coef=0.2)
    assert not any(x.any() for x in found[:3])
    assert all(math.isfinite(metric) for metric in found.metrics.values())


def test_make_experience_follows_a_permutation_of_its_rows():
    tensors, order = scored(7), torch.tensor([3, 0, 4, 7, 1, 2, 6, 5])
    expected = make_experience(*tensors, kl_coef=0.2)
    found = make_experience(*(x[order] for x in tensors), kl_coef=0.2)
    assert_close(found, Experience(*(x[order] for x in expected[:3]), expected.metrics))


def test_make_experience_without_whitening_treats_rows_alone():
    assert_rows_independent(lambda *x: unwhitened(*x)[:3], *scored(8))


def test_make_experience_in_float32_gives_float32():
    found = make_experience(*scored(9, dtype=torch.float32), kl_coef=0.2)
    assert {x.dtype for x in (*found[:3], *found.metrics.values())} == {torch.float32}
    assert {metric.shape for metric in found.metrics.values()} == {torch.Size([])}


def test_make_experience_laws():
    def function(*tensors):
        return make_experience(*tensors, kl_coef=0.2, kl_estimator="k3", whiten_rewards=True)

    assert_pure(function, *scored(10))
    assert_compiles(function, *scored(11))
    assert_vmaps(function, *(torch.stack(pair) for pair in zip(scored(12), scored(13), strict=True)))


def test_an_experience_is_constant_in_what_it_is_made_of():
    tensors = [x.requires_grad_() if x.is_floating_point() else x for x in (*scored(14), floats(15, 8))]
    found = make_experience(*tensors[:5], kl_coef=0.2, bootstrap_value=tensors[5])
    assert not any(x.requires_grad for x in (*found[:3], *found.metrics.values()))


def test_make_experience_of_half_precision_is_float32():
    half = [x.bfloat16() if x.is_floating_point() else x for x in scored(16)]
    wide = [x.float() if x.is_floating_point() else x for x in half]
    assert_same_bits(make_experience(*half, kl_coef=0.2), make_experience(*wide, kl_coef=0.2))


ZEROS, TRUE = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changed", "tensor"),
    [
        pytest.param(0, torch.zeros(3), id="scores"),
        pytest.param(1, torch.zeros(1, 3), id="log_probs"),
        pytest.param(2, torch.zeros(2, 4), id="ref_log_probs"),
        pytest.param(3, torch.zeros(2, 4), id="values"),
        pytest.param(4, torch.ones(2, 4, dtype=torch.bool), id="mask"),
        pytest.param(4, torch.ones(1, 3, dtype=torch.bool), id="broadcastable_mask"),
    ],
)
def test_make_experience_rejects_other_shapes(changed, tensor):
    tensors = [torch.zeros(2), ZEROS, ZEROS, ZEROS, TRUE]
    tensors[changed] = tensor
    with pytest.raises(ValueError, match=r"^\w+: \w+ (has shape|is) \(.*\), expected (shape )?\(.*\)"):
        make_experience(*tensors, kl_coef=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"gamma is 1.5, expected in \[0, 1\]"),
        ({"lam": -0.5}, r"lam is -0.5, expected in \[0, 1\]"),
        ({"kl_estimator": "k4"}, r"estimator is 'k4', expected one of k1, k2, k3"),
    ],
    ids=["gamma", "lam", "estimator"],
)
def test_make_experience_rejects_options(options, message):
    with pytest.raises(ValueError, match=rf"^\w+: {message}$"):
        make_experience(torch.zeros(2), ZEROS, ZEROS, ZEROS, TRUE, kl_coef=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=["float", "int"])
def test_make_experience_rejects_masks_that_are_not_bool(dtype):
    with pytest.raises(TypeError, match=rf"mask has dtype {dtype}, expected torch.bool \(True = counts\)$"):
        make_experience(torch.zeros(2), ZEROS, ZEROS, ZEROS, TRUE.to(dtype), kl_coef=0.1)


def test_an_estimator_gets_rewards_and_groups_and_no_values_and_its_result_is_checked():
    scores, log_probs, ref_log_probs, _, mask = scored(3)
    seen, groups = [], torch.arange(8) // 2

    def estimate(completions):
        seen.append(completions)
        return AdvantageEstimate(torch.where(mask, completions.rewards, torch.nan).bfloat16())

    estimator = Estimator("mine", estimate, needs_critic=False)
    tensors, options = (scores, log_probs, ref_log_probs, None, mask), {"kl_coef": 0.2, "whiten_advantages": False}
    found = make_experience(*tensors, groups=groups, estimator=estimator, **options)
    assert_close(seen[0].rewards.sum(dim=1), torch.where(mask.any(dim=1), scores, 0.0) - 0.2 * found.kl.sum(dim=1))
    assert seen[0].groups is groups
    assert seen[0].values is None
    assert found.returns is None
    assert_same_bits(found.advantages, torch.where(mask, seen[0].rewards, 0.0).bfloat16().float())
    with pytest.raises(
        ValueError, match=r"^make_experience: values is a tensor, expected None with the estimator mine$"
    ):
        make_experience(scores, log_probs, ref_log_probs, scores, mask, estimator=estimator, **options)
    with pytest.raises(ValueError, match=r"^estimator mine: advantages has shape \(8,\), expected \(8, 7\) like mask$"):
        make_experience(
            *tensors, estimator=estimator._replace(function=lambda c: AdvantageEstimate(c.scores)), **options
        )
