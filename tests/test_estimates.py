"""Figures and their bootstrap intervals, against exact bootstrap distributions, NumPy and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from rlhf.evaluate.estimates import (
    Estimate,
    difference,
    exponential,
    figures,
    from_influence,
    grouped_correlation,
    linearised,
    mean,
    ratio,
    win_indicator,
)
from rlhf.statistics import diversity


def one(estimate, seed=0):
    return figures({"it": estimate}, seed=seed)["it"]


def test_a_win_rate_by_hand():
    """3 wins of 6: a resample's wins are binomial(6, 1/2), whose cumulative probabilities are 1/64, 7/64, … 63/64."""
    figure = one(mean([1, 1, 1, 0, 0, 0]))
    assert (figure.value, figure.n) == (0.5, 6)
    assert (figure.low, figure.high) == (pytest.approx(1 / 6), pytest.approx(5 / 6))
    assert (figure.low, figure.high) == (pytest.approx(binom.ppf(0.025, 6, 0.5) / 6), pytest.approx(5 / 6))


def test_three_samples_against_all_27_resamples():
    values, weights = np.array([1.0, 4.0, 10.0]), np.array([1.0, 2.0, 2.0])
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    exact = [values[draw].sum() / weights[draw].sum() for draw in draws]
    figure = one(ratio(values, weights))
    assert figure.value == pytest.approx(3.0)
    low, high = np.percentile(exact * 200, [2.5, 97.5])  # 27 values: without repetition the ends are interpolated
    assert (figure.low, figure.high) == (pytest.approx(low), pytest.approx(high))


def test_the_interval_of_a_mean_is_scipys_own():
    from scipy.stats import bootstrap

    values = np.linspace(0, 1, 30) ** 2
    own = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=5).confidence_interval
    figure = one(mean(values), seed=5)
    assert (figure.low, figure.high) == (pytest.approx(own.low), pytest.approx(own.high))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 40))
def test_values_are_numpys(seed, n):
    x, y, weights = np.random.default_rng(seed).random((3, n, 2)) + 0.1
    found = figures(
        {
            "ratio": ratio(x[:, 0], weights[:, 0]),
            "exp": exponential(ratio(x[:, 0], weights[:, 0])),
            "correlation": grouped_correlation(100 + x, y),
            "difference": difference(mean(x[:, 0]), mean(y[:, 0])),
        },
        seed=0,
    )
    assert found["ratio"].value == pytest.approx(x[:, 0].sum() / weights[:, 0].sum())
    assert found["exp"].value == pytest.approx(np.exp(found["ratio"].value))
    assert found["correlation"].value == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1], abs=1e-9)
    assert found["difference"].value == pytest.approx((x - y)[:, 0].mean())
    assert all(figure.low <= figure.value + 1e-9 and figure.value <= figure.high + 1e-9 for figure in found.values())


def test_differences_are_paired():
    """Two models whose scores differ by exactly 1 on prompts that differ a lot."""
    scores = np.random.default_rng(0).normal(size=50) * 100
    figure = one(difference(mean(scores + 1), mean(scores)))
    assert (figure.low, figure.high) == (pytest.approx(1), pytest.approx(1))


def test_figures_do_not_depend_on_their_company():
    values = np.random.default_rng(1).random(20)
    alone, beside = one(mean(values)), figures({"a": mean(values**2), "it": mean(values)}, seed=0)["it"]
    assert alone == pytest.approx(beside)


def test_the_interval_holds_the_truth_19_times_in_20():
    generator = np.random.default_rng(2)
    found = [one(ratio(w * generator.normal(2, 1, 100), w)) for w in generator.integers(1, 9, (200, 100))]
    share = np.mean([figure.low <= 2 <= figure.high for figure in found])
    assert share == pytest.approx(0.94, abs=0.04)


def test_linearised_keeps_the_value_and_removes_the_bias_of_resampling():
    """|mean of 200 numbers around 0|: resampling widens it; the linearisation's interval surrounds the value."""
    values = np.random.default_rng(3).normal(0, 1, (200, 40))

    def mean_size(sums):
        return np.abs(sums).sum(axis=0) / 200

    plain, straight = one(Estimate(values, mean_size)), one(linearised(Estimate(values, mean_size), least=0.0))
    assert straight.value == pytest.approx(plain.value)
    assert plain.low > plain.value, "every resample is above"
    assert straight.low < straight.value < straight.high


def test_distinct_n_holds_what_other_texts_of_the_same_source_give():
    generator, words = np.random.default_rng(4), 1 / np.arange(1, 501)

    def texts():
        return [[row.tolist()] for row in generator.choice(500, (60, 20), p=words / words.sum())]

    def estimate(found):
        left = sum(found.totals) - np.array(found.totals)
        return from_influence(found.distinct / sum(found.totals), (found.distinct - np.array(found.sole)) / left)

    samples = [diversity(texts(), n=1) for _ in range(200)]
    truth = np.mean([found.distinct / sum(found.totals) for found in samples])
    share = np.mean([figure.low <= truth <= figure.high for figure in (one(estimate(found)) for found in samples)])
    assert share > 0.9


def test_what_cannot_be_known_is_nan():
    assert one(mean(np.ones(1))) == pytest.approx((1, np.nan, np.nan, 1), nan_ok=True)
    assert np.isnan(one(grouped_correlation(np.ones((5, 2)), np.arange(10).reshape(5, 2))).value)
    assert np.isnan(one(grouped_correlation([[0], [1]], [[0], [1]])).low), "some resamples have one sample twice"
    assert figures({}, seed=0) == {}


def test_many_samples_are_resampled_in_parts(monkeypatch):
    values = np.random.default_rng(5).random(50)
    whole = one(mean(values))
    monkeypatch.setattr("rlhf.evaluate.estimates._ELEMENTS_AT_ONCE", 100)
    assert one(mean(values)) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("score", "other", "outcome"),
    [(1, 0.5, 1), (0.5, 1, 0), (1, 1, 0.5), (2.4, 2.4 + 3e-7, 0.5), (-2.4, -2.4 - 3e-7, 0.5), (1e-3, 0, 1)],
)
def test_a_difference_within_rounding_is_a_tie(score, other, outcome):
    assert win_indicator(np.array([score]), np.array([other])).tolist() == [outcome]


def test_values_that_vary_by_rounding_alone_have_no_correlation():
    lengths = np.arange(20.0).reshape(10, 2)
    noise = 2.4 + 1e-7 * (lengths % 3)
    assert math.isnan(figures({"r": grouped_correlation(noise, lengths)}, seed=0)["r"].value)
    assert figures({"r": grouped_correlation(2.4 + 1e-3 * lengths, lengths)}, seed=0)["r"].value == pytest.approx(1.0)
