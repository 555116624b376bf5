"""The verdict on a reward model by two baselines: a bag of words, and the length of completions."""

from collections.abc import Mapping

import numpy as np

from rlhf.config import RewardRun
from rlhf.data.data_files import Source
from rlhf.evaluate.baselines import bag_of_words
from rlhf.evaluate.estimates import win_indicator
from rlhf.evaluate.evaluation_inputs import usable_pairs
from rlhf.train.stage_inputs import given_files
from rlhf.train.supervised import DataSplit
from rlhf.verdicts import Verdict, reward_verdict

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
    baselines = {
        "eval/baseline/bag_of_words": float(win_indicator(margins, 0.0).mean()),
        "eval/baseline/longer": float(win_indicator(*lengths.T).mean()),
    }
    verdict = reward_verdict(
        metrics["eval/reward/accuracy"],
        len(split.held_out),
        bag_of_words=baselines["eval/baseline/bag_of_words"],
        longer=baselines["eval/baseline/longer"],
    )
    return verdict, baselines
