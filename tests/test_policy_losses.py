"""CISPO and GSPO against their definitions and their common limit, the policy gradient."""

import pytest
import torch
from laws import assert_close, assert_hidden_ignored, assert_pure, coins, floats, gradients, prefix_mask

from rlhf.losses import ppo_policy_loss
from rlhf.policy_losses import POLICY_LOSSES, cispo_loss, gspo_loss

LENGTHS = [5, 1, 3]
MASK = prefix_mask(LENGTHS, 5)
LOG_PROBS, OLD = -floats(1, 3, 5).abs(), -floats(2, 3, 5).abs()
ADVANTAGES, WEIGHTS = floats(3, 3, 5), floats(4, 3, 1).abs()
CLIPS = {"clip_eps": 0.3, "clip_eps_high": 0.6}


def call(loss, x, mask=MASK, **options):
    return loss(x, old_log_probs=OLD, advantages=ADVANTAGES, mask=mask, weights=WEIGHTS, **options)


def test_cispo_is_a_weighted_policy_gradient_whose_weights_are_clipped():
    ratio = (LOG_PROBS - OLD).exp()
    clipped = ratio.clamp(0.7, 1.6)
    loss, sums = call(cispo_loss, LOG_PROBS, **CLIPS)
    assert_close(loss, -(WEIGHTS * clipped * ADVANTAGES * LOG_PROBS)[MASK].sum())
    (slope,) = gradients(lambda x: call(cispo_loss, x, **CLIPS)[0], [LOG_PROBS])
    assert_close(slope, torch.where(MASK, -WEIGHTS * clipped * ADVANTAGES, 0.0))
    assert_close(sums["policy/clipfrac_avg_sum"], (clipped != ratio)[MASK].sum())
    assert_close(sums["val/ratio_sum"], ratio[MASK].sum())
    assert_close(sums["policy/approxkl_avg_sum"], 0.5 * (LOG_PROBS - OLD).square()[MASK].sum())
    assert sums["count"] == MASK.sum()


def test_cispo_has_no_lower_clip_by_default():
    ratio = (LOG_PROBS - OLD).exp().clamp(max=2.0)
    assert_close(call(cispo_loss, LOG_PROBS)[0], -(WEIGHTS * ratio * ADVANTAGES * LOG_PROBS)[MASK].sum())


def test_gspo_is_the_clipped_surrogate_of_each_sequences_ratio():
    expected = torch.zeros((), dtype=torch.float64)
    ratios = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        ratio = (LOG_PROBS - OLD)[row, :length].mean().exp()
        ratios += length * ratio
        for advantage in ADVANTAGES[row, :length]:
            expected -= WEIGHTS[row, 0] * torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.6) * advantage)
    loss, sums = call(gspo_loss, LOG_PROBS, **CLIPS)
    assert_close(loss, expected)
    assert_close(sums["val/ratio_sum"], ratios)


def test_gspo_reads_packed_sequences_as_rows():
    packed = [x[MASK] for x in (LOG_PROBS, OLD, ADVANTAGES, WEIGHTS.expand(3, 5))]
    sequences = torch.tensor([0] * 5 + [1] + [2] * 3)
    shuffled = torch.argsort(floats(9, 9))
    log_probs, old, advantages, weights = (torch.cat([x[shuffled], torch.tensor([7.0]).double()]) for x in packed)
    sequences = torch.cat([sequences[shuffled], torch.tensor([0])])  # with filling at the end, of sequence 0
    found = gspo_loss(
        log_probs, old_log_probs=old, advantages=advantages, mask=torch.arange(10) < 9, weights=weights,
        sequences=sequences, **CLIPS,
    )  # fmt: skip
    assert_close(found, call(gspo_loss, LOG_PROBS, **CLIPS))


def test_gspo_spreads_the_gradient_over_the_tokens_of_a_sequence():
    (slope,) = gradients(lambda x: call(gspo_loss, x, clip_eps=1e6)[0], [LOG_PROBS])
    for row, length in enumerate(LENGTHS):
        ratio = (LOG_PROBS - OLD)[row, :length].mean().exp()
        expected = -WEIGHTS[row, 0] * ratio * ADVANTAGES[row, :length].sum() / length
        assert_close(slope[row, :length], expected.expand(length))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_the_policy_that_sampled_the_gradient_is_the_policy_gradient(name):
    """For one advantage per sequence: then that of a sequence's ratio is spread evenly, and adds up to the same."""
    advantages = ADVANTAGES[:, :1].expand(3, 5)
    sequences = torch.zeros(3, 5, dtype=torch.int64)
    (slope,) = gradients(
        lambda x: POLICY_LOSSES[name](
            x, old_log_probs=LOG_PROBS, advantages=advantages, mask=MASK, weights=WEIGHTS, sequences=sequences, **CLIPS
        )[0],
        [LOG_PROBS],
    )
    assert_close(slope, torch.where(MASK, -WEIGHTS * advantages, 0.0))


@pytest.mark.parametrize("loss", [cispo_loss, gspo_loss])
def test_laws(loss):
    def hidden(x, old, advantages, mask):
        return loss(x, old_log_probs=old, advantages=advantages, mask=mask, **CLIPS)

    mask = coins(5, 3, 5)
    assert_hidden_ignored(hidden, [LOG_PROBS, OLD, ADVANTAGES], mask)
    assert_pure(hidden, LOG_PROBS, OLD, ADVANTAGES, mask)
    empty, _ = hidden(LOG_PROBS, OLD, ADVANTAGES, torch.zeros(3, 5, dtype=torch.bool))
    assert empty == 0
    _, *constants = gradients(lambda *x: hidden(*x, mask)[0], [LOG_PROBS, OLD, ADVANTAGES])
    assert not any(gradient.any() for gradient in constants)
    far = loss(torch.tensor([1e4]), old_log_probs=torch.zeros(1), advantages=torch.ones(1), mask=torch.tensor([True]))
    assert far[0].isfinite()
    half = loss(*(x.bfloat16() for x in (LOG_PROBS,)), old_log_probs=OLD, advantages=ADVANTAGES, mask=MASK)
    assert half[0].dtype == torch.float64
    low = loss(LOG_PROBS.bfloat16(), old_log_probs=OLD.bfloat16(), advantages=ADVANTAGES.bfloat16(), mask=MASK)
    assert low[0].dtype == torch.float32


@pytest.mark.parametrize("loss", [ppo_policy_loss, cispo_loss, gspo_loss])
@pytest.mark.parametrize("name", ["clip_eps", "clip_eps_high"])
def test_a_clip_that_is_not_positive_is_refused(loss, name):
    with pytest.raises(ValueError, match=f"_loss: {name} is 0.0, expected above 0"):
        call(loss, LOG_PROBS, **{name: 0.0})


def test_clip_higher_moves_the_upper_clip_alone():
    log_ratio = torch.tensor([0.5, 1.25, 1.5, 0.75], dtype=torch.float64).log()
    advantages, mask = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64), torch.ones(4, dtype=torch.bool)

    def loss(x):
        return ppo_policy_loss(
            x, old_log_probs=torch.zeros(4), advantages=advantages, mask=mask, clip_eps=0.2, clip_eps_high=0.3
        )[0]

    (slope,) = gradients(loss, [log_ratio])
    assert_close(slope, torch.tensor([0.0, -1.25, 0.0, 0.0]))
    assert_close(loss(log_ratio), torch.tensor(-0.95, dtype=torch.float64))


def test_cispos_gradient_is_the_same_in_torch_func_and_its_weights_have_none():
    def loss(x):
        return call(cispo_loss, x, **CLIPS)[0]

    (expected,) = gradients(loss, [LOG_PROBS])
    assert_close(torch.func.grad(loss)(LOG_PROBS), expected)
    assert_close(torch.func.vmap(torch.func.grad(loss))(LOG_PROBS[None])[0], expected)
    _, along = torch.func.jvp(loss, (LOG_PROBS,), (torch.ones_like(LOG_PROBS),))
    assert_close(along, expected.sum())
    _, curvature = torch.func.jvp(torch.func.grad(loss), (LOG_PROBS,), (torch.ones_like(LOG_PROBS),))
    assert not curvature.any()
