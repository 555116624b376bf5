"""Weights of tokens, by which a sum over tokens divided by their number becomes another mean over the batch."""

from typing import Literal

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_value

LossPer = Literal["token", "sequence", "constant"]


def loss_weights(lengths: Tensor, *, per: LossPer = "token", length: float | None = None) -> Tensor:
    """Return the weight of the tokens of each sequence, for the `weights` of a loss over the whole batch.

        per token     1                       mean over all tokens
        per sequence  N / (B n_i)             mean over sequences of the mean over their tokens
        per constant  N / (B L)               mean over sequences of the sum over their tokens, divided by L

    with B sequences of n_i tokens, N in all, and the constant length L. The weights belong to the whole batch: a
    loss that is summed over micro-batches and workers, and divided by N once, does not depend on how it is split.

    Source: per token, Yu et al. 2025, "DAPO", eq. 8, https://arxiv.org/abs/2503.14476; per sequence, Shao et al. 2024
    (GRPO), eq. 3, https://arxiv.org/abs/2402.03300; per constant, Liu et al. 2025 (Dr. GRPO), section 3.2,
    https://arxiv.org/abs/2503.20783.

    Args:
        lengths: [B] int64, number of tokens of each sequence that count; a sequence without any has weight 0.
        per: unit that the mean is taken over.
        length: constant length L in tokens, such as the maximum length of a completion; for "constant" only.

    Returns:
        [B] float32, dimensionless, constant.

    Raises:
        ValueError: `per` is unknown, or length is missing, not positive, or given where it has no effect.

    Example:
        >>> loss_weights(torch.tensor([1, 3]), per="sequence")
        tensor([2.0000, 0.6667])
        >>> loss_weights(torch.tensor([1, 3]), per="constant", length=4)
        tensor([0.5000, 0.5000])
    """
    check_rank("loss_weights", 1, lengths=lengths)
    check_value("loss_weights", per in ("token", "sequence", "constant"), "token, sequence or constant", per=per)
    rule = "above 0 with per='constant'" if per == "constant" else f"None with per={per!r}"
    check_value("loss_weights", length is None if per != "constant" else (length or 0) > 0, rule, length=length)
    if per == "token":
        divisors = torch.ones_like(lengths, dtype=torch.float64)
    elif per == "sequence":
        divisors = lengths.double() * len(lengths) / lengths.sum()
    else:
        divisors = torch.full_like(lengths, float(length or 1), dtype=torch.float64) * len(lengths) / lengths.sum()
    return torch.where(lengths > 0, 1.0 / divisors, 0.0).float()
