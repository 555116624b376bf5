"""The verdict on a model of preferences by two baselines: a bag of words, and the length of completions."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from rlhf.config import DPORun, RewardRun
from rlhf.data.data_files import Source
from rlhf.evaluate.baselines import bag_of_words
from rlhf.evaluate.estimates import win_indicator
from rlhf.evaluate.evaluation_inputs import usable_pairs
from rlhf.train.stage_inputs import given_files
from rlhf.train.supervised import DataSplit
from rlhf.verdicts import Verdict, dpo_verdict, reward_verdict

_BASELINE_PAIRS = 20_000
"""Training pairs that the bag of words learns from."""


def judge_reward_model(
    config: RewardRun, path: Source, split: DataSplit, metrics: Mapping[str, float]
) -> tuple[Verdict | None, dict[str, float]]:
    """Return the verdict on a reward model and the accuracies of the baselines; nothing without held-out pairs.

    Args:
        config: configuration of the run.
        path: training pairs.
        split: the pairs that are trained on and held out.
        metrics: metrics of the last evaluation.
    """
    return _judge(reward_verdict, config, path, split, metrics.get("eval/reward/accuracy", math.nan))


def judge_implicit_rewards(
    config: DPORun, path: Source, split: DataSplit, metrics: Mapping[str, float]
) -> tuple[Verdict | None, dict[str, float]]:
    """Return the verdict on a policy of DPO and the accuracies of the baselines, as `judge_reward_model`."""
    return _judge(dpo_verdict, config, path, split, metrics.get("eval/rewards/accuracies", math.nan))


def _judge(
    verdict: Callable[..., Verdict], config: RewardRun | DPORun, path: Source, split: DataSplit, accuracy: float
) -> tuple[Verdict | None, dict[str, float]]:
    if not split.held_out:
        return None, {}
    train_texts = usable_pairs(path)
    validation = given_files(config, config.preference_val_data)
    held_texts = train_texts if validation is None else usable_pairs(validation)
    margins = bag_of_words(
        [held_texts[record] for record in split.held_out],
        [train_texts[record] for record in split.train[:_BASELINE_PAIRS]],
        seed=config.seed,
    )
    lengths = np.array([split.validation.answer_lengths(record) for record in split.held_out])
    by_words, longer = float(win_indicator(margins, 0.0).mean()), float(win_indicator(*lengths.T).mean())
    return (
        verdict(accuracy, len(split.held_out), bag_of_words=by_words, longer=longer),
        {"eval/baseline/bag_of_words": by_words, "eval/baseline/longer": longer},
    )
