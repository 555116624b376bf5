"""Advantages of whole completions from their scores alone, without a critic: RLOO, GRPO, Dr. GRPO, REINFORCE.

    method      baseline        scale
    RLOO        leave_one_out   none
    GRPO        mean            group_std
    Dr. GRPO    mean            none
    REINFORCE   batch, or none  none, or batch_std

A completion is a single action here: all of its tokens get its advantage. Completions of one prompt form a group.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_same_shape, check_value
from rlhf.ops import upcast

Baseline = Literal["leave_one_out", "mean", "batch", "none"]
Scale = Literal["none", "group_std", "batch_std"]

_STD_EPS = 1e-4
"""Term added to a standard deviation, as in TRL."""


def group_advantages(
    scores: Tensor, groups: Tensor, *, baseline: Baseline = "leave_one_out", scale: Scale = "none"
) -> Tensor:
    """Return each completion's score minus a baseline, divided by a scale.

        A_i = (s_i - b_i) / c_i,   G the group of i, K its size, B all completions
        b_i = leave_one_out  1 / (K - 1) sum_{j in G, j != i} s_j      mean  1 / K sum_{j in G} s_j
              batch          1 / |B| sum_j s_j                         none  0
        c_i = none  1      group_std  std(s_G) + 1e-4      batch_std  std(s_B) + 1e-4

    The expected policy gradient is exact with leave_one_out and none. With mean it is (1 - 1/K) of the exact one,
    because s_i is part of its own baseline: leave_one_out is K / (K - 1) times mean. A division by the group's
    deviation weighs prompts unequally, so the gradient is that of another objective. If all scores of a group are
    equal, its advantages are exactly 0 under both group baselines.

    Source: RLOO, Ahmadian et al. 2024, "Back to Basics", eq. 8, https://arxiv.org/abs/2402.14740; GRPO, Shao et al.
    2024, section 4.1.2, https://arxiv.org/abs/2402.03300; Dr. GRPO, Liu et al. 2025, section 3.2,
    https://arxiv.org/abs/2503.20783. Standard deviations are unbiased (divided by K - 1), as in TRL.

    Args:
        scores: [B] float, reward units; differentiated.
        groups: [B] int64, equal for completions of one prompt, in any order; groups may differ in size. Its values are
            read, so it is not an argument for `vmap`.
        baseline: name of the baseline that is subtracted from each score.
        scale: name of the scale that divides the difference.

    Returns:
        [B] reward units, or dimensionless with a scale; float32 at least.

    Raises:
        ValueError: shapes differ, a name is unknown, or a group has one completion and its baseline or scale needs two.

    Example:
        >>> scores, groups = torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])
        >>> group_advantages(scores, groups)
        tensor([ 1., -1., -1.,  1.])
        >>> group_advantages(scores, groups, baseline="mean")
        tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    """
    check_rank("group_advantages", 1, scores=scores)
    check_same_shape("group_advantages", scores=scores, groups=groups)
    names = "leave_one_out, mean, batch or none"
    check_value("group_advantages", baseline in ("leave_one_out", "mean", "batch", "none"), names, baseline=baseline)
    check_value(
        "group_advantages", scale in ("none", "group_std", "batch_std"), "none, group_std or batch_std", scale=scale
    )
    scores = upcast(scores)
    batch = torch.zeros_like(groups)
    _check_sizes(groups, batch, baseline, scale)
    advantages = scores
    if baseline != "none":
        advantages = _centred(scores, batch if baseline == "batch" else groups)
    if baseline == "leave_one_out":
        size = _sizes(groups).to(scores.dtype)
        advantages = advantages * (size / (size - 1))
    if scale != "none":
        advantages = advantages / (_std(scores, batch if scale == "batch_std" else groups) + _STD_EPS)
    return advantages


def dpo_advantages(scores: Tensor, log_ratios: Tensor, groups: Tensor, *, beta: float | Tensor) -> Tensor:
    """Return advantages whose policy gradient is the gradient of DPO on the two completions of each prompt.

        A_i = beta (p_i - sigmoid(beta (l_i - l_j))),   p_i = 1 if s_i > s_j, 1/2 if s_i = s_j, 0 if s_i < s_j

    for the completions i and j of a prompt, with the log-ratio l = log pi(y | x) - log pi_ref(y | x) of the policy that
    sampled them. With c the better one of a pair and r the other,

        grad -log sigmoid(beta (l_c - l_r)) = - A_c grad log pi(c | x) - A_r grad log pi(r | x)

    at that policy. A tie counts as half a pair of either order.

    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback",
    https://arxiv.org/abs/2402.04792, whose labels are a reward's here; the loss is that of Rafailov et al. 2023, eq. 7,
    https://arxiv.org/abs/2305.18290 (`rlhf.preference_losses.dpo_loss`).

    Args:
        scores: [B] float, reward units; only their order counts; constant.
        log_ratios: [B] float, nats; constant.
        groups: [B] int64, equal for the two completions of a prompt, in any order. Its values are read, so it is not
            an argument for `vmap`.
        beta: reward units per nat, above 0.

    Returns:
        [B] reward units, float32 at least; 0 in sum over each pair.

    Raises:
        ValueError: shapes differ, a group does not have 2 completions, or beta is not positive.

    Example:
        >>> scores, log_ratios = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        >>> dpo_advantages(scores, log_ratios, torch.tensor([7, 7]), beta=0.2)
        tensor([ 0.1000, -0.1000])
    """
    check_rank("dpo_advantages", 1, scores=scores)
    check_same_shape("dpo_advantages", scores=scores, log_ratios=log_ratios, groups=groups)
    check_value("dpo_advantages", beta > 0, "above 0", beta=beta)
    sizes = _sizes(groups)
    if bool((sizes != 2).any()):
        number = int((sizes != 2).nonzero()[0])
        raise ValueError(
            f"dpo_advantages: group {int(groups[number])} has {int(sizes[number])} completions, expected 2: a pair"
        )
    order = torch.argsort(groups)
    other = order.view(-1, 2).flip(1).flatten()[torch.argsort(order)]
    log_ratios, better, equal = upcast(log_ratios), scores > scores[other], scores == scores[other]
    preferred = better.to(log_ratios.dtype) + 0.5 * equal.to(log_ratios.dtype)
    return beta * (preferred - torch.sigmoid(beta * (log_ratios - log_ratios[other])))


def equal_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Return [B] bool: True where all scores of a completion's group are equal, so that it has nothing to compare.

    Args:
        scores: [B] float, reward units.
        groups: [B] int64, equal for completions of one prompt, in any order.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> equal_groups(torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
        tensor([ True,  True, False, False])
    """
    check_rank("equal_groups", 1, scores=scores)
    check_same_shape("equal_groups", scores=scores, groups=groups)
    first, index, sizes = _layout(groups)
    differing = torch.zeros(len(sizes), device=scores.device).index_add(0, index, (scores != scores[first]).float())
    return (differing == 0)[index]


def _check_sizes(groups: Tensor, batch: Tensor, baseline: Baseline, scale: Scale) -> None:
    """Raise ValueError if there is one completion where the baseline or the scale compares two."""
    sizes = _sizes(groups)
    if (baseline in ("leave_one_out", "mean") or scale == "group_std") and bool((sizes < 2).any()):
        alone = int(groups[sizes < 2][0])
        raise ValueError(
            f"group_advantages: group {alone} has 1 completion, expected at least 2 with baseline {baseline} and scale "
            f"{scale}: there is nothing to compare it with"
        )
    if (baseline == "batch" or scale == "batch_std") and len(batch) < 2:
        raise ValueError(f"group_advantages: scores has shape {tuple(batch.shape)}, expected at least 2 scores")


def _layout(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [B] the first member of each completion's group, [B] its group from 0, and [G] the sizes of groups."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    order = torch.argsort(index, stable=True)
    return order[sizes.cumsum(0) - sizes][index], index, sizes


def _sizes(groups: Tensor) -> Tensor:
    _, index, sizes = _layout(groups)
    return sizes[index]


def _centred(scores: Tensor, groups: Tensor) -> Tensor:
    """Return [B] scores minus their group's mean; exactly 0 where all of them are equal."""
    first, index, sizes = _layout(groups)
    shifted = scores - scores[first]  # a mean of equal numbers may differ from them by rounding
    sums = shifted.new_zeros(len(sizes)).index_add(0, index, shifted)
    return shifted - (sums / sizes)[index]


def _std(scores: Tensor, groups: Tensor) -> Tensor:
    """Return [B] the unbiased standard deviation of each completion's group; 0, with gradient 0, if all are equal."""
    _, index, sizes = _layout(groups)
    squares = _centred(scores, groups).square()
    variance = (squares.new_zeros(len(sizes)).index_add(0, index, squares) / (sizes - 1))[index]
    varies = variance > 0  # the square root has no derivative at 0
    return torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
