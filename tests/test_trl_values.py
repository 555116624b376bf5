"""Golden values: what the formulas of TRL 1.16.0 give for the same tensors, where its definitions are ours.

The numbers are those of `grpo_trainer.py`, `rloo_trainer.py` and `dpo_trainer.py` in float64. Where definitions differ,
the pages in docs/methods say how.
"""

import pytest
import torch
from laws import floats, prefix_mask

from rlhf.group_baselines import group_advantages
from rlhf.kl import importance_weighted_kl, kl_estimate
from rlhf.losses import ppo_policy_loss
from rlhf.policy_losses import cispo_loss, gspo_loss
from rlhf.preference_losses import dpo_loss
from rlhf.weighting import loss_weights

ADVANTAGES = {
    "RLOOTrainer": (
        {"baseline": "leave_one_out"},
        [-0.23044341777, 0.48360750938, -0.25316409160, -1.97902245112, 1.33374719629, 0.64527525483],
    ),
    "scale_rewards group": (
        {"baseline": "mean", "scale": "group_std"},
        [-0.54982625294, 1.15386287592, -0.60403662298, -1.13199416041, 0.76289889324, 0.36909526716],
    ),
    "scale_rewards batch": (
        {"baseline": "mean", "scale": "batch_std"},
        [-0.19134522754, 0.40155622501, -0.21021099747, -1.64325154030, 1.10745693331, 0.53579460699],
    ),
    "scale_rewards none": (
        {"baseline": "mean"},
        [-0.15362894518, 0.32240500625, -0.16877606107, -1.31934830075, 0.88916479753, 0.43018350322],
    ),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name):
    options, expected = ADVANTAGES[name]
    found = group_advantages(floats(1, 6), torch.tensor([0, 0, 0, 1, 1, 1]), **options)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


LOSSES = {
    "grpo": (ppo_policy_loss, "sequence", False, 1.080204669289),
    "dapo": (ppo_policy_loss, "token", False, 0.918260458189),
    "dr_grpo, use_bias_correction_kl": (ppo_policy_loss, "constant", True, 0.422050599339),
    "grpo, importance_sampling_level sequence": (gspo_loss, "sequence", False, 1.013242776016),
    "cispo, use_bias_correction_kl": (cispo_loss, "token", True, -0.675769155042),
}


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses_with_the_kl(name):
    """epsilon 0.2, epsilon_high 0.28 (1.28 for cispo), beta 0.04, max_completion_length 8."""
    loss, per, weigh, expected = LOSSES[name]
    lengths = torch.tensor([5, 2, 4])
    mask, log_probs = prefix_mask(lengths, 5), -floats(2, 3, 5).abs()
    old_log_probs, ref_log_probs = log_probs + 0.3 * floats(3, 3, 5), -floats(4, 3, 5).abs()
    weights = loss_weights(lengths, per=per, length=8 if per == "constant" else None)[:, None].double()
    clips = {"clip_eps": 1.0 if loss is cispo_loss else 0.2, "clip_eps_high": 0.28}
    total, sums = loss(
        log_probs,
        old_log_probs=old_log_probs,
        advantages=floats(5, 3)[:, None].expand(3, 5),
        mask=mask,
        weights=weights,
        **clips,
    )
    kl = kl_estimate(log_probs, ref_log_probs, estimator="k3")
    if weigh:
        kl = importance_weighted_kl(log_probs, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs)
    mean = (total + 0.04 * torch.where(mask, weights * kl, 0.0).sum()) / sums["count"]
    assert float(mean) == pytest.approx(expected, abs=1e-6)


def test_dpo_sigmoid():
    loss, sums = dpo_loss(floats(6, 4), rejected_log_ratios=floats(7, 4), beta=0.3)
    assert float(loss / sums["count"]) == pytest.approx(0.680645366851, abs=1e-9)
