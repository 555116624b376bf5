"""One score of several reward models."""

from typing import Literal

from torch import Tensor

from rlhf.checks import check_value
from rlhf.ops import upcast

Combine = Literal["mean", "min", "uncertainty"]


def combine_scores(scores: Tensor, *, how: Combine = "mean", coef: float | Tensor = 0.1) -> Tensor:
    """Return one score per completion from those of an ensemble.

        mean         1 / K sum_k s_k
        min          min_k s_k                               (worst case)
        uncertainty  mean - coef 1 / K sum_k (s_k - mean)^2  (uncertainty-weighted)

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", section 3.1,
    https://arxiv.org/abs/2310.02743.

    Args:
        scores: [..., K] float, reward units, one column per member, each on the same scale; differentiated.
        how: name of the combination.
        coef: weight of the variance in 1 / reward units, at least 0; read for "uncertainty" only.

    Returns:
        [...] reward units, float32 at least. The order of the members affects the rounding only.

    Raises:
        ValueError: there is no member, the name is unknown, or coef is negative.

    Example:
        >>> combine_scores(torch.tensor([[1.0, 3.0]]), how="uncertainty", coef=0.5)
        tensor([1.5000])
    """
    members = scores.shape[-1] if scores.ndim else 0
    check_value("combine_scores", members > 0, "at least 1 member, the last dimension", scores=tuple(scores.shape))
    check_value("combine_scores", how in ("mean", "min", "uncertainty"), "mean, min or uncertainty", how=how)
    check_value("combine_scores", coef >= 0, "at least 0", coef=coef)
    scores = upcast(scores)
    if how == "min":
        return scores.amin(dim=-1)
    mean = scores.mean(dim=-1)
    return mean if how == "mean" else mean - coef * (scores - mean.unsqueeze(-1)).square().mean(dim=-1)
