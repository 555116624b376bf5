import itertools

import oracles
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_compiles, assert_pure, assert_vmaps, floats, numpy

from rlhf.statistics import (
    correlation,
    diversity,
    expected_calibration_error,
    mean_interval,
    preference_metrics,
    rank_correlation,
    reliability,
    spread,
    token_repetition,
)

SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS, n=st.integers(2, 20))
def test_correlation_value(seed, n):
    x, y = floats(seed, n), floats(seed + 1, n)
    found = correlation(x, y)
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert_close(found, oracles.correlation(*numpy(x, y)), 1e-9)  # two points may lie close together


@given(seed=SEEDS, scale=st.floats(0.1, 10.0), shift=st.floats(-10.0, 10.0))
def test_correlation_is_one_on_a_rising_line_and_minus_one_on_a_falling_one(seed, scale, shift):
    x = floats(seed, 10)
    assert_close(correlation(x, scale * x + shift), 1.0)
    assert_close(correlation(x, shift - scale * x), -1.0)


@given(seed=st.integers(0, 99), n=st.integers(2, 30))
def test_rank_correlation_is_that_of_scipy_with_ties(seed, n):
    x, y = (2 * floats(seed, n)).round(), floats(seed + 100, n)
    if x.unique().numel() > 1:
        expected = scipy.stats.spearmanr(x.numpy(), y.numpy()).statistic
        assert_close(rank_correlation(x, y), expected, 1e-9)
        assert_close(rank_correlation(x.exp(), -y), -expected, 1e-9)


def test_rank_correlation_of_what_is_constant_or_not_a_number_is_undefined():
    rising, flat, broken = torch.arange(3.0), torch.ones(3), torch.tensor([1.0, torch.nan, 2.0])
    for x in (flat, broken):
        assert rank_correlation(x, rising).isnan()
        assert rank_correlation(rising, x).isnan()
    with pytest.raises(ValueError, match=r"^rank_correlation: "):
        rank_correlation(rising, rising[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 33])
def test_correlation_is_nan_where_one_does_not_vary(dtype, n):
    flat, rising = torch.full((n,), 0.1, dtype=dtype), torch.arange(n, dtype=dtype)
    assert correlation(flat, rising).isnan()
    assert correlation(rising, flat).isnan()


def test_correlation_computes_in_float64():
    x, y = 1e4 + floats(6, 50, dtype=torch.float32), 1e4 + floats(7, 50, dtype=torch.float32)
    assert_close(correlation(x, y), oracles.correlation(*numpy(x, y)), 1e-9)


def test_correlation_laws():
    assert_pure(correlation, floats(1, 6), floats(2, 6))
    assert_compiles(correlation, floats(1, 6), floats(2, 6))
    assert_vmaps(correlation, floats(1, 4, 6), floats(2, 4, 6))


def test_correlation_takes_integers():
    x, y = torch.tensor([1, 2, 4]), torch.tensor([3, 1, 1])
    assert_close(correlation(x, y), oracles.correlation([1, 2, 4], [3, 1, 1]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param(torch.zeros(2, 2), torch.zeros(2, 2), r"x has shape \(2, 2\), expected 1 dimensions", id="rank"),
        pytest.param(torch.zeros(2), torch.zeros(3), r"y has shape \(3,\), expected \(2,\) like x", id="shape"),
    ],
)
def test_correlation_rejects(x, y, message):
    with pytest.raises(ValueError, match=f"^correlation: {message}$"):
        correlation(x, y)


def test_preference_metrics_known_values():
    """Two right, one tie, one wrong; the scores are twice the lengths, less one."""
    found = preference_metrics(
        torch.tensor([3.0, 5.0, 7.0, 1.0]),
        torch.tensor([1.0, 3.0, 7.0, 9.0]),
        torch.tensor([2, 3, 4, 1]),
        torch.tensor([1, 2, 4, 5]),
    )
    assert found == pytest.approx(
        {
            "reward/accuracy": 2.5 / 4,
            "reward/margin": -1.0,
            "reward/min": 1.0,
            "reward/mean": 4.5,
            "reward/max": 9.0,
            "reward/length_correlation": 1.0,
        }
    )


@given(seed=SEEDS, pairs=st.integers(2, 12))
def test_preference_metrics_value(seed, pairs):
    chosen, rejected = floats(seed, pairs), floats(seed + 1, pairs)
    lengths = (10 * floats(seed + 2, pairs).abs()).long(), (10 * floats(seed + 3, pairs).abs()).long()
    both = [*chosen.tolist(), *rejected.tolist()]
    both_lengths = [*lengths[0].tolist(), *lengths[1].tolist()]
    _, metrics = oracles.reward_loss(*numpy(chosen, rejected, torch.ones(pairs)))
    found = preference_metrics(chosen, rejected, *lengths)
    assert found == pytest.approx(
        {
            "reward/accuracy": metrics["reward/accuracy_sum"] / pairs,
            "reward/margin": metrics["reward/margin_sum"] / pairs,
            "reward/min": min(both),
            "reward/mean": sum(both) / len(both),
            "reward/max": max(both),
            "reward/length_correlation": oracles.correlation(both, both_lengths),
        },
        rel=1e-9,
    )


def test_preference_metrics_changes_no_argument():
    arguments = floats(3, 4), floats(4, 4), torch.arange(4), torch.arange(4)
    before = [x.clone() for x in arguments]
    preference_metrics(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_preference_metrics_rejects_other_shapes(odd):
    arguments = [torch.zeros(3) for _ in range(4)]
    arguments[odd] = torch.zeros(2)
    name = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")[odd]
    with pytest.raises(
        ValueError, match=rf"^preference_metrics: {name} has shape \(2,\), expected \(3,\) like chosen$"
    ):
        preference_metrics(*arguments)


@given(seed=SEEDS, n=st.integers(2, 20))
def test_mean_interval_value(seed, n):
    values = 3.0 + floats(seed, n)
    assert mean_interval(values) == pytest.approx(oracles.mean_interval(values.tolist()), rel=1e-12)


def test_mean_interval_computes_in_float64():
    values = 1e4 + floats(5, 50, dtype=torch.float32)
    assert mean_interval(values) == pytest.approx(oracles.mean_interval(values.tolist()), rel=1e-12)


def test_mean_interval_holds_the_mean_19_times_in_20():
    intervals = [mean_interval(floats(seed, 100)) for seed in range(400)]
    share = sum(abs(mean) <= half_width for mean, half_width in intervals) / 400
    assert share == pytest.approx(0.95, abs=0.033)  # 3 standard errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(torch.zeros(1), r"values has shape \(1,\), expected at least 2 values", id="one"),
        pytest.param(torch.zeros(0), r"values has shape \(0,\), expected at least 2 values", id="none"),
        pytest.param(torch.zeros(2, 2), r"values has shape \(2, 2\), expected 1 dimensions", id="rank"),
    ],
)
def test_mean_interval_rejects(values, message):
    with pytest.raises(ValueError, match=f"^mean_interval: {message}$"):
        mean_interval(values)


@given(seed=SEEDS, pairs=st.integers(1, 300), scale=st.floats(0.01, 20.0))
def test_reliability_is_scikit_learns_calibration_curve(seed, pairs, scale):
    """Twenty bins over [0, 1] there are ten over [0.5, 1] here."""
    from sklearn.calibration import calibration_curve

    margins = scale * floats(seed, pairs)
    place, confidence, correct = reliability(margins, bins=10)
    expected = calibration_curve(*numpy(correct, confidence), n_bins=20)
    bins = [place == number for number in range(10) if (place == number).any()]
    assert_close(torch.stack([correct[inside].mean() for inside in bins]), expected[0], 1e-9)
    assert_close(torch.stack([confidence[inside].mean() for inside in bins]), expected[1], 1e-9)
    gaps = abs(expected[0] - expected[1]) * [int(inside.sum()) for inside in bins]
    assert expected_calibration_error(margins, bins=10) == pytest.approx(gaps.sum() / pairs, abs=1e-12)


def test_expected_calibration_error_known_values():
    """Log-odds of 0.8, of which 4 in 5 are right, and a tie, which is half right at confidence 0.5: no error."""
    sure = torch.tensor([4.0]).log()
    calibrated = torch.cat([sure.repeat(4), -sure, torch.zeros(1)])
    assert expected_calibration_error(calibrated) == pytest.approx(0, abs=1e-7)
    assert expected_calibration_error(sure.repeat(5)) == pytest.approx(0.2)
    assert expected_calibration_error(-sure) == pytest.approx(0.8)
    assert expected_calibration_error(torch.tensor([1e4, -1e4])) == pytest.approx(0.5)


def test_a_bin_holds_its_upper_edge():
    assert reliability(torch.tensor([0.0, 3.0]).double().log().clamp(min=0), bins=2).bin.tolist() == [0, 0]
    assert reliability(torch.tensor([0.0, 1.1]), bins=2).bin.tolist() == [0, 1]


@pytest.mark.parametrize("function", [reliability, expected_calibration_error], ids=lambda f: f.__name__)
def test_calibration_rejects(function):
    with pytest.raises(ValueError, match="expected 1 dimensions"):
        function(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="bins is 0, expected at least 1"):
        function(torch.zeros(2), bins=0)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [([1, 2, 3, 4, 5], 4, 0.0), ([1] * 7, 4, 3 / 4), ([1, 2, 1, 2, 1], 2, 2 / 4), ([1, 2], 4, 0.0), ([], 1, 0.0)],
)
def test_token_repetition_known_values(tokens, n, expected):
    assert token_repetition(tokens, n=n) == pytest.approx(expected)


@given(texts=st.lists(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=2), max_size=6))
def test_diversity_without_a_text_is_that_of_the_others(texts):
    def distinct_2(texts):
        grams = [pair for text in texts for piece in text for pair in itertools.pairwise(piece)]
        return len(set(grams)), len(grams)

    found = diversity(texts, n=2)
    assert (found.distinct, sum(found.totals)) == distinct_2(texts)
    for number in range(len(texts)):
        others = (found.distinct - found.sole[number], sum(found.totals) - found.totals[number])
        assert others == distinct_2(texts[:number] + texts[number + 1 :])


@pytest.mark.parametrize(
    ("std", "size", "dtype", "expected"),
    [
        (0.0, 0.0, torch.float32, 0.0),
        (0.0, 1.0, torch.float32, 0.0),
        (5.4e-8, 2.4, torch.float32, 0.0),
        (0.9e-4, 1.0, torch.float32, 0.0),
        (1.1e-4, 1.0, torch.float32, 1.1e-4),
        (1e-3, 1.0, torch.bfloat16, 0.0),
        (1e-2, 1.0, torch.bfloat16, 1e-2),
        (1e-6, 1e-6, torch.float32, 1e-6),
        (1.0, 1000.0, torch.float32, 1.0),
    ],
)
def test_a_spread_of_rounding_noise_is_none(std, size, dtype, expected):
    assert spread(std, size, dtype) == expected


def test_scores_that_differ_by_rounding_have_no_correlation():
    lengths = torch.arange(9.0)
    assert correlation(2.4 + 2e-7 * (lengths % 2), lengths).isnan()
    assert correlation(2.4 + 1e-3 * lengths, lengths) == pytest.approx(1.0, abs=1e-5)
