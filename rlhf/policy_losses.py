"""Policy losses other than `rlhf.losses.ppo_policy_loss`, and the table of all policy losses.

All policy losses have one signature, so that `--ppo.loss` can name any of them, or a function of the user with the same
signature. `rlhf.losses` describes their masks, weights and results.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.checks import check_integer, check_mask, check_same_shape
from rlhf.kl import ratio_of
from rlhf.losses import clip_ratio, ppo_policy_loss, weighted_sum
from rlhf.ops import upcast
from rlhf.types import MetricSums

PolicyLoss = Callable[..., tuple[Tensor, MetricSums]]
"""(log_probs, *, old_log_probs, advantages, mask, weights, clip_eps, clip_eps_high, sequences) -> (loss sum, sums)."""


def cispo_loss(
    log_probs: Tensor,
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    clip_eps: float | Tensor = 1.0,
    clip_eps_high: float | Tensor | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, MetricSums]:
    """Return the policy loss with clipped importance-sampling weights.

        L = - sum_t w_t m_t c_t A_t log_probs_t,   c_t = clip(r_t, 1 - eps, 1 + eps_high), constant

    A clipped token keeps its gradient; only its weight is bounded.

    Source: MiniMax 2025, "MiniMax-M1", eq. 4 and 5, https://arxiv.org/abs/2506.13585, who bound the ratio only
    from above. The default `clip_eps` of 1 does the same.

    Args:
        log_probs: [...] float, nats, current policy; the only differentiated input.
        old_log_probs: [...] float, nats, policy that sampled; constant.
        advantages: [...] float, reward units; constant.
        mask: [...] bool, True where the token counts.
        weights: factors that broadcast to [...]; constant. None stands for 1.
        clip_eps: width of the lower half of the interval of ratios, above 0; dimensionless.
        clip_eps_high: width of the upper half of the interval, above 0. None stands for `clip_eps`.
        sequences: ignored; part of the signature of policy losses.

    Returns:
        loss: [] sum.
        sums: sums named like those of `ppo_policy_loss`; `policy/clipfrac_avg_sum` counts tokens with a clipped ratio.

    Raises:
        ValueError: shapes differ, or a clip is not positive.
        TypeError: mask is not bool.

    Example:
        >>> log_probs = torch.tensor([-1.0, -2.0])
        >>> advantages, mask = torch.tensor([1.0, -3.0]), torch.tensor([True, True])
        >>> cispo_loss(log_probs, old_log_probs=log_probs, advantages=advantages, mask=mask)[0]
        tensor(-5.)
    """
    check_mask("cispo_loss", mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    log_probs, old_log_probs, advantages = (
        torch.where(mask, upcast(x), 0.0) for x in (log_probs, old_log_probs.detach(), advantages.detach())
    )
    log_ratio = log_probs.detach() - old_log_probs
    ratio = ratio_of(log_ratio)
    clipped = clip_ratio("cispo_loss", ratio, clip_eps, clip_eps_high)
    loss = weighted_sum("cispo_loss", -clipped * advantages * log_probs, mask, weights)
    return loss, {
        "loss/policy_avg_sum": loss.detach(),
        "policy/clipfrac_avg_sum": torch.where(mask, (clipped != ratio).float(), 0.0).sum(),
        "policy/approxkl_avg_sum": 0.5 * log_ratio.square().sum(),
        "val/ratio_sum": torch.where(mask, ratio, 0.0).sum(),
        "count": mask.sum(),
    }


def gspo_loss(
    log_probs: Tensor,
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    clip_eps: float | Tensor = 3e-4,
    clip_eps_high: float | Tensor | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, MetricSums]:
    """Return the clipped surrogate of whole sequences: `ppo_policy_loss` with one ratio for all tokens of a sequence.

        r_i = (pi(y_i | x_i) / pi_old(y_i | x_i))^(1 / n_i) = exp(1 / n_i sum_t (log_probs_t - old_log_probs_t))

    With weights per sequence (`rlhf.weighting.loss_weights`) and one advantage per sequence, it is eq. 5 of the paper.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", https://arxiv.org/abs/2507.18071. A sequence's
    ratio is much closer to 1 than a token's, so its interval is narrower: 3e-4 and 4e-4 in the paper.

    Args:
        log_probs: [..., T] float, nats, current policy; the only differentiated input.
        old_log_probs: [..., T] float, nats, policy that sampled; constant.
        advantages: [..., T] float, reward units; constant.
        mask: [..., T] bool, True where the token counts.
        weights: factors that broadcast to [..., T]; constant. None stands for 1.
        clip_eps: width of the lower half of the interval of ratios, above 0; dimensionless.
        clip_eps_high: width of the upper half of the interval, above 0. None stands for `clip_eps`.
        sequences: [..., T] int64, equal for tokens of one sequence if a row holds several sequences; None if each row
            is one sequence.

    Returns:
        loss: [] sum.
        sums: sums named like those of `ppo_policy_loss`, computed from the ratios of sequences.

    Raises:
        ValueError: shapes differ, or a clip is not positive.
        TypeError: mask is not bool, or sequences is not int64.

    Example:
        >>> log_probs, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.2, -2.2])
        >>> mask = torch.tensor([True, True])
        >>> loss, sums = gspo_loss(log_probs, old_log_probs=old, advantages=torch.ones(2), mask=mask, clip_eps=0.5)
        >>> round(float(sums["val/ratio_sum"] / 2), 4)
        1.2214
    """
    check_mask("gspo_loss", mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    log_ratio = torch.where(mask, upcast(log_probs), 0.0) - torch.where(mask, upcast(old_log_probs.detach()), 0.0)
    if sequences is None:
        mean = log_ratio.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = mean.expand(log_ratio.shape)
    else:
        check_integer("gspo_loss", sequences=sequences)
        check_same_shape("gspo_loss", log_probs=log_probs, sequences=sequences)
        same = (sequences.unsqueeze(-1) == sequences.unsqueeze(-2)) & mask.unsqueeze(-2)
        sums = torch.where(same, log_ratio.unsqueeze(-2), 0.0).sum(dim=-1)  # in a fixed order, unlike a scatter
        mean = sums / same.sum(dim=-1).clamp(min=1)
    return ppo_policy_loss(
        mean,
        old_log_probs=torch.zeros_like(mean),
        advantages=advantages,
        mask=mask,
        weights=weights,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
    )


def _ppo(log_probs: Tensor, *, sequences: Tensor | None = None, **arguments: Tensor) -> tuple[Tensor, MetricSums]:
    """Return `ppo_policy_loss`, whose tokens do not depend on their sequence."""
    return ppo_policy_loss(log_probs, **arguments)


POLICY_LOSSES: dict[str, PolicyLoss] = {"ppo": _ppo, "cispo": cispo_loss, "gspo": gspo_loss}
"""Policy losses by name."""
