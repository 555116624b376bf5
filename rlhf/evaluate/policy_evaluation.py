"""How well a policy completes prompts, alone and against another model on the same prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.config import PipelineRun
from rlhf.data.schema import PROMPTS
from rlhf.distributed.compute_context import ComputeContext, open_compute_context
from rlhf.evaluate.comparison import Answers, ModelSet, Sampling, load_panel, open_panel, prompt_tokens
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
"""A figure of all texts together, of which differences have no interval worth giving."""


class ScoredCompletions(NamedTuple):
    """One model's answers and all scores of them."""

    answers: Answers
    scores: dict[str, Array]
    """[B] by figure name: eval/reward/<reward model>, eval/judge/<scorer>."""


class Comparison(NamedTuple):
    """What came of one way of decoding."""

    decoding: Decoding
    samples: int
    """Completions per prompt."""
    columns: list[dict[str, Any]]
    """Each completion's record of the prompt file."""
    sides: dict[str, ScoredCompletions]
    """By part: the policy, then the model that it is compared with, if any."""
    preferences: dict[str, Preferences]
    """By pairwise judge: of the policy's completions over the other's."""
    cut: int
    """Prompts that lost their beginning."""


def evaluate_policy(
    config: EvaluateConfig,
    place: ComputeContext,
    folders: Folders,
    data: TestData,
    judges: Sequence[Judge],
    run: PipelineRun | None,
) -> tuple[list[Evaluation], list[dict[str, Any]]]:
    """Complete the prompts in every way asked for; prompts are what is resampled.

    Args:
        config: settings.
        place: where to compute.
        folders: the models.
        data: prompts, or records that have some.
        judges: scorers and pairwise judges.
        run: the run that trained the models, whose temperature and length are taken where `config` has none.

    Returns:
        An evaluation for each way of decoding, and the lines of completions.jsonl.

    Raises:
        UserError: a model, the data or a judge cannot be used.
        NonFiniteError: a judge gives NaN or infinity.
    """
    assert folders.policy is not None, "there is something to evaluate"
    writers = {"policy": folders.policy} | ({} if folders.against is None else {"against": folders.against})
    reward_models = {} if folders.reward is None else {folders.reward.name: folders.reward}
    panel = load_panel(writers, folders.reference, reward_models)
    sampling = _sampling(config, run, panel.context)
    comparisons = compare_models(config, place, panel, data, sampling, judges)
    evaluations = []
    for comparison in comparisons:
        facts = {
            "decoding": comparison.decoding,
            "samples_per_prompt": comparison.samples,
            "cut": comparison.cut,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
        }
        named = writers | ({} if folders.reference is None else {"reference": folders.reference})
        evaluations.append(
            Evaluation("policy", named, data, "prompts", contest_figures(comparison, seed=config.seed), facts)
        )
    return evaluations, [line for comparison in comparisons for line in _lines(comparison, data)]


def compare(
    policy: Path, against: Path, prompts: Path, judges: Sequence[Judge], sampling: Sampling, config: EvaluateConfig
) -> list[Comparison]:
    """Let two models complete the same prompts and judges compare them; KL(policy || against) is measured too.

    Args:
        policy: model folder.
        against: model folder with the same vocabulary.
        prompts: data file with a column `prompt`; the others go to the judges.
        judges: scorers and pairwise judges.
        sampling: how completions are made.
        config: samples per prompt, micro-batches, and where to compute.

    Returns:
        A contest for each way of decoding.

    Raises:
        UserError, NonFiniteError: as `evaluate_policy`.
    """
    panel = load_panel({"policy": policy, "against": against}, against, {})
    with open_compute_context(config) as place:
        return compare_models(config, place, panel, TestData(prompts, PROMPTS, None, ""), sampling, judges)


def compare_models(
    config: EvaluateConfig,
    place: ComputeContext,
    panel: ModelSet,
    data: TestData,
    sampling: Sampling,
    judges: Sequence[Judge],
) -> list[Comparison]:
    """Let every writer complete the prompts, and let everybody judge; arguments and errors as `evaluate_policy`."""
    dataset, records = open_data(data, panel.writers["policy"].tokenizer, config)
    room = panel.context - sampling.max_new_tokens
    tokens, cut = prompt_tokens(dataset, records, room), dataset.count_cut(room, records)
    comparisons = []
    with open_panel(place, panel, sampling) as answer:
        for decoding in sampling.decodings:
            samples = config.samples if decoding == "sampled" else 1
            columns = [dataset.columns(record) for record in records for _ in range(samples)]
            rows = {"rollout_rows": config.rollout_batch_size, "measure_rows": config.micro_batch_size}
            answers = {part: answer(part, decoding, tokens, samples=samples, **rows) for part in panel.writers}
            comparisons.append(_judge(decoding, samples, columns, answers, judges)._replace(cut=cut))
    return comparisons


def contest_figures(comparison: Comparison, *, seed: int) -> dict[str, dict[str, Figure]]:
    """Figures of each side, and of their difference with the win rates."""
    sides = {part: _estimates(judged, comparison) for part, judged in comparison.sides.items()}
    found = {part: figures(estimates, seed=seed) for part, estimates in sides.items()}
    if "against" in sides:
        shared = [name for name in sides["policy"] if not name.startswith(_UNPAIRED)]
        differences = {name: difference(sides["policy"][name], sides["against"][name]) for name in shared}
        found["difference"] = figures(differences, seed=seed)
        found["wins"] = figures(_wins(comparison), seed=seed)
    return found


def _judge(
    decoding: Decoding,
    samples: int,
    columns: list[dict[str, Any]],
    answers: Mapping[str, Answers],
    judges: Sequence[Judge],
) -> Comparison:
    prompts = [record["prompt"] for record in columns]
    sides = {}
    for part, own in answers.items():
        scores = {f"eval/reward/{name}": rewards for name, rewards in own.rewards.items()}
        for judge in judges:
            if not judge.pairwise:
                scores[f"eval/judge/{judge.name}"] = score(judge, prompts, own.texts, columns)
        sides[part] = ScoredCompletions(own, scores)
    preferences = {}
    if "against" in answers:
        ours, theirs = answers["policy"].texts, answers["against"].texts
        preferences = {j.name: prefer(j, prompts, ours, theirs, columns) for j in judges if j.pairwise}
    return Comparison(decoding, samples, columns, sides, preferences, 0)


def _estimates(judged: ScoredCompletions, comparison: Comparison) -> dict[str, Estimate]:
    """Figures of one side; a prompt's samples are one sample of the figure, since they resemble one another."""
    own, samples = judged.answers, comparison.samples
    lengths = np.array([len(row) for row in own.tokens], dtype=np.float64)

    def per_prompt(values: Array) -> Array:
        return values.reshape(-1, samples).mean(axis=1)

    estimates = {name: mean(per_prompt(values)) for name, values in judged.scores.items()}
    for name, values in own.kl.items():
        if name == "exact" or comparison.decoding == "sampled":  # the estimators are made for tokens that were drawn
            suffix = {"exact": "_exact", "k1": ""}.get(name, f"_{name}")
            estimates[f"eval/objective/kl{suffix}"] = mean(per_prompt(values))
    repeated = np.array([token_repetition(row) for row in own.tokens])
    estimates |= {
        "eval/policy/entropy_avg": ratio(per_prompt(own.entropy), per_prompt(lengths)),
        "eval/response_length/mean": mean(per_prompt(lengths)),
        "eval/ended": mean(per_prompt(own.ended)),
        "eval/repeated_4": mean(per_prompt(repeated)),
    }
    groups = [own.tokens[start : start + samples] for start in range(0, len(own.tokens), samples)]
    return estimates | {f"eval/distinct_{n}": _distinct(groups, n) for n in _DISTINCT}


def _distinct(groups: Sequence[Sequence[Sequence[int]]], n: int) -> Estimate:
    """Distinct-n of all completions; its interval is that of the jackknife, since drawing a text twice adds nothing."""
    distinct, totals, sole = diversity(groups, n=n)
    total = sum(totals)
    left = np.maximum(total - np.array(totals), 1)
    return from_influence(distinct / max(total, 1), (distinct - np.array(sole)) / left, least=0.0)


def _wins(comparison: Comparison) -> dict[str, Estimate]:
    """Win rate (a tie counts half), wins, ties and losses of the policy, by every scorer and judge."""
    ours, theirs = comparison.sides["policy"].scores, comparison.sides["against"].scores
    found = {name.removeprefix("eval/").split("/", 1)[1]: win_indicator(ours[name], theirs[name]) for name in ours}
    found |= {name: preferences.outcome for name, preferences in comparison.preferences.items()}
    estimates = {}
    for name, outcome in found.items():
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
    length = config.max_new_tokens or (ppo.max_new_tokens if ppo else default_length(context))
    return Sampling(tuple(dict.fromkeys(config.decoding)), temperature, length, config.seed)


def _lines(comparison: Comparison, data: TestData) -> list[dict[str, Any]]:
    """Lines of completions.jsonl: what each side wrote, side by side."""
    lines = []
    for number, record in enumerate(comparison.columns):
        line: dict[str, Any] = {"prompt": record["prompt"], "decoding": comparison.decoding}
        line |= {"sample": number % comparison.samples}
        for part, (own, scores) in comparison.sides.items():
            figure: dict[str, Any] = {"completion": own.texts[number], "tokens": len(own.tokens[number])}
            figure |= {"ended": bool(own.ended[number])}
            figure |= {"kl": float(own.kl["exact"][number])} if own.kl else {}
            line[part] = figure | {name.removeprefix("eval/"): float(of[number]) for name, of in scores.items()}
        for name, preferences in comparison.preferences.items():
            line[f"judge/{name}"] = {
                "first": float(preferences.first[number]),
                "second": float(preferences.second[number]),
            }
        lines.append(line | {"data": str(data.path)})
    return lines
