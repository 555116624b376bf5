import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from torch.func import grad, grad_and_value

from rlhf.kl import adaptive_kl_coef, budget_kl_coef, exact_kl, importance_weighted_kl, kl_estimate, ratio_of

SEEDS = st.integers(0, 2**32 - 1)
ESTIMATORS = pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
FUNCTIONS = {
    "k1": lambda x, y: kl_estimate(x, y, estimator="k1"),
    "k2": lambda x, y: kl_estimate(x, y, estimator="k2"),
    "k3": lambda x, y: kl_estimate(x, y, estimator="k3"),
    "exact": lambda x, y: exact_kl(x, y, temperature=0.7),
}
FUNCTION_CASES = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def two(seed, *shape, dtype=torch.float64):
    return floats(seed, *shape, dtype=dtype), floats(seed + 1, *shape, dtype=dtype)


@ESTIMATORS
@DTYPES
@given(seed=SEEDS)
def test_kl_estimate_value(estimator, dtype, seed):
    log_probs, ref_log_probs = two(seed, 3, 5, dtype=dtype)
    found = kl_estimate(log_probs, ref_log_probs, estimator=estimator)
    assert found.dtype == dtype
    assert_close(
        found, oracles.kl_estimate(*numpy(log_probs, ref_log_probs), estimator=estimator), 10 * TOLERANCE[dtype]
    )


def test_kl_estimate_is_k1_unless_told():
    log_probs, ref_log_probs = two(1, 6)
    assert_same_bits(kl_estimate(log_probs, ref_log_probs), log_probs - ref_log_probs)


def test_kl_estimate_k3_keeps_small_differences():
    """exp(-d) - 1 + d loses d^2 / 2 to rounding when d is small, unless expm1 is used."""
    found = kl_estimate(torch.tensor(1e-7, dtype=torch.float64), torch.zeros((), dtype=torch.float64), estimator="k3")
    assert float(found) == pytest.approx(5e-15, rel=1e-6, abs=0.0)


@DTYPES
@given(seed=SEEDS, temperature=st.floats(0.3, 3.0))
def test_exact_kl_value(dtype, seed, temperature):
    logits, ref_logits = two(seed, 3, 7, dtype=dtype)
    found = exact_kl(logits, ref_logits, temperature=temperature)
    assert found.dtype == dtype
    expected = oracles.exact_kl(*numpy(logits, ref_logits), temperature=temperature)
    assert_close(found, expected, 4 * TOLERANCE[dtype])


@given(seed=SEEDS, constant=st.floats(-5.0, 5.0))
def test_exact_kl_is_zero_where_logits_differ_by_a_constant_and_positive_elsewhere(seed, constant):
    logits, ref_logits = two(seed, 3, 7)
    assert_close(exact_kl(logits, logits + constant), torch.zeros(3))
    assert (exact_kl(logits, ref_logits) > 0).all()


def test_exact_kl_widens_low_precision():
    logits, ref_logits = two(2, 3, 7, dtype=torch.bfloat16)
    assert_same_bits(exact_kl(logits, ref_logits), exact_kl(logits.float(), ref_logits.float()))


@given(seed=SEEDS)
def test_invariant_7_expected_k1_and_k3_are_the_exact_kl(seed):
    """On a vocabulary small enough to enumerate, the expectation is a sum over it, weighted by the policy."""
    logits, ref_logits = two(seed, 4, 9)
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    for estimator in ("k1", "k3"):
        expected = (log_p.exp() * kl_estimate(log_p, log_q, estimator=estimator)).sum(-1)
        assert_close(expected, exact_kl(logits, ref_logits))


@given(seed=SEEDS)
def test_invariant_7_k2_and_k3_are_never_negative(seed):
    log_probs, ref_log_probs = two(seed, 50)
    for estimator in ("k2", "k3"):
        assert (kl_estimate(log_probs, ref_log_probs, estimator=estimator) >= 0).all()
        assert_same_bits(kl_estimate(log_probs, log_probs, estimator=estimator), torch.zeros(50, dtype=torch.float64))


@given(seed=SEEDS)
def test_invariant_7_gradient_of_expected_k2_is_that_of_the_kl(seed):
    """E_p[grad k2] = E_p[(log p - log q) grad log p] = grad KL: the samples, and so their weights, are constants."""
    logits, ref_logits = two(seed, 9)
    weights = logits.softmax(-1)

    def sampled(x, estimator):
        estimates = kl_estimate(x.log_softmax(-1), ref_logits.log_softmax(-1), estimator=estimator)
        return (weights * estimates).sum()

    exact = grad(exact_kl)(logits, ref_logits)
    assert_close(grad(sampled)(logits, "k2"), exact)
    # And k1 has none, k3 that of the other divergence: the reason to have k2.
    assert_close(grad(sampled)(logits, "k1"), torch.zeros(9))
    assert_close(grad(sampled)(logits, "k3"), grad(lambda x: exact_kl(ref_logits, x))(logits))


@ESTIMATORS
def test_kl_estimate_of_half_precision_is_float32(estimator):
    log_probs, ref_log_probs = two(2, 3, 7, dtype=torch.bfloat16)
    found = kl_estimate(log_probs, ref_log_probs, estimator=estimator)
    assert_same_bits(found, kl_estimate(log_probs.float(), ref_log_probs.float(), estimator=estimator))


@ESTIMATORS
@pytest.mark.parametrize("difference", [-20.0, -30.0, -89.0, -1000.0, 89.0, 1000.0])
def test_kl_estimate_is_finite_with_its_gradient_at_any_log_ratio(estimator, difference):
    step = grad_and_value(lambda x: kl_estimate(x, torch.zeros(()), estimator=estimator))
    gradient, value = step(torch.tensor(difference))
    assert torch.isfinite(gradient)
    assert torch.isfinite(value)
    assert estimator == "k1" or value * gradient * difference > 0  # it still pulls towards the reference


def test_ratio_is_exp_up_to_the_bound_and_its_tangent_above():
    inside = torch.tensor([-torch.inf, -300.0, -20.0, -1e-3, 0.0, 0.3, 19.999], dtype=torch.float32)
    assert_same_bits(ratio_of(inside), inside.exp())
    assert_same_bits(torch.vmap(grad(ratio_of))(inside), inside.exp())
    above = torch.tensor([21.0, 89.0, 1000.0], dtype=torch.float64)
    top = math.exp(20.0)
    assert_close(ratio_of(above) / top, above - 19.0)
    assert_close(torch.vmap(grad(ratio_of))(above) / top, torch.ones(3))


INF = float("inf")


@DTYPES
def test_exact_kl_takes_tokens_of_probability_0(dtype):
    logits = torch.tensor([[0.3, -INF, 1.0], [0.3, -INF, 1.0], [0.3, 2.0, 1.0]], dtype=dtype)
    ref_logits = torch.tensor([[0.1, -INF, -1.0], [0.1, 5.0, -1.0], [0.1, -INF, -1.0]], dtype=dtype)
    found = exact_kl(logits, ref_logits, temperature=0.7)
    both = exact_kl(logits[:1, ::2], ref_logits[:1, ::2], temperature=0.7)
    dominated = oracles.exact_kl(
        logits[1:2].clamp(min=-1e3).double().numpy(), ref_logits[1:2].double().numpy(), temperature=0.7
    )
    assert_close(found, [float(both[0]), float(dominated[0]), INF], TOLERANCE[dtype])
    for gradient in grad(lambda x, y: exact_kl(x, y).sum(), argnums=(0, 1))(logits, ref_logits):
        assert torch.isfinite(gradient).all()
    assert_close(grad(lambda x: exact_kl(x, ref_logits)[0])(logits)[0, 1], 0.0)


def test_exact_kl_is_infinite_where_the_policys_probability_underflows_and_the_references_is_0():
    assert exact_kl(torch.tensor([0.0, -200.0]), torch.tensor([0.0, -INF])) == INF


@FUNCTION_CASES
def test_kl_gradient(function):
    arguments = [x.requires_grad_() for x in two(3, 3, 7)]
    assert torch.autograd.gradcheck(function, arguments)


@FUNCTION_CASES
def test_kl_functions_are_pure(function):
    assert_pure(function, *two(4, 3, 7))


@FUNCTION_CASES
def test_kl_functions_treat_rows_alone(function):
    assert_rows_independent(function, *two(5, 4, 7))


@FUNCTION_CASES
def test_kl_functions_compile(function):
    assert_compiles(function, *two(6, 3, 7))


@FUNCTION_CASES
def test_kl_functions_vmap(function):
    assert_vmaps(function, *two(7, 4, 3, 7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: kl_estimate(torch.zeros(3), torch.zeros(2)),
            r"kl_estimate: ref_log_probs has shape \(2,\), expected \(3,\) like log_probs",
            id="estimate_shape",
        ),
        pytest.param(
            lambda: kl_estimate(torch.zeros(3), torch.zeros(3), estimator="k4"),
            "kl_estimate: estimator is 'k4', expected one of k1, k2, k3",
            id="estimator",
        ),
        pytest.param(
            lambda: exact_kl(torch.zeros(2, 3), torch.zeros(3)),
            r"exact_kl: ref_logits has shape \(3,\), expected \(2, 3\) like logits",
            id="exact_shape",
        ),
        pytest.param(
            lambda: exact_kl(torch.zeros(3), torch.zeros(3), temperature=0.0),
            r"\w+: temperature is 0.0, expected above 0.*",
            id="temperature",
        ),
        pytest.param(
            lambda: adaptive_kl_coef(0.1, 1.0, num_samples=1, target=0.0),
            "adaptive_kl_coef: target is 0.0, expected above 0",
            id="target",
        ),
        pytest.param(
            lambda: adaptive_kl_coef(0.1, 1.0, num_samples=1, horizon=0.0),
            "adaptive_kl_coef: horizon is 0.0, expected above 0",
            id="horizon",
        ),
        pytest.param(
            lambda: adaptive_kl_coef(0.1, 1.0, num_samples=101, horizon=100.0),
            "adaptive_kl_coef: num_samples is 101, expected at most horizon = 100",
            id="samples",
        ),
    ],
)
def test_kl_functions_reject(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


@given(
    kl_coef=st.floats(1e-3, 10.0),
    kl=st.floats(-5.0, 50.0),
    num_samples=st.integers(1, 1000),
    target=st.floats(0.1, 20.0),
    horizon=st.floats(1000, 1e5),
)
def test_invariant_11_adaptive_kl_coef_value(kl_coef, kl, num_samples, target, horizon):
    found = adaptive_kl_coef(kl_coef, kl, num_samples=num_samples, target=target, horizon=horizon)
    expected = oracles.adaptive_kl_coef(kl_coef, kl, num_samples=num_samples, target=target, horizon=horizon)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found > 0


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        pytest.param(6.0, 1.0, id="on_target"),
        pytest.param(6.6, 1.0 + 0.1 * 64 / 10_000, id="a_tenth_above"),
        pytest.param(7.2, 1.0 + 0.2 * 64 / 10_000, id="at_the_upper_clip"),
        pytest.param(600.0, 1.0 + 0.2 * 64 / 10_000, id="far_above"),
        pytest.param(5.4, 1.0 - 0.1 * 64 / 10_000, id="a_tenth_below"),
        pytest.param(0.0, 1.0 - 0.2 * 64 / 10_000, id="far_below"),
    ],
)
def test_invariant_11_adaptive_kl_coef_known_values(kl, factor):
    """With the constants of Ziegler et al.: target 6 nats, horizon 10,000."""
    assert adaptive_kl_coef(0.15, kl, num_samples=64) == pytest.approx(0.15 * factor, rel=1e-12)


POLICY, OLDER, REFERENCE = (floats(seed, 4) for seed in (70, 71, 72))


def mean_gradient(sampled_by, loss):
    """Over all tokens, weighed by the probability that `sampled_by` draws them, of the loss of their log-probs."""

    def mean(logits):
        return (torch.softmax(sampled_by, -1) * loss(torch.log_softmax(logits, -1))).sum()

    return grad(mean)(POLICY)


def kl_gradient(forwards=True):
    def divergence(logits):
        return exact_kl(logits, REFERENCE) if forwards else exact_kl(REFERENCE, logits)

    return grad(divergence)(POLICY)


def test_the_mean_gradients_of_the_estimators_are_those_that_the_docstring_names():
    found = {
        name: mean_gradient(POLICY, lambda x, n=name: kl_estimate(x, torch.log_softmax(REFERENCE, -1), estimator=n))
        for name in ("k1", "k2", "k3")
    }
    assert_close(found["k1"], torch.zeros(4))
    assert_close(found["k2"], kl_gradient())
    assert_close(found["k3"], kl_gradient(forwards=False))
    assert (kl_gradient() - kl_gradient(forwards=False)).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("sampled_by", [POLICY, OLDER], ids=["on-policy", "off-policy"])
def test_the_importance_weighted_kl_is_exact_gradient_included(estimator, sampled_by):
    def loss(log_probs):
        return importance_weighted_kl(
            log_probs,
            old_log_probs=torch.log_softmax(sampled_by, -1),
            ref_log_probs=torch.log_softmax(REFERENCE, -1),
            estimator=estimator,
        )

    assert_close(mean_gradient(sampled_by, loss), kl_gradient())
    value = (torch.softmax(sampled_by, -1) * loss(torch.log_softmax(POLICY, -1))).sum()
    assert_close(value, exact_kl(POLICY, REFERENCE))
    off = mean_gradient(OLDER, lambda x: kl_estimate(x, torch.log_softmax(REFERENCE, -1), estimator="k2"))
    assert (off - kl_gradient()).abs().max() > 0.01, "which the plain estimator is not"


def test_the_importance_weights_constants_have_no_gradient_and_a_far_ratio_is_finite():
    log_probs, old, ref = floats(1, 5), floats(2, 5), floats(3, 5)
    slopes = grad(
        lambda old, ref: importance_weighted_kl(log_probs, old_log_probs=old, ref_log_probs=ref).sum(), (0, 1)
    )(old, ref)
    assert not any(slope.any() for slope in slopes)
    zero = torch.zeros(1)
    assert importance_weighted_kl(zero, old_log_probs=zero - 1e3, ref_log_probs=zero).isfinite()
    half = (x.bfloat16() for x in (log_probs, old, ref))
    assert importance_weighted_kl(next(half), old_log_probs=next(half), ref_log_probs=next(half)).dtype == torch.float32
    with pytest.raises(ValueError, match="importance_weighted_kl: old_log_probs has shape"):
        importance_weighted_kl(log_probs, old_log_probs=old[:1], ref_log_probs=ref)


def test_a_budget_is_a_bound_on_the_kl_and_not_a_target():
    assert budget_kl_coef(0.2, 20.0, budget=10.0, floor=0.2) == pytest.approx(0.3), "by half at most"
    assert budget_kl_coef(0.2, 11.0, budget=10.0, floor=0.2) == pytest.approx(0.22)
    assert budget_kl_coef(0.3, 8.0, budget=10.0, floor=0.2) == pytest.approx(0.24)
    assert budget_kl_coef(0.3, 1.0, budget=10.0, floor=0.2) == pytest.approx(0.2)
    assert budget_kl_coef(0.2, 0.0, budget=10.0, floor=0.2) == 0.2
    values = torch.tensor([20.0, 1.0])
    mapped = torch.func.vmap(lambda kl: budget_kl_coef(0.2, kl, budget=10.0, floor=0.2))(values)
    torch.testing.assert_close(mapped, torch.tensor([0.3, 0.2]))
    with pytest.raises(ValueError, match="most"):
        budget_kl_coef(0.2, 1.0, budget=10.0, floor=0.2, most=1.0)
