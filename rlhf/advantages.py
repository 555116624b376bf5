"""From scores to advantages: token rewards and generalised advantage estimation.

All arrays are [B, T] over completion tokens, right-padded: the mask of a row is True on a prefix.
"""

import torch
from torch import Tensor

from rlhf.checks import check_mask, check_rank, check_value


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float | Tensor) -> Tensor:
    """Per-token rewards: a KL penalty on every token, the sequence's score on its last one.

        rewards_t = -kl_coef kl_t + [t is the last True of the mask] score

    so that each row sums to score - kl_coef * (sum of its KL).
    Source: Ziegler et al. 2019, eq. 2, https://arxiv.org/abs/1909.08593, spread over tokens as in their code.

    Args:
        scores: [B] float, reward units; constant.
        kl: [B, T] float, nats per token (`rlhf.kl.kl_estimate`); constant.
        mask: [B, T] bool, True on each row's tokens, a prefix.
        kl_coef: reward units per nat.

    Returns:
        [B, T] reward units, 0 where the mask is False. A row without tokens drops its score.

    Raises:
        ValueError: shapes do not match.
        TypeError: mask is not bool.
    """
    check_rank("token_rewards", 2, kl=kl)
    check_mask("token_rewards", mask, kl=kl)
    check_value("token_rewards", scores.shape == kl.shape[:1], f"shape ({kl.shape[0]},)", scores=tuple(scores.shape))
    last = mask & ~_next(mask)
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, in O(log T) whole-array steps.

        delta_t = r_t + gamma V_{t+1} - V_t,   V after the last token = 0
        A_t = sum_l (gamma lam)^l delta_{t+l},   returns_t = A_t + V_t

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    eq. 16, https://arxiv.org/abs/1506.02438. The sum is taken by doubling: after step i, A_t holds the terms
    l < 2^i, and A_t + (gamma lam)^(2^i) A_{t + 2^i} those below 2^(i+1). `gae_loop` is the form it is tested against.

    Args:
        rewards: [B, T] float; constant.
        values: [B, T] float, value of the state in which token t is chosen; constant.
        mask: [B, T] bool, True on each row's tokens, a prefix.
        gamma: discount per token, in [0, 1].
        lam: lambda of GAE, in [0, 1]; 1 gives return-to-go minus value, 0 the TD error.

    Returns:
        (advantages, returns), each [B, T], 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or gamma or lam is outside [0, 1].
        TypeError: mask is not bool.
    """
    values, advantages = _td_errors("gae", rewards, values, mask, gamma, lam)
    steps, decay, reach = advantages.shape[1], gamma * lam, 1
    while reach < steps:
        ahead = torch.nn.functional.pad(advantages[:, reach:], (0, reach))
        advantages = advantages + decay**reach * ahead
        reach *= 2
    return advantages, advantages + values


def gae_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """`gae` by the backward recursion A_t = delta_t + gamma lam A_{t+1}: the textbook form, one step per token."""
    values, deltas = _td_errors("gae_loop", rewards, values, mask, gamma, lam)
    advantage, columns = torch.zeros_like(deltas[:, :1]), [deltas[:, :0]]
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t : t + 1] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.cat(columns[::-1], dim=1)
    return advantages, advantages + values


def _td_errors(
    function: str, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(values, TD errors), both 0 where the mask is False."""
    check_rank(function, 2, rewards=rewards)
    check_mask(function, mask, rewards=rewards, values=values)
    check_value(function, 0 <= gamma <= 1, "in [0, 1]", gamma=gamma)
    check_value(function, 0 <= lam <= 1, "in [0, 1]", lam=lam)
    values = torch.where(mask, values, 0.0)
    return values, torch.where(mask, rewards + gamma * _next(values) - values, 0.0)


def _next(x: Tensor) -> Tensor:
    """x one step later, zero (False) after the end."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))
