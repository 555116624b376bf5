"""Scalar heads on hidden states, for reward models and value functions.

A head is `{"weight": [1, D]}`, plus `"bias": [1]` for values: the layout of `GPT2ForSequenceClassification`'s `score`.
"""

import torch
from torch import Tensor

from rlhf.checks import check_value
from rlhf.random import normal
from rlhf.types import Params


def init_reward_head(n_embd: int, *, key: Tensor) -> Params:
    """Return a linear head with normal weights of standard deviation 1 / sqrt(n_embd + 1).

    The head has no bias, because preferences do not determine one.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", https://github.com/openai/summarize-from-feedback;
    Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail 11, https://arxiv.org/abs/2403.17031.

    Args:
        n_embd: width of the trunk.
        key: [2] int32 key, which is consumed.

    Example:
        >>> init_reward_head(8, key=rlhf.random.key(0))["weight"].shape
        torch.Size([1, 8])
    """
    return {"weight": normal(key, (1, n_embd)) / (n_embd + 1) ** 0.5}


def init_value_head(n_embd: int) -> Params:
    """Return a linear head whose value is 0 everywhere, so that the first returns are the rewards themselves.

    Args:
        n_embd: width of the trunk.

    Example:
        >>> apply_head(init_value_head(8), torch.ones(3, 8))
        tensor([0., 0., 0.])
    """
    return {"weight": torch.zeros(1, n_embd), "bias": torch.zeros(1)}


def value_head_from_reward(
    head: Params, *, mean: float | Tensor = 0.0, std: float | Tensor = 1.0, weight: float | Tensor = 1.0
) -> Params:
    """Return the value head that predicts weight (reward - mean) / std, from which a critic starts.

    Args:
        head: head of the reward model.
        mean: mean that is subtracted from the reward.
        std: divisor of the reward, above 0.
        weight: weight of this reward in the sum that the critic predicts.

    Raises:
        ValueError: std is not positive.

    Example:
        >>> head = {"weight": torch.ones(1, 2)}
        >>> apply_head(value_head_from_reward(head, mean=1.0, std=2.0), torch.tensor([2.0, 3.0]))
        tensor(2.)
    """
    check_value("value_head_from_reward", std > 0, "above 0", std=std)
    return {"weight": head["weight"] * weight / std, "bias": head["weight"].new_ones(1) * (-mean * weight / std)}


def apply_head(head: Params, hidden: Tensor) -> Tensor:
    """Return the scalars [...] of hidden states [..., D], in float32 or float64.

    Args:
        head: `{"weight": [1, D]}`, with or without `"bias": [1]`; differentiated.
        hidden: [..., D] float; differentiated.

    Example:
        >>> apply_head({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, torch.tensor([[2.0, 3.0]]))
        tensor([6.])
    """
    weight = head["weight"].to(torch.promote_types(head["weight"].dtype, torch.float32))
    scalar = (hidden.to(weight.dtype) @ weight.T).squeeze(-1)
    return scalar + head["bias"][0].to(weight.dtype) if "bias" in head else scalar
