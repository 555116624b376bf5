"""Evaluation of a policy's completions, alone and against another model on the same prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.config import PipelineRun
from rlhf.data.conversations import as_completion, as_text
from rlhf.data.schema import PROMPTS
from rlhf.distributed.compute_context import ComputeContext, open_compute_context
from rlhf.errors import UserError
from rlhf.evaluate.best_of_figures import best_of_figures
from rlhf.evaluate.comparison import (
    MeasuredCompletions,
    ModelSet,
    Sampling,
    load_models,
    open_models,
    prompt_tokens,
)
from rlhf.evaluate.estimates import (
    Array,
    Estimate,
    Figure,
    difference,
    figures,
    from_influence,
    mean,
    ratio,
    win_indicator,
)
from rlhf.evaluate.evaluate_config import Decoding, EvaluateConfig
from rlhf.evaluate.evaluation_inputs import Folders, TestData, open_data
from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.evaluate.judges import Judge, Preferences, prefer, score
from rlhf.generate.complete import default_length
from rlhf.statistics import diversity, token_repetition

_DISTINCT = (1, 2, 3)
_UNPAIRED = "eval/distinct_"
"""Prefix of figures of all texts together, whose differences have no meaningful interval."""


class ScoredCompletions(NamedTuple):
    """One model's completions and all scores of them."""

    completions: MeasuredCompletions
    scores: dict[str, Array]
    """[B] by figure name: eval/reward/<reward model>, eval/judge/<scorer>."""


class Comparison(NamedTuple):
    """Models and judges on the same prompts, with one way of decoding."""

    decoding: Decoding
    samples: int
    """Completions per prompt."""
    columns: list[dict[str, Any]]
    """Each completion's record of the prompt file."""
    sides: dict[str, ScoredCompletions]
    """Scored completions by role: the policy, and the model that it is compared with, if there is one."""
    preferences: dict[str, Preferences]
    """Preferences for the policy's completions over those of the other model, by pairwise judge."""
    cut: int
    """Prompts that lost their beginning."""
    best_of: tuple[int, ...] = ()
    """Numbers of completions of which best-of-n is estimated."""


def evaluate_policy(
    config: EvaluateConfig,
    context: ComputeContext,
    folders: Folders,
    data: TestData,
    judges: Sequence[Judge],
    run: PipelineRun | None,
) -> tuple[list[Evaluation], list[dict[str, Any]]]:
    """Evaluate a policy with each way of decoding; the samples of its figures are the prompts.

    Args:
        config: settings of the evaluation.
        context: device, threads and workers.
        folders: folders of the models.
        data: prompts, or records with prompts.
        judges: scorers and pairwise judges.
        run: run that trained the models, whose temperature and length apply where `config` has none.

    Returns:
        An evaluation for each way of decoding, and the lines of completions.jsonl.

    Raises:
        UserError: a model, the data or a judge cannot be used.
        NonFiniteError: a judge gives NaN or infinity.
    """
    assert folders.policy is not None, "there is something to evaluate"
    language_models = {"policy": folders.policy} | ({} if folders.against is None else {"against": folders.against})
    reward_models = {} if folders.reward is None else {folders.reward.name: folders.reward}
    if config.best_of and not reward_models:
        raise UserError("--best-of: the best is chosen by a reward model, and there is none; add --reward-model FOLDER")
    models = load_models(language_models, folders.reference, reward_models)
    sampling = _sampling(config, run, models.context_length)
    comparisons = compare_models(config, context, models, data, sampling, judges)
    evaluations = []
    for comparison in comparisons:
        facts = {
            "decoding": comparison.decoding,
            "samples_per_prompt": comparison.samples,
            "cut": comparison.cut,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
        }
        named = language_models | ({} if folders.reference is None else {"reference": folders.reference})
        evaluations.append(
            Evaluation("policy", named, data, "prompts", comparison_figures(comparison, seed=config.seed), facts)
        )
    return evaluations, [line for comparison in comparisons for line in _lines(comparison, data)]


def compare_folders(
    policy: Path, against: Path, prompts: Path, judges: Sequence[Judge], sampling: Sampling, config: EvaluateConfig
) -> list[Comparison]:
    """Compare two model folders by judges and by KL(policy || against), on their completions of the same prompts.

    Args:
        policy: model folder.
        against: model folder with the same vocabulary.
        prompts: data file with a column `prompt`; the others go to the judges.
        judges: scorers and pairwise judges.
        sampling: settings of the decoding.
        config: samples per prompt, micro-batches, and where to compute.

    Returns:
        A comparison for each way of decoding.

    Raises:
        UserError, NonFiniteError: the reasons are those of `evaluate_policy`.
    """
    models = load_models({"policy": policy, "against": against}, against, {})
    with open_compute_context(config) as context:
        return compare_models(config, context, models, TestData(prompts, PROMPTS, None, ""), sampling, judges)


def compare_models(
    config: EvaluateConfig,
    context: ComputeContext,
    models: ModelSet,
    data: TestData,
    sampling: Sampling,
    judges: Sequence[Judge],
) -> list[Comparison]:
    """Complete the prompts with every language model of `models`, and judge the completions.

    Raises:
        UserError, NonFiniteError: the reasons are those of `evaluate_policy`.
    """
    dataset, records = open_data(data, models.language_models["policy"].tokenizer, config)
    room = models.context_length - sampling.max_new_tokens
    tokens, cut = prompt_tokens(dataset, records, room), dataset.count_cut(room, records)
    comparisons = []
    with open_models(context, models, sampling) as complete_and_measure:
        for decoding in sampling.decodings:
            best_of = config.best_of if decoding == "sampled" else ()
            samples = max(config.samples, *best_of, 1) if decoding == "sampled" else 1
            columns = [dataset.columns(record) for record in records for _ in range(samples)]
            rows = {"rollout_rows": config.rollout_batch_size, "measure_rows": config.micro_batch_size}
            completions = {
                role: complete_and_measure(role, decoding, tokens, samples=samples, **rows)
                for role in models.language_models
            }
            comparisons.append(
                _judge(decoding, samples, columns, completions, judges)._replace(cut=cut, best_of=best_of)
            )
    return comparisons


def comparison_figures(comparison: Comparison, *, seed: int) -> dict[str, dict[str, Figure]]:
    """Return the figures of each side, of their difference, and of the wins; by column and name."""
    sides = {role: _estimates(side, comparison) for role, side in comparison.sides.items()}
    columns = {role: figures(estimates, seed=seed) for role, estimates in sides.items()}
    if "against" in sides:
        shared = [name for name in sides["policy"] if not name.startswith(_UNPAIRED)]
        differences = {name: difference(sides["policy"][name], sides["against"][name]) for name in shared}
        columns["difference"] = figures(differences, seed=seed)
        columns["wins"] = figures(_wins(comparison), seed=seed)
    return columns


def _judge(
    decoding: Decoding,
    samples: int,
    columns: list[dict[str, Any]],
    completions: Mapping[str, MeasuredCompletions],
    judges: Sequence[Judge],
) -> Comparison:
    prompts = [record["prompt"] for record in columns]
    sides = {}
    for role, measured in completions.items():
        scores = {f"eval/reward/{name}": rewards for name, rewards in measured.rewards.items()}
        for judge in judges:
            if not judge.pairwise:
                said = list(map(as_completion, prompts, measured.texts))
                scores[f"eval/judge/{judge.name}"] = score(judge, prompts, said, columns)
        sides[role] = ScoredCompletions(measured, scores)
    preferences = {}
    if "against" in completions:
        ours, theirs = (list(map(as_completion, prompts, completions[r].texts)) for r in ("policy", "against"))
        preferences = {j.name: prefer(j, prompts, ours, theirs, columns) for j in judges if j.pairwise}
    return Comparison(decoding, samples, columns, sides, preferences, 0)


def _estimates(side: ScoredCompletions, comparison: Comparison) -> dict[str, Estimate]:
    """Return one side's estimates; a prompt's completions are one sample, since they resemble one another."""
    completions, samples = side.completions, comparison.samples
    lengths = np.array([len(row) for row in completions.tokens], dtype=np.float64)

    def per_prompt(values: Array) -> Array:
        return values.reshape(-1, samples).mean(axis=1)

    estimates = {name: mean(per_prompt(values)) for name, values in side.scores.items()}
    for name, values in completions.kl.items():
        if name == "exact" or comparison.decoding == "sampled":  # the estimators are made for tokens that were drawn
            suffix = {"exact": "_exact", "k1": ""}.get(name, f"_{name}")
            estimates[f"eval/objective/kl{suffix}"] = mean(per_prompt(values))
    repeated = np.array([token_repetition(row) for row in completions.tokens])
    estimates |= {
        "eval/policy/entropy_avg": ratio(per_prompt(completions.entropy), per_prompt(lengths)),
        "eval/response_length/mean": mean(per_prompt(lengths)),
        "eval/ended": mean(per_prompt(completions.ended)),
        "eval/repeated_4": mean(per_prompt(repeated)),
    }
    tokens = completions.tokens
    groups = [tokens[start : start + samples] for start in range(0, len(tokens), samples)]
    estimates |= {f"eval/distinct_{n}": _distinct(groups, n) for n in _DISTINCT}
    return estimates | best_of_figures(side.scores, samples, comparison.best_of)


def _distinct(groups: Sequence[Sequence[Sequence[int]]], n: int) -> Estimate:
    """Return distinct-n of all completions, with the jackknife's interval, since drawing a text twice adds nothing."""
    distinct, totals, sole = diversity(groups, n=n)
    total = sum(totals)
    left = np.maximum(total - np.array(totals), 1)
    return from_influence(distinct / max(total, 1), (distinct - np.array(sole)) / left, least=0.0)


def _wins(comparison: Comparison) -> dict[str, Estimate]:
    """Return the policy's win rate (a tie counts half), wins, ties and losses, by every scorer and judge."""
    ours, theirs = comparison.sides["policy"].scores, comparison.sides["against"].scores
    outcomes = {name.removeprefix("eval/").split("/", 1)[1]: win_indicator(ours[name], theirs[name]) for name in ours}
    outcomes |= {name: preferences.outcome for name, preferences in comparison.preferences.items()}
    estimates = {}
    for name, outcome in outcomes.items():
        shares = {"win_rate": outcome, "wins": outcome > 0.5, "ties": outcome == 0.5, "losses": outcome < 0.5}
        for share, values in shares.items():
            estimates[f"eval/{share}/{name}"] = mean(
                np.asarray(values, float).reshape(-1, comparison.samples).mean(axis=1)
            )
    for name, preferences in comparison.preferences.items():
        first_place = (preferences.first + 1.0 - preferences.second) / 2
        estimates[f"eval/first_place/{name}"] = mean(first_place.reshape(-1, comparison.samples).mean(axis=1))
    return estimates


def _sampling(config: EvaluateConfig, run: PipelineRun | None, context: int) -> Sampling:
    ppo = None if run is None else run.ppo
    temperature = config.temperature or (ppo.temperature if ppo else 1.0)
    length = config.max_new_tokens or (ppo.max_new_tokens if ppo else None) or default_length(context)
    return Sampling(tuple(dict.fromkeys(config.decoding)), temperature, length, config.seed)


def _lines(comparison: Comparison, data: TestData) -> list[dict[str, Any]]:
    """Return the lines of completions.jsonl: both sides' completions of each prompt."""
    lines = []
    for number, record in enumerate(comparison.columns):
        line: dict[str, Any] = {"prompt": as_text(record["prompt"]), "decoding": comparison.decoding}
        line |= {"sample": number % comparison.samples}
        for role, (completions, scores) in comparison.sides.items():
            fields: dict[str, Any] = {
                "completion": completions.texts[number],
                "tokens": len(completions.tokens[number]),
                "ended": bool(completions.ended[number]),
            }
            if completions.kl:
                fields["kl"] = float(completions.kl["exact"][number])
            line[role] = fields | {name.removeprefix("eval/"): float(row[number]) for name, row in scores.items()}
        for name, preferences in comparison.preferences.items():
            line[f"judge/{name}"] = {
                "first": float(preferences.first[number]),
                "second": float(preferences.second[number]),
            }
        lines.append(line | {"data": str(data.path)})
    return lines
