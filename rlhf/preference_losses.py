"""Losses on preference pairs without a reward model: DPO and IPO.

Each takes the log-ratios of whole completions, log pi(y | x) - log pi_ref(y | x) in nats, and returns `(loss_sum,
sums)` like the losses of `rlhf.losses`, which describes masks, weights and counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.checks import check_mask, check_value
from rlhf.losses import weighted_sum
from rlhf.ops import upcast
from rlhf.types import MetricSums


def sequence_log_ratio(log_probs: Tensor, *, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return log pi(y | x) - log pi_ref(y | x) of whole completions: the sum over the tokens that count.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7, https://arxiv.org/abs/2305.18290.

    Args:
        log_probs: [..., T] float, nats, policy; differentiated.
        ref_log_probs: [..., T] float, nats, reference; constant.
        mask: [..., T] bool, True on the tokens of the completion.

    Returns:
        [...] nats, float32 at least.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.

    Example:
        >>> log_probs, ref_log_probs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -4.0])
        >>> sequence_log_ratio(log_probs, ref_log_probs=ref_log_probs, mask=torch.tensor([True, True]))
        tensor(2.5000)
    """
    check_mask("sequence_log_ratio", mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
    return torch.where(mask, upcast(log_probs) - upcast(ref_log_probs.detach()), 0.0).sum(dim=-1)


def dpo_loss(
    chosen_log_ratios: Tensor,
    *,
    rejected_log_ratios: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float | Tensor = 0.1,
    label_smoothing: float | Tensor = 0.0,
) -> tuple[Tensor, MetricSums]:
    """Return the loss of direct preference optimisation.

        L = - sum_i w_i ((1 - e) log sigmoid(beta (c_i - r_i)) + e log sigmoid(-beta (c_i - r_i)))

    The loss is the Bradley-Terry loss of the implicit rewards beta c and beta r: without smoothing,
    `reward_loss(beta * c, rejected_scores=beta * r)`. Where pairs are labelled by a reward R, its expected gradient is
    0 at pi_ref exp(R / beta) / Z.

    Source: Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290; label smoothing: "conservative DPO", Mitchell
    2023, https://ericmitchell.ai/cdpo.pdf. Without smoothing, it is TRL's `sigmoid`.

    Args:
        chosen_log_ratios: [B] float, nats (`sequence_log_ratio`); differentiated.
        rejected_log_ratios: [B] float, nats; differentiated.
        mask: [B] bool, True on pairs that count. None counts all.
        weights: factors that broadcast to [B]; constant. None stands for 1.
        beta: coefficient of the KL to the reference, in reward units per nat, above 0.
        label_smoothing: probability e that a label is wrong, in [0, 0.5).

    Returns:
        loss: [] sum over pairs.
        sums: `loss/dpo_sum`, `rewards/chosen_sum`, `rewards/rejected_sum` (implicit rewards), `rewards/margins_sum`,
            `rewards/accuracies_sum` (a tie counts half), `count` (pairs).

    Raises:
        ValueError: shapes differ, or a number is out of range.
        TypeError: mask is not bool.

    Example:
        >>> loss, sums = dpo_loss(torch.tensor([2.0]), rejected_log_ratios=torch.tensor([-1.0]), beta=0.5)
        >>> round(float(loss), 4), sums["rewards/margins_sum"]
        (0.2014, tensor(1.5000))
    """
    check_value("dpo_loss", beta > 0, "above 0", beta=beta)
    smooth = (label_smoothing >= 0) & (label_smoothing < 0.5)
    check_value("dpo_loss", smooth, "in [0, 0.5)", label_smoothing=label_smoothing)
    mask, chosen, rejected = _prepare("dpo_loss", chosen_log_ratios, rejected_log_ratios, mask)
    margin = beta * chosen - beta * rejected
    per_pair = -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    loss = weighted_sum("dpo_loss", torch.where(mask, per_pair, 0.0), mask, weights)
    return loss, {"loss/dpo_sum": loss.detach(), **_reward_sums(beta * chosen, beta * rejected, mask)}


def ipo_loss(
    chosen_log_ratios: Tensor,
    *,
    rejected_log_ratios: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float | Tensor = 0.1,
) -> tuple[Tensor, MetricSums]:
    """Return the loss of identity preference optimisation.

        L = sum_i w_i (c_i - r_i - 1 / (2 beta))^2

    The optimum is at a finite log-ratio even if all labels agree. If pairs are drawn from mu x mu and p(y > y') is the
    probability of a label, it is pi_ref exp(p(y > mu) / beta) / Z, with p(y > mu) the mean of p(y > y') over mu.

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17,
    https://arxiv.org/abs/2310.12036. Log-ratios are sums over tokens, as in the paper; TRL takes their mean over
    tokens.

    Args:
        chosen_log_ratios: [B] float, nats (`sequence_log_ratio`); differentiated.
        rejected_log_ratios: [B] float, nats; differentiated.
        mask: [B] bool, True on pairs that count. None counts all.
        weights: factors that broadcast to [B]; constant. None stands for 1.
        beta: tau of the paper, per nat, above 0.

    Returns:
        loss: [] sum over pairs.
        sums: `loss/ipo_sum`, and the sums of `dpo_loss` except its `loss/dpo_sum`.

    Raises:
        ValueError: shapes differ, or beta is not positive.
        TypeError: mask is not bool.

    Example:
        >>> loss, _ = ipo_loss(torch.tensor([2.0]), rejected_log_ratios=torch.tensor([-1.0]), beta=0.5)
        >>> loss
        tensor(4.)
    """
    check_value("ipo_loss", beta > 0, "above 0", beta=beta)
    mask, chosen, rejected = _prepare("ipo_loss", chosen_log_ratios, rejected_log_ratios, mask)
    per_pair = (chosen - rejected - 0.5 / beta).square()
    loss = weighted_sum("ipo_loss", torch.where(mask, per_pair, 0.0), mask, weights)
    return loss, {"loss/ipo_sum": loss.detach(), **_reward_sums(beta * chosen, beta * rejected, mask)}


def _prepare(function: str, chosen: Tensor, rejected: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mask, chosen, rejected), checked and upcast; 0 where the mask is False."""
    mask = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask
    check_mask(function, mask, chosen_log_ratios=chosen, rejected_log_ratios=rejected)
    return mask, torch.where(mask, upcast(chosen), 0.0), torch.where(mask, upcast(rejected), 0.0)


def _reward_sums(chosen: Tensor, rejected: Tensor, mask: Tensor) -> MetricSums:
    """Return TRL's metrics of implicit rewards [B] that are 0 where the mask is False."""
    chosen, rejected = chosen.detach(), rejected.detach()
    correct = (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)
    return {
        "rewards/chosen_sum": chosen.sum(),
        "rewards/rejected_sum": rejected.sum(),
        "rewards/margins_sum": (chosen - rejected).sum(),
        "rewards/accuracies_sum": torch.where(mask, correct, 0.0).sum(),
        "count": mask.sum(),
    }
