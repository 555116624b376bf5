"""Best-of-n against all subsets, and the bound on its KL against the KL itself."""

import itertools
import math

import pytest
import torch
from laws import assert_close, assert_same_bits, floats

from rlhf.best_of_n_sampling import best_of_n, bon_kl_bound


def brute_force(proxy, values, n):
    """The mean over n-subsets of the value of the best; of tied ones, their mean."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        tied = [values[i] for i in subset if proxy[i] == best]
        found.append(sum(tied) / len(tied))
    return sum(found) / len(found)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_mean_over_all_subsets(n, ties):
    proxy = (2 * floats(1, 3, 7)).round() if ties else floats(1, 3, 7)
    values = floats(2, 3, 7)
    expected = [brute_force(p, v, n) for p, v in zip(proxy.tolist(), values.tolist(), strict=True)]
    assert_close(best_of_n(proxy, values, n), torch.tensor(expected, dtype=torch.float64))


def test_one_is_the_mean_and_all_is_the_best():
    proxy, values = floats(3, 9), floats(4, 9)
    assert_close(best_of_n(proxy, values, 1), values.mean())
    assert_same_bits(best_of_n(proxy, values, 9), values[proxy.argmax()])


def test_it_rises_with_n_for_the_proxy_itself_and_is_finite_for_many_samples():
    proxy = floats(5, 1024)
    curve = [float(best_of_n(proxy, proxy, n)) for n in (1, 2, 4, 64, 512, 1024)]
    assert curve == sorted(curve)
    assert curve[-1] == proxy.max()


def test_it_is_unbiased_against_enumerated_draws():
    """Over all draws of N = 4 from three outcomes, its mean for n = 2 is the value of drawing 2 outright."""
    probability, proxy, value = [0.5, 0.3, 0.2], [0.0, 1.0, 2.0], [1.0, -3.0, 5.0]

    def mean_over_draws(count, n):
        total = 0.0
        for draw in itertools.product(range(3), repeat=count):
            p, v = (torch.tensor([column[i] for i in draw], dtype=torch.float64) for column in (proxy, value))
            total += math.prod(probability[i] for i in draw) * float(best_of_n(p, v, n))
        return total

    assert mean_over_draws(4, 2) == pytest.approx(mean_over_draws(2, 2), abs=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_n_is_among_the_samples(n):
    with pytest.raises(ValueError, match=f"n is {n}, expected from 1 to the 3 samples"):
        best_of_n(torch.ones(3), torch.ones(3), n)


def exact_kl_of_best_of(n, probabilities):
    """KL(best-of-n || policy) of a policy over outcomes in the order of their score, without ties."""
    kl, below = 0.0, 0.0
    for p in probabilities:
        best = (below + p) ** n - below**n
        kl += best * math.log(best / p) if best else 0.0
        below += p
    return kl


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_bound_is_above_the_kl_and_approached_by_many_rare_outcomes(n):
    bound = bon_kl_bound(n)
    assert exact_kl_of_best_of(n, [0.7, 0.2, 0.1]) <= bound + 1e-12
    many = exact_kl_of_best_of(n, [1e-4] * 10_000)
    assert many <= bound + 1e-12
    assert bound - many < 1e-3


def test_the_bound_is_of_one_sample_at_least():
    assert bon_kl_bound(1) == 0
    with pytest.raises(ValueError, match="n is 0, expected at least 1"):
        bon_kl_bound(0)
