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

from rlhf.ops import (
    entropy,
    is_argmax,
    masked_mean,
    masked_sum,
    masked_var,
    mean_metrics,
    scale_logits,
    token_log_probs,
    whiten,
)

SEEDS = st.integers(0, 2**32 - 1)
STATISTICS = {
    "masked_sum": (masked_sum, oracles.masked_sum),
    "masked_mean": (masked_mean, oracles.masked_mean),
    "masked_var": (masked_var, oracles.masked_var),
    "masked_var_unbiased": (
        lambda values, mask: masked_var(values, mask, unbiased=True),
        lambda values, mask: oracles.masked_var(values, mask, unbiased=True),
    ),
    "whiten": (whiten, oracles.whiten),
    "whiten_keep_mean": (
        lambda values, mask: whiten(values, mask, shift_mean=False),
        lambda values, mask: oracles.whiten(values, mask, shift_mean=False),
    ),
    "whiten_unbiased": (
        lambda values, mask: whiten(values, mask, unbiased=True),
        lambda values, mask: oracles.whiten(values, mask, unbiased=True),
    ),
}
STATISTIC_CASES = pytest.mark.parametrize(("function", "oracle"), STATISTICS.values(), ids=STATISTICS)
MASKED_CASES = pytest.mark.parametrize("function", [pair[0] for pair in STATISTICS.values()], ids=STATISTICS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])


@STATISTIC_CASES
@DTYPES
@given(seed=SEEDS, rows=st.integers(1, 4), share=st.sampled_from([0.1, 0.5, 1.0]))
def test_masked_statistics_value(function, oracle, dtype, seed, rows, share):
    values, mask = 3.0 + floats(seed, rows, 5, dtype=dtype), coins(seed, rows, 5, share=share)
    found = function(values, mask)
    assert found.dtype == dtype
    assert_close(found, oracle(*numpy(values, mask)), 10 * TOLERANCE[dtype])  # sums of up to 20 numbers near 3


@STATISTIC_CASES
def test_masked_statistics_of_nothing_are_zero_with_zero_gradient(function, oracle):
    values, mask = torch.full((2, 3), torch.nan, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
    assert not function(values, mask).any()
    assert not gradients(lambda x: function(x, mask).sum(), [values])[0].any()


@STATISTIC_CASES
def test_masked_statistics_of_one_element(function, oracle):
    values, mask = floats(1, 2, 3), torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 1] = True
    assert_close(function(values, mask), oracle(*numpy(values, mask)))


@MASKED_CASES
def test_invariant_2_masked_positions_change_no_statistic_nor_gradient(function):
    assert_hidden_ignored(function, [floats(2, 3, 5)], coins(2, 3, 5))


@MASKED_CASES
def test_masked_statistics_gradient(function):
    mask = coins(3, 3, 4)
    assert torch.autograd.gradcheck(lambda x: function(x, mask), floats(3, 3, 4).requires_grad_())


@MASKED_CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_masked_statistics_of_half_precision_are_those_of_float32(function, dtype):
    values, mask = floats(4, 3, 5, dtype=dtype), coins(4, 3, 5)
    assert_same_bits(function(values, mask), function(values.float(), mask))


def test_masked_sum_counts_past_256_in_bfloat16():
    """bfloat16 has no 257: a sum in it would stop there, or round."""
    assert masked_sum(torch.ones(1001, dtype=torch.bfloat16), torch.ones(1001, dtype=torch.bool)) == 1001


@MASKED_CASES
def test_masked_statistics_are_pure(function):
    assert_pure(function, floats(5, 3, 5), coins(5, 3, 5))


@MASKED_CASES
def test_masked_statistics_compile(function):
    assert_compiles(function, floats(6, 3, 5), coins(6, 3, 5))


@MASKED_CASES
def test_masked_statistics_vmap(function):
    assert_vmaps(function, floats(7, 4, 3, 5), coins(7, 4, 3, 5))


@MASKED_CASES
@given(seed=SEEDS)
def test_masked_statistics_follow_a_permutation(function, seed):
    values, mask = floats(seed, 12), coins(seed, 12)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(12))
    expected = function(values, mask)
    assert_close(function(values[order], mask[order]), expected[order] if expected.ndim else expected)


@MASKED_CASES
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        pytest.param(
            torch.ones(2, 4, dtype=torch.bool),
            ValueError,
            r"mask has shape \(2, 4\), expected \(2, 3\) like values",
            id="shape",
        ),
        pytest.param(
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"mask has shape \(3,\), expected \(2, 3\) like values",
            id="broadcastable",
        ),
        pytest.param(
            torch.ones(2, 3),
            TypeError,
            r"mask has dtype torch.float32, expected torch.bool \(True = counts\)",
            id="dtype",
        ),
    ],
)
def test_masked_statistics_reject_other_masks(function, mask, error, message):
    with pytest.raises(error, match=f": {message}$"):
        function(torch.zeros(2, 3), mask)


@given(seed=SEEDS, unbiased=st.booleans())
def test_invariant_6_whitening_gives_masked_mean_0_and_variance_1(seed, unbiased):
    values, mask = 5.0 + 3.0 * floats(seed, 4, 6), coins(seed, 4, 6)
    mask[0, :2] = True
    whitened = whiten(values, mask, unbiased=unbiased)
    # The 1e-8 under the root takes 1e-8 / variance off.
    variance = oracles.masked_var(*numpy(values, mask), unbiased=unbiased)
    kept = oracles.masked_var(*numpy(whitened, mask), unbiased=unbiased)
    assert_close(oracles.masked_mean(*numpy(whitened, mask)), 0.0)
    assert_close(kept, variance / (variance + 1e-8))
    assert kept == pytest.approx(1.0, abs=1e-7)
    assert not whitened[~mask].any()


@given(seed=SEEDS, unbiased=st.booleans())
def test_invariant_6_whitening_without_mean_shift_keeps_the_mean(seed, unbiased):
    values, mask = 5.0 + 3.0 * floats(seed, 4, 6), coins(seed, 4, 6)
    whitened = whiten(values, mask, shift_mean=False, unbiased=unbiased)
    assert_close(oracles.masked_mean(*numpy(whitened, mask)), oracles.masked_mean(*numpy(values, mask)))
    assert_close(whitened - whiten(values, mask, unbiased=unbiased), masked_mean(values, mask) * mask)


@pytest.mark.parametrize(
    ("unbiased", "first_row"),
    [(False, [0.0508, 0.4381, 0.8254]), (True, [0.1394, 0.5046, 0.8697])],
    ids=["biased", "unbiased"],
)
def test_whiten_known_values(unbiased, first_row):
    values = torch.arange(12, 21, dtype=torch.float64).view(3, 3) / 10
    found = whiten(values, shift_mean=False, unbiased=unbiased)
    assert found[0].tolist() == pytest.approx(first_row, abs=5e-5)


def test_whiten_without_mask_counts_everything():
    values = floats(8, 3, 5)
    assert_same_bits(whiten(values), whiten(values, torch.ones(3, 5, dtype=torch.bool)))


def test_whiten_of_a_constant_is_zero():
    assert_close(whiten(torch.full((2, 3), 7.0, dtype=torch.float64)), torch.zeros(2, 3))


@given(seed=SEEDS, scale=st.floats(0.1, 10.0), shift=st.floats(-10.0, 10.0))
def test_whiten_undoes_scale_and_shift(seed, scale, shift):
    values = floats(seed, 4, 6)
    assert_close(whiten(scale * values + shift), whiten(values), 1e-5)  # up to the 1e-8 under the root


def logits_and_targets(seed, *, dtype=torch.float64):
    logits = 3.0 * floats(seed, 3, 4, 7, dtype=dtype)
    return logits, torch.from_numpy(np.random.default_rng(seed).integers(0, 7, (3, 4)))


@DTYPES
@given(seed=SEEDS, temperature=st.floats(0.3, 3.0))
def test_token_log_probs_value(dtype, seed, temperature):
    logits, targets = logits_and_targets(seed, dtype=dtype)
    found = token_log_probs(logits, targets, temperature=temperature)
    assert found.dtype == dtype
    assert_close(found, oracles.token_log_probs(*numpy(logits, targets), temperature=temperature), 4 * TOLERANCE[dtype])


@TEMPERATURES
def test_token_log_probs_add_up_to_one_over_the_vocabulary(temperature):
    logits, _ = logits_and_targets(1)
    every = [token_log_probs(logits, torch.full((3, 4), token), temperature=temperature) for token in range(7)]
    assert_close(torch.stack(every).exp().sum(dim=0), torch.ones(3, 4))


def test_token_log_probs_ignore_a_constant_and_survive_large_logits():
    logits, targets = logits_and_targets(2)
    assert_close(token_log_probs(logits + 1e4, targets), token_log_probs(logits, targets), 1e-10)
    extreme = torch.tensor([[1e4, 0.0, -1e4]])
    assert_close(token_log_probs(extreme.expand(3, 3), torch.arange(3)), [0.0, -1e4, -2e4])


def test_token_log_probs_of_the_only_token_is_zero():
    assert_close(token_log_probs(floats(2, 5, 1), torch.zeros(5, dtype=torch.int64)), torch.zeros(5))


@TEMPERATURES
@pytest.mark.parametrize("compiling", [False, True])
def test_token_log_probs_gradient(temperature, compiling, monkeypatch):
    logits, targets = logits_and_targets(3)
    expected = token_log_probs(logits, targets, temperature=temperature)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert_close(token_log_probs(logits, targets, temperature=temperature), expected)
    assert torch.autograd.gradcheck(
        lambda x: token_log_probs(x, targets, temperature=temperature), logits.requires_grad_()
    )


@DTYPES
@given(seed=SEEDS, temperature=st.floats(0.3, 3.0))
def test_entropy_value(dtype, seed, temperature):
    logits, _ = logits_and_targets(seed, dtype=dtype)
    found = entropy(logits, temperature=temperature)
    assert found.dtype == dtype
    assert_close(found, oracles.entropy(numpy(logits), temperature=temperature), 4 * TOLERANCE[dtype])


@TEMPERATURES
def test_entropy_gradient(temperature):
    logits, _ = logits_and_targets(4)
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature=temperature), logits.requires_grad_())


def test_entropy_of_the_uniform_and_of_the_certain():
    assert_close(entropy(torch.full((2, 7), 3.0, dtype=torch.float64)), torch.full((2,), 7.0).double().log())
    assert_close(entropy(torch.tensor([1e4, 0.0, -1e4], dtype=torch.float64)), 0.0)


@DTYPES
def test_entropy_ignores_tokens_of_probability_0(dtype):
    logits = torch.tensor([0.3, -torch.inf, 1.0, -torch.inf], dtype=dtype)
    assert_close(entropy(logits, temperature=0.7), entropy(logits[::2], temperature=0.7), TOLERANCE[dtype])
    gradient = torch.func.grad(entropy)(logits)
    assert_close(gradient[::2], torch.func.grad(entropy)(logits[::2]), TOLERANCE[dtype])
    assert not gradient[1::2].any()
    assert entropy(torch.tensor([0.0, -torch.inf])) == 0


def test_entropy_is_the_expected_surprise():
    logits, _ = logits_and_targets(5)
    every = torch.stack([token_log_probs(logits, torch.full((3, 4), token)) for token in range(7)])
    assert_close(entropy(logits), -(every.exp() * every).sum(dim=0))


LOGIT_FUNCTIONS = {
    "token_log_probs": lambda logits, targets: token_log_probs(logits, targets, temperature=0.7),
    "entropy": lambda logits, targets: entropy(logits, temperature=0.7),
    "scale_logits": lambda logits, targets: scale_logits(logits, 0.7),
}
LOGIT_CASES = pytest.mark.parametrize("function", LOGIT_FUNCTIONS.values(), ids=LOGIT_FUNCTIONS)


@LOGIT_CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_logits_of_low_precision_are_widened_first(function, dtype):
    logits, targets = logits_and_targets(6, dtype=dtype)
    assert_same_bits(function(logits, targets), function(logits.float(), targets))


@LOGIT_CASES
def test_logit_functions_are_pure(function):
    assert_pure(function, *logits_and_targets(7))


@LOGIT_CASES
def test_logit_functions_treat_rows_alone(function):
    assert_rows_independent(function, *logits_and_targets(8))


@LOGIT_CASES
def test_logit_functions_compile(function):
    assert_compiles(function, *logits_and_targets(9))


@LOGIT_CASES
def test_logit_functions_vmap(function):
    assert_vmaps(function, *logits_and_targets(10))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, t: token_log_probs(x, torch.zeros(2, dtype=torch.int64), temperature=t), id="log_probs"),
        pytest.param(lambda x, t: entropy(x, temperature=t), id="entropy"),
        pytest.param(scale_logits, id="scale_logits"),
    ],
)
def test_logit_functions_reject_temperatures_that_are_not_positive(function, temperature):
    with pytest.raises(ValueError, match=rf"temperature is {temperature}, expected above 0"):
        function(torch.zeros(2, 3), temperature)


def test_token_log_probs_rejects_other_targets():
    logits, targets = logits_and_targets(12)
    with pytest.raises(
        ValueError,
        match=r"^token_log_probs: logits\[\.\.\., 0\] has shape \(3, 4\), expected \(4,\) like targets$",
    ):
        token_log_probs(logits, targets[0])
    with pytest.raises(TypeError, match=r"^token_log_probs: targets has dtype torch.int32, expected torch.int64$"):
        token_log_probs(logits, targets.int())


@TEMPERATURES
def test_scale_logits_value(temperature):
    logits, _ = logits_and_targets(13)
    assert_close(scale_logits(logits, temperature), numpy(logits) / temperature)


def test_mean_metrics_divides_by_the_count_once():
    found = mean_metrics({"a_sum": torch.tensor(6.0), "count": torch.tensor(4), "b_sum": torch.tensor(-2.0)})
    assert_close(found, {"a": 1.5, "b": -0.5})


@pytest.mark.parametrize("count", [0, 1])
def test_mean_metrics_of_one_or_nothing_are_the_sums(count):
    assert_close(mean_metrics({"a_sum": torch.tensor(3.0), "count": torch.tensor(count)}), {"a": 3.0})


def test_mean_metrics_of_weights_below_one():
    assert_close(mean_metrics({"a_sum": torch.tensor(3.0), "count": torch.tensor(0.5)}), {"a": 6.0})


@pytest.mark.parametrize("compiling", [False, True])
def test_is_likeliest_lets_ties_count(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    logits = torch.tensor([[0.0, 2.0, 2.0], [0.0, -1.0, -2.0]])
    found = [is_argmax(logits, torch.tensor([token, token])).tolist() for token in range(3)]
    assert found == [[False, True], [True, False], [True, False]]


def test_mean_metrics_needs_a_count():
    with pytest.raises(KeyError, match="count"):
        mean_metrics({"a_sum": torch.tensor(1.0)})


def test_a_sum_that_is_named_like_a_mean_is_refused():
    with pytest.raises(ValueError, match=r"loss/a"):
        mean_metrics({"loss/a": torch.tensor(6.0), "count": torch.tensor(4)})


def test_mean_metrics_is_pure():
    assert_pure(mean_metrics, {"a_sum": torch.tensor(6.0), "count": torch.tensor(4)})
