"""One score of several reward models."""

from typing import Literal

import torch
from torch import Tensor

from rlhf.checks import check_rank, check_same_shape, check_value
from rlhf.ops import upcast
from rlhf.statistics import rank_correlation

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
        how: the combination.
        coef: weight of the variance in 1 / reward units, at least 0; for "uncertainty" only.

    Returns:
        [...] reward units, float32 at least. The order of the members does not matter, but for rounding.

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


def error_correlation(disagreement: Tensor, proxy: Tensor, gold: Tensor) -> Tensor:
    """Return the [] rank correlation of an ensemble's disagreement with the error of its score.

        rho(d, |z(proxy) - z(gold)|),   z(s) = (s - mean(s)) / std(s)

    Proxy and gold score have no common unit, so the error is that of their standardised values. Near 1 the ensemble
    knows where it errs; near 0 its disagreement says nothing.

    Source: Coste et al. 2023, section 3.1, https://arxiv.org/abs/2310.02743, penalise disagreement because members
    disagree where they err; this measures whether they do.

    Args:
        disagreement: [B] float, standard deviation over the members.
        proxy: [B] float, combined score of the ensemble.
        gold: [B] float, gold score in any unit.

    Returns:
        [] float64, in [-1, 1]; NaN if disagreement, proxy or gold is constant.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> proxy, gold = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> error_correlation(torch.tensor([0.2, 0.3, 0.1]), proxy, gold)
        tensor(1., dtype=torch.float64)
    """
    check_rank("error_correlation", 1, disagreement=disagreement)
    check_same_shape("error_correlation", disagreement=disagreement, proxy=proxy, gold=gold)
    return rank_correlation(disagreement, (_standardised(proxy) - _standardised(gold)).abs())


def _standardised(scores: Tensor) -> Tensor:
    """Return [B] float64 scores with mean 0 and variance 1, or NaN if all are equal."""
    centred = scores.double() - scores.double().mean()
    return torch.where((scores != scores[:1]).any(), centred / centred.square().mean().sqrt(), torch.nan)
