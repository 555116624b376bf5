"""Evaluation of a reward model on preference pairs: accuracy, calibration, length bias and simple baselines."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf.data.collate import pair_batches
from rlhf.data.dataset import Dataset
from rlhf.distributed.compute_context import ComputeContext
from rlhf.errors import UserError
from rlhf.evaluate.baselines import bag_of_words
from rlhf.evaluate.estimates import (
    Array,
    Estimate,
    difference,
    figures,
    grouped_correlation,
    linearised,
    mean,
    win_indicator,
)
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation_inputs import TestData, open_data, usable_pairs
from rlhf.evaluate.evaluation_result import Evaluation, plain
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program
from rlhf.io.model_folder import load_reward_model
from rlhf.models.architecture import ModelShape
from rlhf.models.scoring import make_pair_scores
from rlhf.statistics import reliability

_BINS = 10
_LENGTH_BINS = 5
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Pairs(NamedTuple):
    """Preference pairs and their scores; the columns of [n, 2] are chosen and rejected."""

    texts: list[dict[str, str]]
    scores: Array
    """[n, 2] reward units: score of each completion."""
    lengths: Array
    """[n, 2] tokens of the completions, before truncation."""

    @property
    def margins(self) -> Array:
        """[n] reward units: score of the chosen minus score of the rejected completion."""
        return self.scores[:, 0] - self.scores[:, 1]


def evaluate_reward(
    config: EvaluateConfig, context: ComputeContext, folder: Path, data: TestData, train: TestData | None
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Return accuracy, margins, calibration, length bias and baselines; their samples are the pairs.

    Args:
        config: settings of the evaluation.
        context: device, threads and workers.
        folder: folder of the reward model.
        data: preference pairs.
        train: pairs that the bag of words learns from; None cross-validates on `data`.

    Returns:
        The evaluation, and each pair with its scores.

    Raises:
        UserError: the model or the data cannot be used.
    """
    model = load_reward_model(folder)
    context.note_all(model.notes)
    dataset, records = open_data(data, model.tokenizer, config)
    max_length, texts = model.config.n_positions, usable_pairs(data.path)
    equal = set(dataset.equal_pairs(max_length))
    distinct = [record for record in records if record not in equal]
    if not distinct:
        raise UserError(
            f"{data.path}: after truncation to {max_length} tokens the chosen text equals the rejected one in every "
            "pair; nothing is left to evaluate"
        )
    equal_count, records = len(records) - len(distinct), distinct
    with context.open_executor(
        functools.partial(make_reward_measures, model.config, context.dtype), ModelState(model.params, {})
    ) as executor:
        scores, lengths = _score(executor, dataset, records, max_length, config.micro_batch_size)
    pairs = Pairs([texts[record] for record in records], scores, lengths)
    train_pairs = None if train is None else _pair_texts(train)
    bag_margins = bag_of_words(pairs.texts, train_pairs, seed=config.seed)
    facts: dict[str, Any] = {
        "reliability": _reliability_curve(pairs.margins),
        "calibration_error_by_chance": calibration_error_by_chance(pairs.margins),
        "accuracy_by_length_difference": _by_length(pairs, config.seed),
        "margin_quantiles": {str(q): float(np.quantile(pairs.margins, q)) for q in _QUANTILES},
        "bag_of_words": _describe_training(train),
    }
    facts |= {"dropped": dataset.dropped, "equal": equal_count, "cut": dataset.count_cut(max_length, records)}
    columns = {"model": figures(_estimates(pairs, bag_margins), seed=config.seed)}
    evaluation = Evaluation("reward", {"model": folder}, data, "pairs", columns, facts)
    return evaluation, _lines(pairs, data)


def make_reward_measures(config: ModelShape, dtype: torch.dtype) -> Program:
    """Return the program: `scores` (`rlhf.models.scoring.make_pair_scores`)."""
    return Program({}, {"scores": make_pair_scores(config, dtype=dtype)}, {})


def _estimates(pairs: Pairs, bag_margins: Array) -> dict[str, Estimate]:
    margins, accuracy = pairs.margins, mean(win_indicator(*pairs.scores.T))
    longer, bag = mean(win_indicator(*pairs.lengths.T)), mean(win_indicator(bag_margins, 0.0))
    return {
        "eval/reward/accuracy": accuracy,
        "eval/reward/margin": mean(margins),
        "loss/reward": mean(np.logaddexp(0.0, -margins)),
        "eval/reward/mean": mean(pairs.scores.mean(axis=1)),
        "eval/reward/calibration_error": linearised(_calibration_error(margins), least=0.0),
        "eval/reward/length_correlation": grouped_correlation(pairs.scores, pairs.lengths),
        "eval/baseline/longer": longer,
        "eval/baseline/bag_of_words": bag,
        "eval/reward/gain_over_longer": difference(accuracy, longer),
        "eval/reward/gain_over_bag_of_words": difference(accuracy, bag),
    }


def _calibration_error(margins: Array) -> Estimate:
    """Return `rlhf.statistics.expected_calibration_error` as a function of sums: each bin's gap, and the count."""
    bin_number, confidence, correct = (values.numpy() for values in reliability(torch.from_numpy(margins), bins=_BINS))
    gaps = np.eye(_BINS)[bin_number] * (correct - confidence)[:, None]
    columns = np.concatenate([gaps, np.ones((len(margins), 1))], axis=1)
    return Estimate(columns, lambda sums: np.abs(sums[:-1]).sum(axis=0) / sums[-1])


def calibration_error_by_chance(margins: Array) -> float:
    """Return approximately the expected calibration error of a calibrated model with these confidences.

    A bin's gap is then normal around 0, its mean size sqrt(2 / pi) standard deviations: above 0, which the interval of
    the measured error does not take into account.
    """
    bin_number, confidence, _ = (values.numpy() for values in reliability(torch.from_numpy(margins), bins=_BINS))
    variances = np.bincount(bin_number, confidence * (1.0 - confidence))
    return float(np.sqrt(2.0 / np.pi * variances).sum() / len(margins))


def _reliability_curve(margins: Array) -> list[dict[str, Any]]:
    bin_number, confidence, correct = (values.numpy() for values in reliability(torch.from_numpy(margins), bins=_BINS))
    edges = np.linspace(0.5, 1.0, _BINS + 1)
    return [
        {
            "from": round(float(edges[b]), 6),
            "to": round(float(edges[b + 1]), 6),
            "confidence": float(confidence[bin_number == b].mean()),
            "accuracy": float(correct[bin_number == b].mean()),
            "n": int((bin_number == b).sum()),
        }
        for b in range(_BINS)
        if (bin_number == b).any()
    ]


def _by_length(pairs: Pairs, seed: int) -> list[dict[str, Any]]:
    """Return accuracy by the difference of lengths, chosen - rejected, in groups of about the same size."""
    longer = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, _LENGTH_BINS + 1)[1:-1], method="lower"))
    group, correct, rows = np.digitize(longer, edges, right=True), win_indicator(*pairs.scores.T), []
    for number in np.unique(group):
        inside = group == number
        figure = figures({"accuracy": mean(correct[inside])}, seed=seed)["accuracy"]
        rows.append({"from": int(longer[inside].min()), "to": int(longer[inside].max()), "accuracy": plain(figure)})
    return rows


def _score(
    executor: Executor, dataset: Dataset, records: Sequence[int], max_length: int, rows: int
) -> tuple[Array, Array]:
    """Return scores and completion lengths, [n, 2] each, in the order of the records."""
    packs = pair_batches(dataset, records, max_length=max_length, rows=rows)
    results = executor.map("scores", [pack.batch for pack in packs])
    order = np.argsort([record for pack in packs for record in pack.records], kind="stable")
    pairs = [torch.stack(result, dim=1)[pack.batch.mask] for result, pack in zip(results, packs, strict=True)]
    scores = torch.cat(pairs).double().numpy()[order]
    lengths = [dataset.answer_lengths(record) for record in records]
    return scores, np.array(lengths, dtype=np.float64)


def _describe_training(train: TestData | None) -> str:
    """Return the training data of the bag of words, in words for the user."""
    if train is None:
        return "5-fold cross-validation on these pairs"
    return f"training on {'' if train.records is None else 'the other pairs of '}{train.path}"


def _pair_texts(data: TestData) -> list[dict[str, str]]:
    texts = usable_pairs(data.path)
    return texts if data.records is None else [texts[record] for record in data.records]


def _lines(pairs: Pairs, data: TestData) -> list[dict[str, Any]]:
    """Return the lines of pairs.jsonl."""
    return [
        {name: text[name] for name in ("prompt", "chosen", "rejected")}
        | {"chosen_score": float(scores[0]), "rejected_score": float(scores[1]), "data": str(data.path)}
        for text, scores in zip(pairs.texts, pairs.scores, strict=True)
    ]
