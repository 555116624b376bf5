"""DPO and IPO: their population gradients by enumeration, and the identities that define them."""

import enumeration
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_hidden_ignored, assert_pure, assert_same_bits, coins, floats, gradients

from rlhf.losses import reward_loss
from rlhf.preference_losses import dpo_loss, ipo_loss, sequence_log_ratio

BETA = 0.4
REFERENCE = floats(2, len(enumeration.PREFIXES), 3)
REWARDS = floats(3, len(enumeration.COMPLETIONS))
DRAWN = torch.softmax(floats(4, len(REWARDS)), dim=0)
"""The distribution of the pairs' members: any will do."""


def log_ratios(table):
    """[15] log pi(y) - log pi_ref(y), from the log-probs of the tokens."""
    return sequence_log_ratio(
        enumeration.log_probs(table), ref_log_probs=enumeration.log_probs(REFERENCE), mask=enumeration.MASK
    )


def population_gradient(table, loss, preferred):
    """The expected gradient over all pairs and both labels, preferred [15, 15] the probability of the first."""
    table = table.clone().requires_grad_()
    ratios = log_ratios(table)
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(15), torch.arange(15), indexing="ij"))
    weights = DRAWN[first] * DRAWN[second] * preferred[first, second]
    total, _ = loss(ratios[first], rejected_log_ratios=ratios[second], weights=weights, beta=BETA)
    return torch.autograd.grad(2 * total, table)[0]  # each unordered pair is there in both orders


PREFERRED = torch.sigmoid(REWARDS[:, None] - REWARDS)


def test_dpos_population_gradient_vanishes_at_the_gibbs_policy_and_not_elsewhere():
    optimum = enumeration.tilted(REFERENCE, REWARDS, BETA)
    assert population_gradient(optimum, dpo_loss, PREFERRED).abs().max() < 1e-12
    for other in (REFERENCE, floats(5, *REFERENCE.shape), enumeration.tilted(REFERENCE, REWARDS, 1.1 * BETA)):
        assert population_gradient(other, dpo_loss, PREFERRED).abs().max() > 1e-3


def test_ipos_population_gradient_vanishes_at_its_own_optimum_and_not_elsewhere():
    wins = PREFERRED @ DRAWN
    optimum = enumeration.tilted(REFERENCE, wins, BETA)
    assert population_gradient(optimum, ipo_loss, PREFERRED).abs().max() < 1e-12
    for other in (REFERENCE, enumeration.tilted(REFERENCE, REWARDS, BETA)):
        assert population_gradient(other, ipo_loss, PREFERRED).abs().max() > 1e-3


def test_label_smoothing_corrects_for_labels_that_are_flipped_as_often():
    """With a share e of labels flipped, the smoothed loss has at the data's own log-odds the stationary point."""
    e, margin = 0.2, torch.tensor([0.7], dtype=torch.float64)
    right = torch.sigmoid(BETA * margin)
    slope = [
        gradients(lambda m, s=s: dpo_loss(s * m, rejected_log_ratios=0 * m, beta=BETA)[0], [margin])[0] for s in (1, -1)
    ]
    smoothed = gradients(lambda m: dpo_loss(m, rejected_log_ratios=0 * m, beta=BETA, label_smoothing=e)[0], [margin])[0]
    assert_close(smoothed, (1 - e) * slope[0] + e * slope[1])
    assert_close(right * slope[0] + (1 - right) * slope[1], torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 40), beta=st.sampled_from([0.1, 0.5, 2.0]))
def test_dpo_is_the_reward_loss_of_implicit_rewards_bit_for_bit(dtype, seed, beta):
    chosen, rejected = (10 * floats(seed + n, 6, dtype=dtype) for n in (0, 100))
    mask, weights = coins(seed, 6), floats(seed + 200, 6, dtype=dtype).abs()

    def dpo(c, r):
        return dpo_loss(c, rejected_log_ratios=r, mask=mask, weights=weights, beta=beta)

    def reward(c, r):
        return reward_loss(beta * c, rejected_scores=beta * r, mask=mask, weights=weights)

    (loss, sums), (other, others) = dpo(chosen, rejected), reward(chosen, rejected)
    assert_same_bits(loss, other)
    assert_same_bits(sums["rewards/accuracies_sum"].double(), others["reward/accuracy_sum"].double())
    assert_same_bits(sums["rewards/margins_sum"], others["reward/margin_sum"])
    assert_same_bits(sums["count"], others["count"])
    found, expected = (gradients(lambda c, r, f=f: f(c, r)[0], [chosen, rejected]) for f in (dpo, reward))
    assert_same_bits(found, expected)


def test_ipo_is_the_squared_distance_from_its_margin():
    chosen, rejected = floats(1, 5), floats(2, 5)
    loss, sums = ipo_loss(chosen, rejected_log_ratios=rejected, beta=0.25)
    assert_close(loss, sum((c - r - 2.0) ** 2 for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)))
    assert_close(sums["rewards/chosen_sum"], 0.25 * chosen.sum())
    assert_close(sums["rewards/rejected_sum"], 0.25 * rejected.sum())


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_masked_pairs_weights_metrics_and_purity(loss):
    chosen, rejected, mask, weights = floats(1, 6), floats(2, 6), coins(3, 6), floats(4, 6).abs()

    def total(c, r, m):
        found, sums = loss(c, rejected_log_ratios=r, mask=m, weights=weights)
        return found, sums

    assert_hidden_ignored(total, [chosen, rejected], mask)
    assert_pure(total, chosen, rejected, mask)
    kept, sums = total(chosen, rejected, mask)
    alone = loss(chosen[mask], rejected_log_ratios=rejected[mask], weights=weights[mask])
    assert_close((kept, sums), alone)
    _, tie = loss(torch.zeros(2), rejected_log_ratios=torch.zeros(2))
    assert float(tie["rewards/accuracies_sum"]) == 1.0
    empty, _ = loss(chosen, rejected_log_ratios=rejected, mask=torch.zeros(6, dtype=torch.bool))
    assert empty == 0
    chosen.requires_grad_()
    assert not any(x.requires_grad for x in loss(chosen, rejected_log_ratios=rejected)[1].values())


def test_dpo_is_finite_with_the_right_gradient_far_out():
    margin = torch.tensor([1e4, -1e4])
    (slope,) = gradients(lambda m: dpo_loss(m, rejected_log_ratios=torch.zeros(2), beta=1.0)[0], [margin])
    assert_close(slope, torch.tensor([0.0, -1.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo_loss(x, rejected_log_ratios=x, beta=0.0), "dpo_loss: beta is 0.0, expected above 0"),
        (
            lambda x: dpo_loss(x, rejected_log_ratios=x, label_smoothing=0.5),
            r"label_smoothing is 0.5, expected in \[0, 0.5\)",
        ),
        (lambda x: ipo_loss(x, rejected_log_ratios=x, beta=-1.0), "ipo_loss: beta is -1.0, expected above 0"),
        (lambda x: ipo_loss(x, rejected_log_ratios=x[:1]), "rejected_log_ratios has shape"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3))


def test_a_sequences_log_ratio_is_the_sum_of_its_tokens_and_the_reference_is_constant():
    log_probs, ref, mask = -floats(1, 3, 5).abs(), -floats(2, 3, 5).abs(), coins(3, 3, 5)
    found = sequence_log_ratio(log_probs, ref_log_probs=ref, mask=mask)
    expected = [
        sum(float(a - b) for a, b, m in zip(*rows, strict=True) if m) for rows in zip(log_probs, ref, mask, strict=True)
    ]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert_hidden_ignored(lambda x, y, m: sequence_log_ratio(x, ref_log_probs=y, mask=m), [log_probs, ref], mask)
    _, of_reference = gradients(lambda x, y: sequence_log_ratio(x, ref_log_probs=y, mask=mask).sum(), [log_probs, ref])
    assert not of_reference.any()
    assert sequence_log_ratio(log_probs.bfloat16(), ref_log_probs=ref.bfloat16(), mask=mask).dtype == torch.float32
