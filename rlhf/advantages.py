"""Token rewards and generalised advantage estimation.

Tensors are [..., T] over completion tokens, with any leading dimensions. A mask may have holes, such as the results of
tools between the turns of a conversation; the result is that of the row without them. Masked positions may hold any
value, NaN included; the result there is 0. Half-precision inputs are upcast, and results are float32, or float64 for
float64 inputs.
"""

import torch
from torch import Tensor

from rlhf.checks import check_mask, check_value
from rlhf.ops import upcast


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float | Tensor) -> Tensor:
    """Return per-token rewards: a KL penalty on every token, and the score on the last token of each row.

        rewards_t = -kl_coef kl_t + [t is the last True of the mask] score

    The rewards of a row sum to score - kl_coef * (sum of its KL).

    Source: Ziegler et al. 2019, eq. 2, https://arxiv.org/abs/1909.08593, spread over tokens as in their code.

    Args:
        scores: [...] float, reward units; differentiated.
        kl: [..., T] float, nats per token (`rlhf.kl.kl_estimate`); differentiated.
        mask: [..., T] bool, True on the tokens of each row.
        kl_coef: KL coefficient, in reward units per nat.

    Returns:
        [..., T] reward units, 0 where the mask is False. The score of a row without tokens is dropped.

    Raises:
        ValueError: shapes do not match.
        TypeError: mask is not bool.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> token_rewards(torch.tensor([2.0]), torch.tensor([[1.0, 3.0, 0.0]]), mask, kl_coef=0.5)
        tensor([[-0.5000,  0.5000,  0.0000]])
    """
    check_mask("token_rewards", mask, kl=kl)
    _check_time("token_rewards", kl=kl)
    rows = tuple(kl.shape[:-1])
    check_value("token_rewards", tuple(scores.shape) == rows, f"shape {rows}", scores=tuple(scores.shape))
    last = mask & (mask.cumsum(dim=-1) == mask.sum(dim=-1, keepdim=True))
    penalties = torch.where(mask, -kl_coef * upcast(kl), 0.0)
    return penalties + torch.where(last, upcast(scores).unsqueeze(-1), 0.0)


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float | Tensor = 1.0) -> Tensor:
    """Return the discounted sum of the rewards from each token on.

        G_t = sum_l gamma^l r_{t+l}

    This sum is the advantage of REINFORCE++ if the rewards include the KL and it is whitened (`rlhf.ops.whiten`).

    Source: Hu 2025, "REINFORCE++", section 3, https://arxiv.org/abs/2501.03262.

    Args:
        rewards: [..., T] float, reward units (`token_rewards`); differentiated.
        mask: [..., T] bool, True on the tokens of each row.
        gamma: discount factor per token, in [0, 1].

    Returns:
        [..., T] reward units, 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or gamma is outside [0, 1].
        TypeError: mask is not bool.

    Example:
        >>> returns_to_go(torch.tensor([1.0, 2.0]), torch.tensor([True, True]), gamma=0.5)
        tensor([2., 2.])
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and returns, in O(log T) tensor operations.

        delta_t = r_t + gamma V_{t+1} - V_t,   V after the last token = bootstrap_value
        A_t = sum_l (gamma lam)^l delta_{t+l},   returns_t = A_t + V_t

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    eq. 16, https://arxiv.org/abs/1506.02438. The sum is computed by doubling: after step i, A_t holds the terms
    l < 2^i, and A_t + (gamma lam)^(2^i) A_{t + 2^i} holds the terms l < 2^(i+1). `gae_loop` is the textbook form, which
    gives the same result up to rounding.

    Args:
        rewards: [..., T] float; differentiated.
        values: [..., T] float, value of the state in which token t is chosen; differentiated.
        mask: [..., T] bool, True on the tokens of each row. Before a hole, token t + 1 is the next token that counts.
        gamma: discount factor per token, in [0, 1].
        lam: lambda parameter, in [0, 1]; 1 gives return-to-go minus value, and 0 gives the TD error.
        bootstrap_value: [...] float, value of the state after the last token of each row; differentiated. Pass it for
            rows that were cut before their end. None stands for 0, the value after an end.

    Returns:
        (advantages, returns), each [..., T], 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or gamma or lam is outside [0, 1].
        TypeError: mask is not bool.

    Example:
        >>> rewards, values, mask = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([True, True])
        >>> gae(rewards, values, mask, lam=1.0)
        (tensor([0.5000, 0.5000]), tensor([1., 1.]))
    """
    rewards, values, bootstrap_value = _prepare("gae", rewards, values, mask, gamma, lam, bootstrap_value)
    front = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)  # the tokens in order, then the rest
    inside, rewards, values_in_front = (x.gather(-1, front) for x in (mask, rewards, values))
    last = inside & ~_shift(inside, 1)
    next_values = torch.where(last, bootstrap_value.unsqueeze(-1), _shift(values_in_front, 1))
    advantages = rewards + gamma * next_values - values_in_front  # 0 behind the last token, as all three are
    steps, decay, reach = advantages.shape[-1], gamma * lam, 1
    while reach < steps:
        advantages = advantages + decay**reach * _shift(advantages, reach)
        reach *= 2
    place = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    advantages = torch.where(mask, advantages.gather(-1, place), 0.0)
    return advantages, advantages + values


def gae_loop(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of generalised advantage estimation by the textbook recursion, token by token.

        delta_t = r_t + gamma V_{t+1} - V_t,   V after the last token = bootstrap_value
        A_t = delta_t + gamma lam A_{t+1},   returns_t = A_t + V_t

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    eq. 16, https://arxiv.org/abs/1506.02438. `gae` is the fast form.

    Args:
        rewards: [..., T] float; differentiated.
        values: [..., T] float, value of the state in which token t is chosen; differentiated.
        mask: [..., T] bool, True on the tokens of each row. Before a hole, token t + 1 is the next token that counts.
        gamma: discount factor per token, in [0, 1].
        lam: lambda parameter, in [0, 1].
        bootstrap_value: [...] float, value of the state after the last token of each row; differentiated. None stands
            for 0.

    Returns:
        (advantages, returns), each [..., T], 0 where the mask is False.

    Raises:
        ValueError: shapes differ, or gamma or lam is outside [0, 1].
        TypeError: mask is not bool.

    Example:
        >>> rewards, values, mask = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([True, True])
        >>> gae_loop(rewards, values, mask, lam=0.0)
        (tensor([0.0000, 0.5000]), tensor([0.5000, 1.0000]))
    """
    rewards, values, next_value = _prepare("gae_loop", rewards, values, mask, gamma, lam, bootstrap_value)
    advantage, columns = torch.zeros_like(next_value), [torch.zeros_like(rewards[..., :0])]
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = torch.where(mask[..., t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[..., t], values[..., t], next_value)
        columns.append(advantage.unsqueeze(-1))
    advantages = torch.where(mask, torch.cat(columns[::-1], dim=-1), 0.0)
    return advantages, advantages + values


def _prepare(
    function: str,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rewards, values, bootstrap value), checked and upcast; 0 where the mask is False, or by default."""
    check_mask(function, mask, rewards=rewards, values=values)
    _check_time(function, rewards=rewards)
    check_value(function, (gamma >= 0) & (gamma <= 1), "in [0, 1]", gamma=gamma)
    check_value(function, (lam >= 0) & (lam <= 1), "in [0, 1]", lam=lam)
    rewards, values = (torch.where(mask, upcast(x), 0.0) for x in (rewards, values))
    if bootstrap_value is None:
        return rewards, values, values.new_zeros(values.shape[:-1])
    got, rows = tuple(bootstrap_value.shape), tuple(rewards.shape[:-1])
    check_value(function, got == rows, f"shape {rows}", bootstrap_value=got)
    return rewards, values, upcast(bootstrap_value)


def _check_time(function: str, **tensor: Tensor) -> None:
    """Raise ValueError if the tensor has no axis of time."""
    ((name, x),) = tensor.items()
    check_value(function, x.ndim > 0, "at least 1 dimension, time the last", **{name: tuple(x.shape)})


def _shift(x: Tensor, steps: int) -> Tensor:
    """Return x some steps later, zero (False) after the end."""
    return torch.nn.functional.pad(x[..., steps:], (0, steps))
