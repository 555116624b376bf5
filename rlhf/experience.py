"""The data that PPO learns from: post-processed scores, advantages and returns of scored completions."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.advantages import token_rewards
from rlhf.checks import check_mask, check_same_shape, check_value
from rlhf.estimators import GAE, AdvantageEstimate, Estimator, RewardedCompletions
from rlhf.field_docs import documented
from rlhf.kl import KLEstimator, kl_estimate
from rlhf.ops import masked_mean, masked_var, upcast, whiten
from rlhf.types import Metrics


@documented
class Experience(NamedTuple):
    """Advantages, returns and metrics of one iteration's completions, as constants without gradients."""

    advantages: Tensor
    """[B, T] float32, reward units or whitened."""
    returns: Tensor | None
    """[B, T] float32, reward units: targets of the value function. None without a critic."""
    kl: Tensor
    """[B, T] float32, nats: KL(policy || reference) per token."""
    metrics: Metrics
    """[] float32 by name: means over the batch, with the names that TRL uses."""


def postprocess_scores(
    scores: Tensor,
    ended: Tensor,
    *,
    missing_eos_penalty: float | Tensor = 0.0,
    clip: float | Tensor = float("inf"),
) -> Tensor:
    """Return clipped scores, minus a penalty for completions without an end-of-text token.

    Source: Stiennon et al. 2020, where a completion without an end-of-text token is bad whatever its text, as
    `missing_eos_penalty` in TRL. Clipping: `reward_clip_range` of OpenRLHF.

    Args:
        scores: [B] float, reward units.
        ended: [B] bool, True for completions that end with an end-of-text token.
        missing_eos_penalty: penalty in reward units, at least 0.
        clip: bound of the scores, which are clipped to [-clip, clip]; above 0.

    Returns:
        [B] float32 (float64 for float64 scores).

    Raises:
        ValueError: shapes differ, or a number is out of range.
        TypeError: ended is not bool.

    Example:
        >>> postprocess_scores(torch.tensor([3.0, 1.0]), torch.tensor([True, False]), missing_eos_penalty=2.0, clip=2.0)
        tensor([ 2., -1.])
    """
    check_mask("postprocess_scores", ended, scores=scores)
    check_value("postprocess_scores", missing_eos_penalty >= 0, "at least 0", missing_eos_penalty=missing_eos_penalty)
    check_value("postprocess_scores", clip > 0, "above 0", clip=clip)
    scores = upcast(scores)
    clipped = torch.clamp(scores, -clip, clip)  # type: ignore[arg-type]  # both floats, or both tensors
    return clipped - missing_eos_penalty * (~ended).to(scores.dtype)


def make_experience(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor | None,
    mask: Tensor,
    *,
    groups: Tensor | None = None,
    estimator: Estimator = GAE,
    kl_coef: float | Tensor,
    kl_estimator: KLEstimator = "k1",
    kl_in_loss: bool = False,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    bootstrap_value: Tensor | None = None,
) -> Experience:
    """Return advantages and returns of scored completions, from token rewards made of KL penalty and score.

    Source: Ziegler et al. 2019, section 2; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
    https://arxiv.org/abs/2403.17031.

    Args:
        scores: [B] float, reward units (after `postprocess_scores`); constant.
        log_probs: [B, T] float, nats, policy; constant.
        ref_log_probs: [B, T] float, nats, reference; constant.
        values: [B, T] float, reward units; constant. None if the estimator needs no critic.
        mask: [B, T] bool, True on the tokens of each row. It may have holes, such as the results of tools.
        groups: [B] int64, index of the prompt, for estimators that compare completions of the same prompt.
        estimator: advantage estimator (`rlhf.estimators`).
        kl_coef: KL coefficient, in reward units per nat.
        kl_estimator: name of the KL estimator per token, "k1", "k2" or "k3".
        kl_in_loss: leave the KL out of the rewards because it is in the loss.
        gamma: discount factor per token.
        lam: lambda parameter of GAE.
        whiten_rewards: scale token rewards to unit variance without shifting their mean.
        whiten_advantages: whiten advantages to zero mean and unit variance over the tokens of the batch.
        bootstrap_value: [B] float, value of the state after the last token of each row; constant. None stands for 0.

    Returns:
        An `Experience`. Its metrics per completion are `objective/kl`, `objective/entropy` (minus the sum of
        log-probs), `objective/scores`, `objective/non_score_reward`, `objective/rlhf_reward` (the sum of the last two)
        and `response_length/mean`. With a critic there are `val/mean` and `val/explained_variance` of the returns.

    Raises:
        ValueError: shapes do not match, a number is out of range, or an estimator gets no values or unused ones.
        TypeError: mask is not bool.

    Example:
        >>> scores, log_probs, mask = torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
        >>> make_experience(scores, log_probs, log_probs - 0.5, log_probs, mask, kl_coef=0.1, lam=1.0).returns
        tensor([[0.9000, 0.9500]])
    """
    _check_critic("make_experience", estimator, values=values)
    scores, log_probs, ref_log_probs = (upcast(x.detach()) for x in (scores, log_probs, ref_log_probs))
    values = None if values is None else upcast(values.detach())
    kl = kl_estimate(log_probs, ref_log_probs, estimator=kl_estimator)
    check_mask("make_experience", mask, log_probs=log_probs, ref_log_probs=ref_log_probs, kl=kl)
    kl = torch.where(mask, kl, 0.0)
    penalty = 0.0 if kl_in_loss else kl_coef
    rewards = token_rewards(scores, kl, mask, kl_coef=penalty)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    completions = RewardedCompletions(
        scores=scores,
        kl=kl,
        rewards=rewards,
        mask=mask,
        groups=groups,
        values=values,
        bootstrap_value=None if bootstrap_value is None else bootstrap_value.detach(),
        gamma=gamma,
        lam=lam,
        kl_coef=kl_coef,
    )
    advantages, returns = _estimate(estimator, completions)
    non_score = -penalty * kl.sum(dim=-1)
    metrics = {
        "objective/kl": kl.sum(dim=-1).mean(),
        "objective/entropy": -torch.where(mask, log_probs, 0.0).sum(dim=-1).mean(),
        "objective/scores": scores.mean(),
        "objective/non_score_reward": non_score.mean(),
        "objective/rlhf_reward": (scores + non_score).mean(),
        "response_length/mean": mask.sum(dim=-1).float().mean(),
    }
    if values is not None and returns is not None:
        unexplained = masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)
        metrics |= {"val/mean": masked_mean(values, mask), "val/explained_variance": 1.0 - unexplained}
    metrics = {name: metric.detach() for name, metric in metrics.items()}
    return Experience(whiten(advantages, mask) if whiten_advantages else advantages, returns, kl, metrics)


def _estimate(estimator: Estimator, completions: RewardedCompletions) -> AdvantageEstimate:
    """Return the estimator's result, checked, 0 where the mask is False."""
    advantages, returns = estimator.function(completions)
    function, mask = f"estimator {estimator.name}", completions.mask
    _check_critic(function, estimator, returns=returns)
    check_same_shape(function, mask=mask, advantages=advantages)
    if returns is not None:
        check_same_shape(function, mask=mask, returns=returns)
        returns = torch.where(mask, upcast(returns), 0.0)
    return AdvantageEstimate(torch.where(mask, upcast(advantages), 0.0), returns)


def _check_critic(function: str, estimator: Estimator, **tensor: Tensor | None) -> None:
    """Raise ValueError unless the critic's tensor is given exactly if the estimator needs a critic."""
    ((name, x),) = tensor.items()
    rule = f"{'a tensor' if estimator.needs_critic else 'None'} with the estimator {estimator.name}"
    got = "None" if x is None else "a tensor"
    check_value(function, (x is not None) == estimator.needs_critic, rule, **{name: got})
