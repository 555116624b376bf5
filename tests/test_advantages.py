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
    numpy,
    ragged_mask,
)
from torch.utils._pytree import tree_leaves

from rlhf.advantages import gae, gae_loop, token_rewards

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(1, 20)
SHARES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
FORMS = pytest.mark.parametrize("form", [gae, gae_loop])
FUNCTIONS = {
    "token_rewards": lambda scores, kl, mask: token_rewards(scores, kl, mask, kl_coef=0.3),
    "gae": lambda scores, rewards, mask: gae(rewards, rewards.cos(), mask, gamma=0.9, lam=0.8),
    "gae_loop": lambda scores, rewards, mask: gae_loop(rewards, rewards.cos(), mask, gamma=0.9, lam=0.8),
}
FUNCTION_CASES = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def scored(seed, rows, width, *, dtype=torch.float64):
    """(scores [B], rewards or KL [B, T], mask [B, T]) with rows that are full, empty, one token long, and others."""
    return floats(seed, rows, dtype=dtype), floats(seed + 1, rows, width, dtype=dtype), ragged_mask(seed, rows, width)


@DTYPES
@given(seed=SEEDS, rows=st.integers(1, 6), width=WIDTHS, kl_coef=st.floats(0.0, 2.0))
def test_token_rewards_value(dtype, seed, rows, width, kl_coef):
    scores, kl, mask = scored(seed, rows, width, dtype=dtype)
    found = token_rewards(scores, kl, mask, kl_coef=kl_coef)
    assert found.dtype == dtype
    assert_close(found, oracles.token_rewards(*numpy(scores, kl, mask), kl_coef=kl_coef), TOLERANCE[dtype])


def test_token_rewards_takes_its_coefficient_as_a_tensor():
    arguments = scored(1, 4, 5)
    coefficient = torch.tensor(0.3, dtype=torch.float64)
    assert_same_bits(token_rewards(*arguments, kl_coef=coefficient), token_rewards(*arguments, kl_coef=0.3))


@given(seed=SEEDS, width=WIDTHS, kl_coef=st.floats(-2.0, 2.0))
def test_invariant_4_rewards_add_up_to_score_minus_kl_penalty(seed, width, kl_coef):
    scores, kl, mask = scored(seed, 6, width)
    expected = [
        (float(scores[row]) if mask[row].any() else 0.0) - kl_coef * float(kl[row][mask[row]].sum()) for row in range(6)
    ]
    assert_close(token_rewards(scores, kl, mask, kl_coef=kl_coef).sum(dim=1), expected)


def test_token_rewards_put_the_score_on_the_last_token():
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    found = token_rewards(torch.tensor([7.0, 8.0, 9.0]), torch.zeros(3, 3), mask, kl_coef=1.0)
    assert_close(found, [[0, 7, 0], [0, 0, 8], [0, 0, 0]])


@given(seed=SEEDS, width=WIDTHS, kl_coef=st.floats(-2.0, 2.0))
def test_invariant_4_the_score_is_paid_once_where_the_mask_has_holes(seed, width, kl_coef):
    scores, kl, mask = floats(seed, 6), floats(seed + 1, 6, width), coins(seed, 6, width, share=0.5)
    found = token_rewards(scores, kl, mask, kl_coef=kl_coef)
    assert_close(found, oracles.token_rewards(*numpy(scores, kl, mask), kl_coef=kl_coef))
    totals = torch.where(mask.any(dim=1), scores, 0.0) - kl_coef * torch.where(mask, kl, 0.0).sum(dim=1)
    assert_close(found.sum(dim=1), totals, 1e-11)


@given(seed=SEEDS, width=WIDTHS, gamma=SHARES, lam=SHARES)
def test_invariant_5_holes_give_what_the_row_without_them_gives(seed, width, gamma, lam):
    """Rewards, advantages and returns; whatever lies in the holes, which come before, between and after the tokens."""
    mask = coins(seed, width, share=0.6)
    kl, values = (torch.where(mask, floats(seed + n, width), torch.nan) for n in range(2))
    score, after = floats(seed + 2), floats(seed + 3)

    def rewarded(kl, values, mask):
        rewards = token_rewards(score, kl, mask, kl_coef=0.3)
        both = [form(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_value=after) for form in (gae, gae_loop)]
        return [rewards, *both[0], *both[1]]

    with_holes = rewarded(kl, values, mask)
    without = rewarded(kl[mask], values[mask], mask[mask])
    assert_close([x[mask] for x in with_holes], without)
    assert not any(x[~mask].any() for x in with_holes)


@FORMS
@DTYPES
@given(seed=SEEDS, rows=st.integers(1, 5), width=WIDTHS, gamma=SHARES, lam=SHARES, holes=st.booleans())
def test_invariant_5_gae_is_its_brute_force_sum(form, dtype, seed, rows, width, gamma, lam, holes):
    rewards, values = floats(seed, rows, width, dtype=dtype), floats(seed + 1, rows, width, dtype=dtype)
    mask = coins(seed, rows, width) if holes else ragged_mask(seed, rows, width)
    after = floats(seed + 2, rows, dtype=dtype) if seed % 2 else None
    found = form(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_value=after)
    assert [x.dtype for x in found] == [dtype, dtype]
    expected = oracles.gae(
        *numpy(rewards, values, mask), gamma=gamma, lam=lam, bootstrap_value=None if after is None else numpy(after)
    )
    assert_close(found, expected, 10 * TOLERANCE[dtype])  # sums of up to 20 numbers


@pytest.mark.parametrize("width", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100])
def test_invariant_5_gae_is_gae_loop_at_any_width(width):
    rewards, values, mask = floats(1, 5, width), floats(2, 5, width), ragged_mask(3, 5, width)
    assert_close(
        gae(rewards, values, mask, gamma=0.99, lam=0.95), gae_loop(rewards, values, mask, gamma=0.99, lam=0.95)
    )


@FORMS
@given(seed=SEEDS, width=WIDTHS)
def test_invariant_5_gae_at_gamma_lambda_1_is_return_to_go_minus_value(form, seed, width):
    rewards, values, mask = floats(seed, 5, width), floats(seed + 1, 5, width), ragged_mask(seed, 5, width)
    advantages, returns = form(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = oracles.discounted_returns(*numpy(rewards, mask), gamma=1.0)
    assert_close(returns, to_go, 1e-11)
    assert_close(advantages, torch.where(mask, torch.from_numpy(to_go) - values, 0.0), 1e-11)


@FORMS
@given(seed=SEEDS, gamma=SHARES)
def test_invariant_5_gae_at_lambda_1_has_the_discounted_return(form, seed, gamma):
    rewards, values, mask = floats(seed, 5, 12), floats(seed + 1, 5, 12), ragged_mask(seed, 5, 12)
    _, returns = form(rewards, values, mask, gamma=gamma, lam=1.0)
    assert_close(returns, oracles.discounted_returns(*numpy(rewards, mask), gamma=gamma), 1e-11)


@FORMS
@given(seed=SEEDS, gamma=SHARES)
def test_invariant_5_gae_at_lambda_0_is_the_td_error(form, seed, gamma):
    rewards, values, mask = floats(seed, 5, 9), floats(seed + 1, 5, 9), ragged_mask(seed, 5, 9)
    advantages, _ = form(rewards, values, mask, gamma=gamma, lam=0.0)
    inside = torch.where(mask, values, 0.0)
    ahead = torch.cat([inside[:, 1:], torch.zeros(5, 1)], dim=1)
    assert_close(advantages, torch.where(mask, rewards + gamma * ahead - values, 0.0))


@FORMS
def test_gae_of_perfect_values_is_zero(form):
    rewards, mask = floats(4, 5, 9), ragged_mask(4, 5, 9)
    values = torch.from_numpy(oracles.discounted_returns(*numpy(rewards, mask), gamma=0.9))
    advantages, returns = form(rewards, values, mask, gamma=0.9, lam=0.5)
    assert_close(advantages, torch.zeros(5, 9))
    assert_close(returns, values)


@FORMS
def test_gae_defaults_are_gamma_1_and_lambda_095(form):
    arguments = floats(5, 3, 6), floats(6, 3, 6), ragged_mask(5, 3, 6)
    assert_same_bits(form(*arguments), form(*arguments, gamma=1.0, lam=0.95))


@FORMS
def test_invariant_5_the_bootstrap_value_is_that_of_one_more_token(form):
    """A row cut after 4 of its 6 tokens has the advantages of the whole one, if it is worth what the rest brings."""
    rewards, values = floats(21, 3, 6), floats(22, 3, 6)
    whole = torch.ones(3, 6, dtype=torch.bool)
    advantages, returns = form(rewards, values, whole, gamma=0.9, lam=1.0)
    cut = form(rewards[:, :4], values[:, :4], whole[:, :4], gamma=0.9, lam=1.0, bootstrap_value=returns[:, 4])
    assert_close(cut, (advantages[:, :4], returns[:, :4]))
    zero = form(rewards, values, whole, bootstrap_value=torch.zeros(3, dtype=torch.float64))
    assert_same_bits(zero, form(rewards, values, whole))


@FUNCTION_CASES
def test_advantages_take_any_leading_dimensions(function):
    scores, rewards, mask = floats(31, 2, 3), floats(32, 2, 3, 5), coins(33, 2, 3, 5)
    expected = tree_leaves(function(scores.flatten(), rewards.flatten(0, 1), mask.flatten(0, 1)))
    assert_same_bits(tree_leaves(function(scores, rewards, mask)), [x.view(2, 3, 5) for x in expected])
    alone = tree_leaves(function(scores[1, 2], rewards[1, 2], mask[1, 2]))
    assert_same_bits(alone, [x[-1] for x in expected])


@FUNCTION_CASES
def test_invariant_2_more_padding_changes_no_bit(function):
    scores, rewards, mask = scored(7, 5, 6)
    padded = torch.nn.functional.pad(rewards, (0, 5), value=torch.nan), torch.nn.functional.pad(mask, (0, 5))
    narrow = tree_leaves(function(scores, rewards, mask))
    wide = tree_leaves(function(scores, *padded))
    assert_same_bits([x[:, :6].contiguous() for x in wide], narrow)
    assert not any(x[:, 6:].any() for x in wide)


def test_invariant_2_token_rewards_ignore_masked_positions():
    scores, kl, mask = scored(8, 5, 6)
    assert_hidden_ignored(lambda x, m: token_rewards(scores, x, m, kl_coef=0.3), [kl], mask)


def test_token_rewards_ignore_the_score_of_an_empty_row():
    scores, kl, mask = scored(9, 5, 6)
    spoilt = torch.where(mask.any(dim=1), scores, torch.nan)
    assert_same_bits(token_rewards(spoilt, kl, mask, kl_coef=0.3), token_rewards(scores, kl, mask, kl_coef=0.3))


@FORMS
def test_invariant_2_gae_ignores_masked_positions(form):
    mask = ragged_mask(10, 5, 6)
    arguments = [floats(10, 5, 6), floats(11, 5, 6)]
    assert_hidden_ignored(lambda r, v, m: form(r, v, m, gamma=0.9, lam=0.8), arguments, mask)


@FUNCTION_CASES
def test_advantages_of_nothing_are_zero(function):
    hidden, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert not any(x.any() for x in tree_leaves(function(hidden[:, 0], hidden, mask)))


@FUNCTION_CASES
def test_advantages_treat_rows_alone(function):
    assert_rows_independent(function, *scored(12, 6, 7))


@FUNCTION_CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_advantages_of_half_precision_are_float32(function, dtype):
    scores, rewards, mask = scored(13, 5, 6, dtype=dtype)
    half = [scores, rewards, mask] if function is FUNCTIONS["token_rewards"] else [scores, rewards.cos().acos(), mask]
    wide = function(*(x.float() if x.is_floating_point() else x for x in half))
    found = function(*half)
    assert {x.dtype for x in tree_leaves(found)} == {torch.float32}
    assert_close(found, wide, TOLERANCE[torch.bfloat16])


@FUNCTION_CASES
def test_advantages_are_pure(function):
    assert_pure(function, *scored(14, 5, 6))


@FUNCTION_CASES
def test_advantages_compile(function):
    assert_compiles(function, *scored(15, 5, 6))


@FUNCTION_CASES
def test_advantages_vmap(function):
    batches = [scored(seed, 5, 6) for seed in (16, 17, 18)]
    assert_vmaps(function, *(torch.stack(leaves) for leaves in zip(*batches, strict=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_advantages_of_half_precision_are_those_of_float32(dtype):
    (scores, rewards, mask), values = scored(13, 5, 6, dtype=dtype), floats(14, 5, 6, dtype=dtype)

    def everything(scores, rewards, values):
        both = [form(rewards, values, mask, gamma=0.9, bootstrap_value=scores) for form in (gae, gae_loop)]
        return token_rewards(scores, rewards, mask, kl_coef=0.3), *both[0], *both[1]

    assert_same_bits(everything(scores, rewards, values), everything(scores.float(), rewards.float(), values.float()))


@FORMS
def test_gae_vmaps_over_gamma_and_lambda(form):
    rewards, values, mask = floats(41, 3, 6), floats(42, 3, 6), coins(43, 3, 6)
    gammas, lams = (torch.tensor(numbers, dtype=torch.float64) for numbers in ([0.9, 1.0, 0.0], [0.5, 0.0, 1.0]))
    assert_vmaps(lambda gamma, lam: form(rewards, values, mask, gamma=gamma, lam=lam), gammas, lams)


TRUE = torch.ones(2, 3, dtype=torch.bool)
ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            (torch.zeros(()), torch.zeros(()), TRUE[0, 0]),
            ValueError,
            r"kl is \(\), expected at least 1 dimension, time the last",
            id="rank",
        ),
        pytest.param(
            (torch.zeros(2), ZEROS, TRUE[:, :2]),
            ValueError,
            r"mask has shape \(2, 2\), expected \(2, 3\) like kl",
            id="mask",
        ),
        pytest.param(
            (torch.zeros(3), ZEROS, TRUE), ValueError, r"scores is \(3,\), expected shape \(2,\)", id="scores"
        ),
        pytest.param(
            (torch.zeros(2), ZEROS, TRUE.float()),
            TypeError,
            r"mask has dtype torch.float32, expected torch.bool \(True = counts\)",
            id="dtype",
        ),
    ],
)
def test_token_rewards_rejects(arguments, error, message):
    with pytest.raises(error, match=f"^token_rewards: {message}$"):
        token_rewards(*arguments, kl_coef=0.1)


@FORMS
@pytest.mark.parametrize(
    ("arguments", "numbers", "error", "message"),
    [
        pytest.param(
            (ZEROS[0, 0], ZEROS[0, 0], TRUE[0, 0]),
            {},
            ValueError,
            r"rewards is \(\), expected at least 1 dimension, time the last",
            id="rank",
        ),
        pytest.param(
            (ZEROS, ZEROS, TRUE),
            {"bootstrap_value": ZEROS},
            ValueError,
            r"bootstrap_value is \(2, 3\), expected shape \(2,\)",
            id="bootstrap",
        ),
        pytest.param(
            (ZEROS, ZEROS[:, :2], TRUE),
            {},
            ValueError,
            r"values has shape \(2, 2\), expected \(2, 3\) like rewards",
            id="values",
        ),
        pytest.param(
            (ZEROS, ZEROS, TRUE[:1]),
            {},
            ValueError,
            r"mask has shape \(1, 3\), expected \(2, 3\) like rewards",
            id="mask",
        ),
        pytest.param(
            (ZEROS, ZEROS, ZEROS), {}, TypeError, "mask has dtype torch.float32, expected torch.bool.*", id="dtype"
        ),
        pytest.param(
            (ZEROS, ZEROS, TRUE), {"gamma": 1.1}, ValueError, r"gamma is 1.1, expected in \[0, 1\]", id="gamma_above"
        ),
        pytest.param(
            (ZEROS, ZEROS, TRUE), {"gamma": -0.1}, ValueError, r"gamma is -0.1, expected in \[0, 1\]", id="gamma_below"
        ),
        pytest.param(
            (ZEROS, ZEROS, TRUE), {"lam": 1.1}, ValueError, r"lam is 1.1, expected in \[0, 1\]", id="lam_above"
        ),
        pytest.param(
            (ZEROS, ZEROS, TRUE), {"lam": -0.1}, ValueError, r"lam is -0.1, expected in \[0, 1\]", id="lam_below"
        ),
    ],
)
def test_gae_rejects(form, arguments, numbers, error, message):
    with pytest.raises(error, match=f"^{form.__name__}: {message}$"):
        form(*arguments, **numbers)
