"""Losses, as sums over the entries where the mask is True.

Each loss returns `(loss_sum, sums)`: the sum over the mask, and `MetricSums`. The latter holds detached sums, named by
their metric and `_sum`, and `"count"`, the number of entries that count. `rlhf.ops.mean_metrics` divides by the count
once, over the global batch, so that the result does not depend on how a batch is split. Masked positions may hold any
value, NaN included. An all-False mask gives 0 with zero gradient.

Only the first tensor is positional. `weights` are constant and broadcast to the mask. They scale each entry's part of
the loss and of its metric under `loss/`, but not the count. In a global batch of N entries in B sequences, with n_i
entries in sequence i, the division by the count then gives for these weights:

    None              the mean over tokens
    N / (B n_i)       the mean over sequences of their means; weights [B, 1]
    N / (B L)         the mean over sequences of their sums divided by a constant L; weights []

Inputs that are called constant are detached and receive no gradient. Half-precision inputs are upcast, and results are
float32, or float64 for float64 inputs. Coefficients may be [] tensors, so that `vmap` and `grad` may be applied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.checks import check_mask, check_same_shape, check_value
from rlhf.kl import ratio_of
from rlhf.ops import upcast
from rlhf.types import MetricSums


def sft_loss(log_probs: Tensor, *, mask: Tensor, weights: Tensor | None = None) -> tuple[Tensor, MetricSums]:
    """Return the cross-entropy of the tokens where the mask is True.

        L = - sum_t w_t m_t log pi(y_t | x, y_<t)

    Source: maximum likelihood. A mask of completion tokens only: Touvron et al. 2023, "Llama 2", section 3.1,
    https://arxiv.org/abs/2307.09288.

    Args:
        log_probs: [...] float, nats (`rlhf.ops.token_log_probs`); differentiated.
        mask: [...] bool, True on the tokens to learn.
        weights: factors that broadcast to [...]; constant. None stands for 1.

    Returns:
        loss: [] sum.
        sums: `loss/sft_sum` (nats per token), `count` (tokens).

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.

    Example:
        >>> log_probs, mask = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([True, True, False])
        >>> loss, sums = sft_loss(log_probs, mask=mask)
        >>> loss, sums["count"]
        (tensor(3.), tensor(2))
    """
    check_mask("sft_loss", mask, log_probs=log_probs)
    loss = -weighted_sum("sft_loss", torch.where(mask, upcast(log_probs), 0.0), mask, weights)
    return loss, {"loss/sft_sum": loss.detach(), "count": mask.sum()}


def reward_loss(
    chosen_scores: Tensor,
    *,
    rejected_scores: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    margin: Tensor | None = None,
    centre_coef: float | Tensor = 0.0,
) -> tuple[Tensor, MetricSums]:
    """Return the Bradley-Terry loss of preference pairs.

        L = sum_i w_i (-log sigmoid(c_i - r_i - margin_i) + centre_coef (c_i + r_i)^2)

    Source: Christiano et al. 2017, https://arxiv.org/abs/1706.03741, in the form of Ouyang et al. 2022, eq. 1; margin:
    Touvron et al. 2023 (Llama 2), eq. 2, https://arxiv.org/abs/2307.09288; centring: Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244, as TRL's `center_rewards_coefficient`.

    Args:
        chosen_scores: [B] float, reward units; differentiated.
        rejected_scores: [B] float, reward units; differentiated.
        mask: [B] bool, True on pairs that count. None counts all.
        weights: factors that broadcast to [B]; constant. None stands for 1.
        margin: [B] float, required difference of the scores; constant. None stands for 0.
        centre_coef: weight of the penalty on the sum of the two scores, which the comparison leaves free; at least 0.

    Returns:
        loss: [] sum over pairs; finite, with the right gradient, at any finite margin.
        sums: `loss/reward_sum`, `reward/accuracy_sum` (a tie counts half), `reward/margin_sum`, `count` (pairs).

    Raises:
        ValueError: shapes differ, or centre_coef is negative.
        TypeError: mask is not bool.

    Example:
        >>> loss, sums = reward_loss(torch.tensor([2.0, 1.0]), rejected_scores=torch.tensor([0.0, 1.0]))
        >>> round(float(loss), 4), sums["reward/accuracy_sum"]
        (0.8201, tensor(1.5000))
    """
    mask = torch.ones_like(chosen_scores, dtype=torch.bool) if mask is None else mask
    check_mask("reward_loss", mask, chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    check_value("reward_loss", centre_coef >= 0, "at least 0", centre_coef=centre_coef)
    chosen, rejected = (torch.where(mask, upcast(scores), 0.0) for scores in (chosen_scores, rejected_scores))
    difference = chosen - rejected
    required = difference
    if margin is not None:
        check_same_shape("reward_loss", chosen_scores=chosen_scores, margin=margin)
        required = difference - torch.where(mask, _constant(margin), 0.0)
    per_pair = -F.logsigmoid(required) + centre_coef * (chosen + rejected).square()
    loss = weighted_sum("reward_loss", torch.where(mask, per_pair, 0.0), mask, weights)
    correct = (difference > 0).float() + 0.5 * (difference == 0).float()
    return loss, {
        "loss/reward_sum": loss.detach(),
        "reward/accuracy_sum": torch.where(mask, correct, 0.0).sum(),
        "reward/margin_sum": difference.detach().sum(),
        "count": mask.sum(),
    }


def ppo_policy_loss(
    log_probs: Tensor,
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    clip_eps: float | Tensor = 0.2,
    clip_eps_high: float | Tensor | None = None,
    dual_clip: float | Tensor | None = None,
) -> tuple[Tensor, MetricSums]:
    """Return the clipped surrogate policy loss.

        L = - sum_t w_t m_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps_high) A_t)
        r_t = exp(log_probs_t - old_log_probs_t)
        with dual_clip c, where A_t < 0:  - max(min(...), c A_t)

    Above `rlhf.kl.MAX_LOG_RATIO`, exp is continued by its tangent (`rlhf.kl.ratio_of`). Loss and gradient are therefore
    finite for any finite log-ratio, and the gradient is 0 exactly where the clip or dual clip is active.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7, https://arxiv.org/abs/1707.06347;
    dual clip: Ye et al. 2020, eq. 5, https://arxiv.org/abs/1912.09729; clip-higher: Yu et al. 2025, "DAPO", eq. 10,
    https://arxiv.org/abs/2503.14476. Advantages are used as given.

    Args:
        log_probs: [...] float, nats, current policy; the only differentiated input.
        old_log_probs: [...] float, nats, policy that sampled; constant.
        advantages: [...] float, reward units; constant.
        mask: [...] bool, True where the token counts.
        weights: factors that broadcast to [...]; constant. None stands for 1.
        clip_eps: half-width of the interval of ratios, above 0; dimensionless.
        clip_eps_high: width of the upper half of the interval, above 0. None stands for `clip_eps`.
        dual_clip: upper bound of the loss where the advantage is negative, in units of the advantage; above 1. None
            sets no bound.

    Returns:
        loss: [] sum.
        sums: `loss/policy_avg_sum`, `policy/clipfrac_avg_sum` (tokens where the clipped term is the larger loss),
            `policy/approxkl_avg_sum` (nats: half the squared log-ratio, as in TRL), `val/ratio_sum`, `count` (tokens).

    Raises:
        ValueError: shapes differ, or clip_eps, clip_eps_high or dual_clip is out of range.
        TypeError: mask is not bool.

    Example:
        >>> log_probs = torch.tensor([-1.0, -2.0])
        >>> advantages, mask = torch.tensor([1.0, -3.0]), torch.tensor([True, True])
        >>> loss, sums = ppo_policy_loss(log_probs, old_log_probs=log_probs, advantages=advantages, mask=mask)
        >>> loss, sums["val/ratio_sum"]
        (tensor(2.), tensor(2.))
    """
    check_mask("ppo_policy_loss", mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    check_value("ppo_policy_loss", dual_clip is None or dual_clip > 1, "None or above 1", dual_clip=dual_clip)
    log_ratio = torch.where(mask, upcast(log_probs), 0.0) - torch.where(mask, _constant(old_log_probs), 0.0)
    advantages = torch.where(mask, _constant(advantages), 0.0)
    ratio = ratio_of(log_ratio)
    unclipped = -ratio * advantages
    clipped = -clip_ratio("ppo_policy_loss", ratio, clip_eps, clip_eps_high) * advantages
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -dual_clip * advantages), per_token)
    loss = weighted_sum("ppo_policy_loss", per_token, mask, weights)
    return loss, {
        "loss/policy_avg_sum": loss.detach(),
        "policy/clipfrac_avg_sum": (clipped > unclipped).float().sum(),
        "policy/approxkl_avg_sum": 0.5 * log_ratio.detach().square().sum(),
        "val/ratio_sum": torch.where(mask, ratio, 0.0).detach().sum(),
        "count": mask.sum(),
    }


def ppo_value_loss(
    values: Tensor,
    *,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    value_clip_eps: float | Tensor = 0.2,
) -> tuple[Tensor, MetricSums]:
    """Return the clipped squared error of the value function.

        L = 1/2 sum_t w_t m_t max((V_t - R_t)^2, (clip(V_t, V_old - eps, V_old + eps) - R_t)^2)

    Source: the PPO implementation of OpenAI Baselines (ppo2, https://github.com/openai/baselines), which
    lm-human-preferences and TRL follow. The clipping is not in the paper.

    Args:
        values: [...] float, reward units, current value function; the only differentiated input.
        old_values: [...] float, reward units, value function at sampling time; constant.
        returns: [...] float, reward units, targets; constant.
        mask: [...] bool, True where the token counts.
        weights: factors that broadcast to [...]; constant. None stands for 1.
        value_clip_eps: maximum change of the values, in reward units, above 0; `inf` gives the plain squared error.

    Returns:
        loss: [] sum, never below the sum of the unclipped errors.
        sums: `loss/value_avg_sum`, `val/clipfrac_avg_sum` (tokens where the clipped error is larger), `count`.

    Raises:
        ValueError: shapes differ, or value_clip_eps is not positive.
        TypeError: mask is not bool.

    Example:
        >>> values, old_values, returns = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0])
        >>> loss, _ = ppo_value_loss(values, old_values=old_values, returns=returns, mask=torch.tensor([True]))
        >>> round(float(loss), 4)
        0.845
    """
    check_mask("ppo_value_loss", mask, values=values, old_values=old_values, returns=returns)
    check_value("ppo_value_loss", value_clip_eps > 0, "above 0", value_clip_eps=value_clip_eps)
    values, old_values, returns = (
        torch.where(mask, x, 0.0) for x in (upcast(values), _constant(old_values), _constant(returns))
    )
    within = torch.clamp(values, old_values - value_clip_eps, old_values + value_clip_eps)
    unclipped, clipped = (values - returns).square(), (within - returns).square()
    loss = 0.5 * weighted_sum("ppo_value_loss", torch.maximum(unclipped, clipped), mask, weights)
    return loss, {
        "loss/value_avg_sum": loss.detach(),
        "val/clipfrac_avg_sum": (clipped > unclipped).float().sum(),
        "count": mask.sum(),
    }


def clip_ratio(function: str, ratio: Tensor, clip_eps: float | Tensor, clip_eps_high: float | Tensor | None) -> Tensor:
    """Return clip(ratio, 1 - clip_eps, 1 + clip_eps_high).

    Args:
        function: name of the calling function, for errors.
        ratio: [...] float, probability ratio.
        clip_eps: width of the lower half of the interval, above 0.
        clip_eps_high: width of the upper half, above 0. None stands for `clip_eps`.

    Raises:
        ValueError: `clip_eps` or `clip_eps_high` is not positive.

    Example:
        >>> clip_ratio("example", torch.tensor([0.5, 1.0, 2.0]), 0.2, 0.3)
        tensor([0.8000, 1.0000, 1.3000])
    """
    check_value(function, clip_eps > 0, "above 0", clip_eps=clip_eps)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    check_value(function, high > 0, "above 0", clip_eps_high=high)
    return ratio.clamp(min=1.0 - clip_eps).clamp(max=1.0 + high)


def weighted_sum(function: str, per_entry: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sum of entries. The weights are constant.

    Args:
        function: name of the calling function, for errors.
        per_entry: [...] float, 0 where the mask is False; differentiated.
        mask: [...] bool.
        weights: factors that broadcast to the mask. None stands for 1.

    Raises:
        ValueError: `function` got weights that do not broadcast to the mask.

    Example:
        >>> weighted_sum("example", torch.tensor([1.0, 2.0]), torch.tensor([True, True]), torch.tensor(0.5))
        tensor(1.5000)
    """
    if weights is None:
        return per_entry.sum()
    got, shape = tuple(weights.shape), tuple(mask.shape)
    fits = len(got) <= len(shape) and all(n in (1, m) for n, m in zip(reversed(got), reversed(shape), strict=False))
    check_value(function, fits, f"to broadcast to {shape}", **{"weights.shape": got})
    return (per_entry * torch.where(mask, _constant(weights), 0.0)).sum()


def _constant(x: Tensor) -> Tensor:
    return upcast(x.detach())
