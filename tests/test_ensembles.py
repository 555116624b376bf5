"""Scores of an ensemble into one."""

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_same_bits, floats

from rlhf.ensembles import combine_scores, error_correlation

SCORES = floats(1, 6, 5)


@pytest.mark.parametrize("how", ["mean", "min", "uncertainty"])
def test_each_is_its_definition(how):
    for row, found in zip(SCORES.tolist(), combine_scores(SCORES, how=how, coef=0.3), strict=True):
        mean = sum(row) / 5
        variance = sum((score - mean) ** 2 for score in row) / 5
        assert_close(found, {"mean": mean, "min": min(row), "uncertainty": mean - 0.3 * variance}[how])


@given(seed=st.integers(0, 40), coef=st.floats(0, 3))
def test_laws(seed, coef):
    scores = floats(seed, 4, 3)
    mean, least, uncertain = (combine_scores(scores, how=how, coef=coef) for how in ("mean", "min", "uncertainty"))
    assert (least <= mean + 1e-12).all()
    assert (uncertain <= mean + 1e-12).all()
    shifted = combine_scores(scores + 2.0, how="uncertainty", coef=coef)
    assert_close(shifted, uncertain + 2.0, 1e-9)
    order = scores[:, [2, 0, 1]]
    for how in ("mean", "min", "uncertainty"):
        assert_close(combine_scores(order, how=how, coef=coef), combine_scores(scores, how=how, coef=coef), 1e-9)


def test_a_coefficient_of_zero_is_the_mean_and_one_member_is_that_member():
    assert_same_bits(combine_scores(SCORES, how="uncertainty", coef=0.0), combine_scores(SCORES, how="mean"))
    for how in ("mean", "min", "uncertainty"):
        assert_same_bits(combine_scores(SCORES[:, :1], how=how), SCORES[:, 0])


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.ones(2, 0), {}, "at least 1 member"),
        (torch.tensor(1.0), {}, "at least 1 member"),
        (SCORES, {"how": "max"}, "how is max, expected mean, min or uncertainty"),
        (SCORES, {"coef": -1.0}, "coef is -1.0, expected at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(scores, options, message):
    with pytest.raises(ValueError, match=message):
        combine_scores(scores, **options)


def test_low_precision_is_upcast():
    assert combine_scores(SCORES.bfloat16()).dtype == torch.float32


@given(seed=st.integers(0, 200), size=st.integers(3, 40))
def test_error_correlation_is_that_of_scipy_and_has_no_unit(seed, size):
    disagreement, proxy, gold = (floats(seed + n, size) for n in (0, 1000, 2000))
    gold = gold.round()  # with ties
    error = abs(scipy.stats.zscore(proxy.numpy()) - scipy.stats.zscore(gold.numpy()))
    expected = scipy.stats.spearmanr(disagreement.numpy(), error).statistic
    found = error_correlation(disagreement, proxy, gold)
    if gold.unique().numel() > 1:
        assert_close(found, expected, 1e-9)
        assert_close(error_correlation(disagreement, 3 * proxy - 1, 0.5 * gold + 7), found, 1e-6)


def test_error_correlation_of_a_constant_is_undefined():
    rising, flat = torch.arange(3.0, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64)
    assert flat.mean() != 0.1, "the mean is rounded"
    for arguments in ((flat, rising, rising.square()), (rising, flat, rising), (rising, rising, flat)):
        assert error_correlation(*arguments).isnan()
    with pytest.raises(ValueError, match=r"^error_correlation: "):
        error_correlation(rising, rising, rising[:2])
