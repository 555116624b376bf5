"""The reward of an iteration's completions: the scores of its sources, summed or combined."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.ensembles import combine_scores, error_correlation
from rlhf.io.reward_sources import RewardSource, call_reward_function


def score_sources(
    settings: PPOConfig,
    sources: Sequence[RewardSource],
    model_scores: Tensor,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Sequence[dict[str, Any]],
) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """Return raw scores [B] by the source's metric, the reward [B] that the policy is trained on, and metrics.

    Each reward model is normalised by its own statistics first. With `ppo.combine` other than sum, the models that have
    a weight are one source of that weight, their scores combined by `rlhf.ensembles.combine_scores`;
    `reward/disagreement` is the standard deviation over them. If there is a gold score, its rank correlation with the
    ensemble's error is `reward/disagreement_error/<gold>` (`rlhf.ensembles.error_correlation`).

    Args:
        settings: settings of PPO.
        sources: reward sources.
        model_scores: [B, K] scores of the reward models among them, in order.
        prompts: texts or lists of messages, one for each completion.
        completions: the completions, in the form of their prompts (`rlhf.data.conversations.as_completion`).
        columns: each completion's record of the prompt file.
    """
    raw, total, members, metrics = {}, torch.zeros(len(completions)), [], {}
    scores_by_model = iter(model_scores.T.contiguous())  # sums of strided columns round differently
    for source in sources:
        if source.model is not None:
            raw[source.metric] = scores = next(scores_by_model)
            mean, std, _ = source.model.statistics
            normal = (scores - mean) / std if settings.normalize_reward else scores
        else:
            raw[source.metric] = normal = torch.tensor(call_reward_function(source, prompts, completions, columns))
        if source.weight and source.model is not None and settings.combine != "sum":
            members.append((source.weight, normal))
        elif source.weight:
            total = total + source.weight * normal
    if settings.combine != "sum":
        ensemble = torch.stack([normal for _, normal in members], dim=1)
        combined = combine_scores(ensemble, how=settings.combine, coef=settings.uncertainty_coef)
        total = total + members[0][0] * combined
        raw["reward/disagreement"] = disagreement = ensemble.std(dim=1, correction=0)
        for source in sources:
            if not source.weight:
                correlation = error_correlation(disagreement, combined, raw[source.metric])
                metrics[f"reward/disagreement_error/{source.name}"] = float(correlation)
    return raw, total, metrics
