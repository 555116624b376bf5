"""Group baselines against the exact policy gradient, by listing every group of completions that can be drawn."""

import itertools
import math
import statistics

import enumeration
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_pure, assert_same_bits, floats

from rlhf.advantages import gae_loop, returns_to_go, token_rewards
from rlhf.group_baselines import dpo_advantages, equal_groups, group_advantages
from rlhf.preference_losses import dpo_loss

BETA = 0.4
POLICY, REFERENCE = (floats(seed, len(enumeration.PREFIXES), 3) for seed in (1, 2))
REWARDS = floats(3, len(enumeration.COMPLETIONS))


def returns_of(table):
    """[15] score minus beta times the log-ratio, summed from the rewards of the tokens."""
    kl = enumeration.log_probs(table) - enumeration.log_probs(REFERENCE)
    return token_rewards(REWARDS, kl, enumeration.MASK, kl_coef=BETA).sum(1)


def exact_gradient(table):
    """That of E[r] - beta KL(policy || reference), over all completions."""
    table = table.clone().requires_grad_()
    log_p = enumeration.log_probs(table).sum(1)
    objective = (log_p.exp() * (REWARDS - BETA * (log_p - enumeration.log_probs(REFERENCE).sum(1)))).sum()
    return torch.autograd.grad(objective, table)[0]


def tuples_of(sizes):
    """Every K-tuple of completions for each K: (completion [N], group [N], tuples [(K, first group, count)])."""
    completions, groups, parts, first = [], [], [], 0
    for size in sizes:
        tuples = torch.tensor(list(itertools.product(range(len(REWARDS)), repeat=size)))
        completions.append(tuples.flatten())
        groups.append(first + torch.arange(len(tuples)).repeat_interleave(size))
        parts.append((size, len(tuples)))
        first += len(tuples)
    return torch.cat(completions), torch.cat(groups), parts


def expected_gradients(sizes, **options):
    """By size, sum over tuples of P(tuple) 1/K sum_i A_i grad log pi(y_i): one call for groups of all sizes."""
    completions, groups, parts = tuples_of(sizes)
    shuffled = torch.argsort(floats(4, len(groups)))
    advantages = torch.empty(len(groups), dtype=torch.float64)
    returns = returns_of(POLICY)[completions]
    advantages[shuffled] = group_advantages(returns[shuffled], groups[shuffled], **options)
    table = POLICY.clone().requires_grad_()
    log_p = enumeration.log_probs(table).sum(1)
    found, start = {}, 0
    for size, count in parts:
        rows = slice(start, start + size * count)
        drawn = completions[rows].view(count, size)
        probability = log_p.detach()[drawn].sum(1).exp()
        surrogate = (probability[:, None] * advantages[rows].view(count, size) * log_p[drawn]).sum() / size
        found[size] = torch.autograd.grad(surrogate, table, retain_graph=True)[0]
        start += size * count
    return found


def test_leave_one_out_is_the_exact_policy_gradient_in_groups_of_any_size():
    for gradient in expected_gradients((2, 3, 4)).values():
        torch.testing.assert_close(gradient, exact_gradient(POLICY), rtol=0, atol=1e-12)


def test_the_mean_baseline_is_one_minus_one_over_k_of_it():
    for size, gradient in expected_gradients((2, 3, 4), baseline="mean").items():
        torch.testing.assert_close(gradient, (1 - 1 / size) * exact_gradient(POLICY), rtol=0, atol=1e-12)


def test_no_baseline_is_the_exact_policy_gradient():
    (gradient,) = expected_gradients((2,), baseline="none").values()
    torch.testing.assert_close(gradient, exact_gradient(POLICY), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_a_division_by_the_groups_deviation_is_proportional_to_neither(baseline):
    exact = exact_gradient(POLICY).flatten()
    for gradient in expected_gradients((2, 3), baseline=baseline, scale="group_std").values():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact, dim=0)
        assert cosine > 0.5
        assert (1 - cosine**2).sqrt() > 0.01, "the part across the exact gradient"


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "batch"])
def test_at_the_gibbs_policy_every_advantage_is_zero_sample_by_sample(baseline):
    returns = returns_of(enumeration.tilted(REFERENCE, REWARDS, BETA))
    draws = torch.tensor([0, 3, 3, 14, 7, 9, 1])
    advantages = group_advantages(returns[draws], torch.tensor([0, 0, 1, 1, 1, 2, 2]), baseline=baseline)
    assert advantages.abs().max() < 1e-12
    elsewhere = group_advantages(returns_of(POLICY)[draws], torch.tensor([0, 0, 1, 1, 1, 2, 2]), baseline=baseline)
    assert elsewhere.abs().min() > 1e-3


def pairs_gradients(policy, rewards):
    """Expected gradients over all pairs of completions that the policy draws: by `dpo_loss`, and by the advantages."""
    first, second = torch.tensor(list(itertools.product(range(len(rewards)), repeat=2))).T
    table = policy.clone().requires_grad_()
    log_p = enumeration.log_probs(table).sum(1)
    ratios = log_p - enumeration.log_probs(REFERENCE).sum(1)
    probability = (log_p[first] + log_p[second]).detach().exp()

    def loss(chosen, rejected, share):
        return dpo_loss(ratios[chosen], rejected_log_ratios=ratios[rejected], weights=share * probability, beta=BETA)[0]

    wins = (rewards[first] > rewards[second]) + 0.5 * (rewards[first] == rewards[second])
    (by_loss,) = torch.autograd.grad(
        loss(first, second, wins) + loss(second, first, 1 - wins), table, retain_graph=True
    )
    drawn, groups = torch.cat([second, first]), torch.arange(len(first)).repeat(2)
    advantages = dpo_advantages(rewards[drawn], ratios.detach()[drawn], groups, beta=BETA)
    (by_advantages,) = torch.autograd.grad((probability.repeat(2) * advantages * log_p[drawn]).sum(), table)
    return by_loss, by_advantages


@pytest.mark.parametrize("rewards", [REWARDS, (2 * REWARDS).round()], ids=["distinct", "with ties"])
def test_the_policy_gradient_of_dpo_advantages_is_the_gradient_of_dpo(rewards):
    by_loss, by_advantages = pairs_gradients(POLICY, rewards)
    assert by_loss.abs().max() > 1e-3
    torch.testing.assert_close(by_advantages, -by_loss, rtol=0, atol=1e-12)


def test_a_reward_that_labels_for_certain_pulls_past_the_gibbs_policy_to_the_best():
    """Unlike labels by Bradley-Terry, at whose optimum DPO's gradient is 0."""
    gibbs = enumeration.tilted(REFERENCE, REWARDS, BETA)
    _, ascent = pairs_gradients(gibbs, REWARDS)
    best = [enumeration.log_probs(table).sum(1)[REWARDS.argmax()] for table in (gibbs, gibbs + 0.1 * ascent)]
    assert best[1] > best[0] + 1e-4


def test_dpo_advantages_of_a_pair_in_any_order():
    scores, ratios, groups = torch.tensor([1.0, 5.0, 2.0, 5.0]), torch.tensor([0.3, -1.0, 0.1, 2.0]), [8, 3, 8, 3]
    found = dpo_advantages(scores, ratios, torch.tensor(groups), beta=0.5)
    first, tie = 0.5 / (1 + math.exp(-0.5 * 0.2)), 0.5 * (0.5 - 1 / (1 + math.exp(0.5 * 3)))
    assert_close(found, torch.tensor([-first, tie, first, -tie]), 1e-6)
    assert_pure(lambda *tensors: dpo_advantages(*tensors, beta=0.5), scores, ratios, torch.tensor(groups))
    assert dpo_advantages(scores, ratios.bfloat16(), torch.tensor(groups), beta=0.5).dtype == torch.float32


@pytest.mark.parametrize(
    ("groups", "beta", "message"),
    [
        ([0, 0, 4, 4], 0.0, r"^dpo_advantages: beta is 0\.0, expected above 0$"),
        ([0, 0, 4, 5], 0.1, r"^dpo_advantages: group 4 has 1 completions, expected 2: a pair$"),
        ([4, 4, 4, 4], 0.1, r"^dpo_advantages: group 4 has 4 completions, expected 2: a pair$"),
        ([0, 0], 0.1, r"^dpo_advantages: "),
    ],
)
def test_what_is_no_pair_is_refused(groups, beta, message):
    with pytest.raises(ValueError, match=message):
        dpo_advantages(torch.ones(4), torch.ones(4), torch.tensor(groups), beta=beta)


SCORES, GROUPS = floats(5, 7), torch.tensor([4, 9, 4, 9, 9, 1, 1])


def by_loops(baseline, scale):
    """The definition, completion by completion, in Python's own statistics."""
    scores, groups, found = SCORES.tolist(), GROUPS.tolist(), []
    for i, (score, group) in enumerate(zip(scores, groups, strict=True)):
        members = [s for s, g in zip(scores, groups, strict=True) if g == group]
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and j != i]
        base = {"leave_one_out": others, "mean": members, "batch": scores, "none": [0.0]}[baseline]
        spread = {"none": None, "group_std": members, "batch_std": scores}[scale]
        found.append((score - statistics.fmean(base)) / (1.0 if spread is None else statistics.stdev(spread) + 1e-4))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "batch", "none"])
@pytest.mark.parametrize("scale", ["none", "group_std", "batch_std"])
def test_it_is_its_definition(baseline, scale):
    assert_close(group_advantages(SCORES, GROUPS, baseline=baseline, scale=scale), by_loops(baseline, scale))


@given(seed=st.integers(0, 50), shift=st.floats(-5, 5), factor=st.floats(0.1, 5))
def test_a_shift_changes_nothing_and_a_factor_scales(seed, shift, factor):
    scores = floats(seed, 7)
    plain = group_advantages(scores, GROUPS)
    assert_close(group_advantages(scores * factor + shift, GROUPS), plain * factor, 1e-9)


def test_the_order_of_completions_and_the_names_of_groups_do_not_matter():
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    found = group_advantages(SCORES[order], 100 - GROUPS[order], scale="group_std")
    assert_close(found, group_advantages(SCORES, GROUPS, scale="group_std")[order])


def test_equal_scores_give_exactly_zero_and_no_nan_in_any_derivative():
    scores = torch.tensor([0.1] * 7 + [0.9] * 3, requires_grad=True)  # whose means in float32 are other numbers
    groups = torch.tensor([0] * 7 + [1] * 3)
    for baseline in ("leave_one_out", "mean"):
        advantages = group_advantages(scores, groups, baseline=baseline, scale="group_std")
        assert_same_bits(advantages.detach(), torch.zeros(10))
        assert torch.autograd.grad(advantages.square().sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"baseline": "mean"}, {"baseline": "none", "scale": "group_std"}, {"scale": "group_std"}], ids=str
)
def test_a_group_of_one_is_refused_by_name(options):
    with pytest.raises(ValueError, match=r"^group_advantages: group 5 has 1 completion, expected at least 2"):
        group_advantages(torch.ones(3), torch.tensor([2, 5, 2]), **options)


def test_a_batch_of_one_is_refused_and_a_group_of_one_is_fine_without_a_group():
    with pytest.raises(ValueError, match="expected at least 2 scores"):
        group_advantages(torch.ones(1), torch.zeros(1, dtype=torch.int64), baseline="batch")
    alone = torch.tensor([0, 1])
    assert_same_bits(group_advantages(torch.tensor([1.0, 3.0]), alone, baseline="batch"), torch.tensor([-1.0, 1.0]))
    assert_same_bits(group_advantages(torch.tensor([1.0, 3.0]), alone, baseline="none"), torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.zeros(3).long()), "groups has shape"),
        ((torch.ones(2, 1), torch.zeros(2, 1).long()), "expected 1 dimensions"),
    ],
)
def test_shapes_that_do_not_match_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(*arguments)


@pytest.mark.parametrize("options", [{"baseline": "median"}, {"scale": "std"}])
def test_unknown_names_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        group_advantages(torch.ones(2), torch.zeros(2).long(), **options)


def test_it_is_pure_and_never_below_float32():
    assert_pure(group_advantages, SCORES, GROUPS)
    assert group_advantages(SCORES.bfloat16(), GROUPS).dtype == torch.float32


def test_equal_groups_are_those_whose_scores_are_all_equal():
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0, 0.5, 0.5])
    expected = [True, False, True, False, False, True, True]
    assert equal_groups(scores, GROUPS).tolist() == expected
    assert equal_groups(torch.ones(1), torch.tensor([3])).tolist() == [True]


def test_returns_to_go_is_the_sum_of_what_follows_over_holes_too():
    rewards, mask = floats(7, 4, 5), torch.tensor([[1, 0, 1, 1, 0], [1] * 5, [0] * 5, [0, 0, 1, 0, 0]]).bool()
    found = returns_to_go(rewards, mask, gamma=0.8)
    for row in range(4):
        kept = [t for t in range(5) if mask[row, t]]
        for place, t in enumerate(kept):
            expected = sum(0.8**n * rewards[row, later] for n, later in enumerate(kept[place:]))
            assert_close(found[row, t], expected)
    assert not found[~mask].any()
    assert_close(found, gae_loop(rewards, torch.zeros_like(rewards), mask, gamma=0.8, lam=1.0)[0])
