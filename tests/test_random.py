import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_compiles, assert_pure, assert_same_bits, assert_vmaps
from torch.utils import _pytree as pytree

from rlhf.random import Purpose, bits, fold_in, key, normal, permutation, split, uniform, uniform_at

BLOCK = 65_536  # positions that the implementation hashes at once: results must not show it
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**63 - 1)

KEYED = {
    "fold_in": lambda k: fold_in(k, 7),
    "split": lambda k: split(k, 3),
    "bits": lambda k: bits(k, torch.arange(5)),
    "uniform_at": lambda k: uniform_at(k, torch.arange(5)),
    "uniform": lambda k: uniform(k, (3, 4)),
    "normal": lambda k: normal(k, (3, 3)),
    "permutation": lambda k: permutation(k, 9),
}
KEYED_CASES = pytest.mark.parametrize("draw", KEYED.values(), ids=KEYED)


def unsigned(word):
    return int(word) & 0xFFFFFFFF


def key_words(seed):
    return seed >> 32, seed & 0xFFFFFFFF


def pair(first, second):
    """Two words as one integer, so that sets and counts can be taken."""
    return (first.long() << 32) | (second.long() & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("key_pair", "counter", "expected"),
    [
        pytest.param((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE), id="zeros"),
        pytest.param((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7), id="ones"),
        pytest.param((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0), id="digits_of_pi"),
    ],
)
def test_bits_known_answers_of_random123(key_pair, counter, expected):
    seed, position = key_pair[0] << 32 | key_pair[1], counter[0] << 32 | counter[1]
    signed = position - 2**64 if position >= 2**63 else position
    found = bits(key(seed), torch.tensor(signed))
    assert tuple(unsigned(word) for word in found) == expected
    assert oracles.threefry(key_pair, counter) == expected


@given(seed=SEEDS, position=POSITIONS)
def test_bits_value(seed, position):
    found = bits(key(seed), torch.tensor(position))
    assert [word.dtype for word in found] == [torch.int32, torch.int32]
    assert tuple(unsigned(word) for word in found) == oracles.words(key_words(seed), position)


def test_bits_do_not_depend_on_the_batch():
    keys, positions = split(key(1), 4), torch.tensor([0, 1, BLOCK, 2**32 + 1, 2**62])
    together = bits(keys[:, None], positions)
    for row in range(4):
        for column, position in enumerate(positions):
            alone = bits(keys[row], position)
            assert_same_bits([word[row, column] for word in together], list(alone))


def test_bits_have_no_bias_in_any_bit():
    first, second = bits(key(5), torch.arange(20_000))
    for word in (first, second):
        shares = torch.stack([(word >> bit & 1).double().mean() for bit in range(32)])
        assert (shares - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(20_000)


@given(seed=SEEDS)
def test_key_value(seed):
    found = key(seed)
    assert found.dtype == torch.int32
    assert tuple(unsigned(word) for word in found) == key_words(seed)


@pytest.mark.parametrize("seed", [-1, 2**64], ids=["negative", "too_large"])
def test_key_rejects_seeds_outside_64_bits(seed):
    with pytest.raises(ValueError, match=rf"^key: seed is {seed}, expected in \[0, 2\*\*64\)$"):
        key(seed)


@pytest.mark.parametrize("bit", [32, 40, 63])
def test_key_high_bits_of_the_seed_matter(bit):
    assert not torch.equal(uniform(key(5), (8,)), uniform(key(5 + 2**bit), (8,)))


@given(seed=SEEDS, data=POSITIONS)
def test_fold_in_value(seed, data):
    counter = (data >> 32 | 0x80000000, data & 0xFFFFFFFF)
    expected = oracles.threefry(key_words(seed), counter)
    for given_data in (data, torch.tensor(data)):
        assert tuple(unsigned(word) for word in fold_in(key(seed), given_data)) == expected


def test_fold_in_broadcasts_as_one_at_a_time():
    keys, data = split(key(2), 3), torch.tensor([[0], [2**40], [5], [1]])
    together = fold_in(keys, data)
    assert together.shape == (4, 3, 2)
    for row in range(4):
        for column in range(3):
            assert_same_bits(together[row, column], fold_in(keys[column], int(data[row])))


def test_fold_in_never_gives_words_that_are_drawn():
    positions = torch.cat([torch.arange(20_000), 2**63 - 1 - torch.arange(20_000), torch.arange(20_000) << 32])
    drawn = pair(*bits(key(3), positions))
    derived = pair(*fold_in(key(3), positions).unbind(-1))
    assert len(drawn.unique()) == len(derived.unique()) == len(positions.unique())
    assert not torch.isin(drawn, derived).any()


def test_fold_in_orders_matter():
    assert not torch.equal(fold_in(fold_in(key(0), 1), 2), fold_in(fold_in(key(0), 2), 1))


def test_split_is_fold_in_of_a_range():
    assert_same_bits(split(key(4), 3), torch.stack([fold_in(key(4), number) for number in range(3)]))
    assert split(key(4)).shape == (2, 2)


def test_uniform_value():
    found = uniform(key(2**40 + 3), (4, 25))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy().ravel(), oracles.uniform(key_words(2**40 + 3), 100))


@given(seed=SEEDS)
def test_uniform_is_a_multiple_of_2_to_the_minus_23_below_1(seed):
    scaled = uniform(key(seed), (64,)).double() * 2**23
    assert torch.equal(scaled, scaled.round())
    assert scaled.min() >= 0
    assert scaled.max() < 2**23


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_uniform_is_addressed_by_position(count):
    found = uniform_at(key(6), torch.arange(count))
    assert_same_bits(uniform(key(6), (count,)), ((found * 2**23).floor() * 2**-23).float())


def test_uniform_at_has_53_bits_of_both_words():
    positions = torch.arange(1000)
    found = uniform_at(key(2**40 + 3), positions)
    words = [(int(a) % 2**32, int(b) % 2**32) for a, b in zip(*bits(key(2**40 + 3), positions), strict=True)]
    assert found.tolist() == [(high * 2**21 + (low >> 11)) * 2.0**-53 for high, low in words]
    assert found.max() < 1
    assert len(found.unique()) == 1000


def test_uniform_shapes():
    assert uniform(key(0), ()).shape == ()
    assert_same_bits(uniform(key(0), (2, 3, 4)).flatten(), uniform(key(0), (24,)))


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniform_fills_its_range_evenly(seed):
    draws = uniform(key(seed), (64_000,)).double()
    assert abs(draws.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 64_000)
    counts = torch.histc(draws, bins=64, min=0, max=1)
    # With 63 degrees of freedom the statistic has mean 63 and standard deviation 11.2; the keys are fixed.
    assert 63 - 4 * 11.2 < chi_square(counts, 1_000) < 63 + 4 * 11.2


def test_uniform_successive_keys_and_positions_are_independent():
    draws = uniform_at(split(key(8), 200)[:, None], torch.arange(200)) - 0.5
    for neighbour in (draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]):
        assert abs(neighbour.mean()) < 4 / 12 / math.sqrt(neighbour.numel())


@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_normal_value(count):
    found = normal(key(9), (count,))
    assert (found.dtype, found.shape) == (torch.float32, (count,))
    pairs = [oracles.normal_pair(key_words(9), position) for position in range(4)]
    assert_close(found, np.ravel(pairs)[:count], 1e-5)


def test_normal_is_addressed_by_position():
    found = normal(key(10), (1, 2 * BLOCK + 3))
    assert found.shape == (1, 2 * BLOCK + 3)
    pairs = [oracles.normal_pair(key_words(10), position) for position in (BLOCK - 1, BLOCK, BLOCK + 1)]
    assert_close(found[0, -5:], np.ravel(pairs)[:5], 1e-5)


@pytest.mark.parametrize("seed", [0, 7])
def test_normal_has_the_distribution_of_a_standard_normal(seed):
    draws = normal(key(seed), (40_000,)).double()
    assert torch.isfinite(draws).all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(draws.pow(power).mean() - moment) < 4 * math.sqrt(variance / 40_000)
    ranked = torch.special.ndtr(draws.sort().values)
    distance = (ranked - (torch.arange(40_000) + 0.5) / 40_000).abs().max()
    assert distance < 1.63 / math.sqrt(40_000)  # Kolmogorov-Smirnov at 1%
    assert abs((draws[0::2] * draws[1::2]).mean()) < 4 / math.sqrt(20_000)


@given(seed=SEEDS, n=st.integers(0, 300))
def test_permutation_is_a_permutation(seed, n):
    found = permutation(key(seed), n)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(n))


def test_permutation_value():
    """The order of a data set depends on it: another one, however random, would change runs that are resumed."""
    assert permutation(key(2**40 + 9), 200).tolist() == oracles.permutation(key_words(2**40 + 9), 200)


def test_permutation_beyond_one_block():
    assert torch.equal(permutation(key(1), BLOCK + 10).sort().values, torch.arange(BLOCK + 10))


def test_permutation_reaches_every_order_equally_often():
    orders = torch.vmap(lambda k: permutation(k, 3))(split(key(11), 6_000))
    counts = (orders @ torch.tensor([9, 3, 1])).unique(return_counts=True)[1].double()
    assert len(counts) == 6
    assert chi_square(counts, 1_000) < 20.5  # 5 degrees of freedom, 0.1%


@KEYED_CASES
def test_draws_depend_on_the_key(draw):
    leaves = zip(pytree.tree_leaves(draw(key(20))), pytree.tree_leaves(draw(key(21))), strict=True)
    assert not any(torch.equal(first, second) for first, second in leaves)


@KEYED_CASES
def test_draws_are_pure(draw):
    assert_pure(draw, key(22))


@KEYED_CASES
def test_draws_under_vmap_are_those_of_each_key(draw):
    assert_vmaps(draw, split(key(23), 4), tolerance=0)


@KEYED_CASES
def test_draws_compile(draw):
    assert_compiles(draw, key(24))


def test_purposes_keep_their_numbers():
    numbers = {
        "INIT": 0,
        "HEAD": 1,
        "SPLIT": 2,
        "ORDER": 3,
        "DROPOUT": 4,
        "SAMPLING": 5,
        "MINIBATCH": 6,
        "EVALUATION": 7,
    }
    assert {purpose.name: int(purpose) for purpose in Purpose} == numbers
