"""The work of rlhf-evaluate: find models and test data, evaluate them, and write the results."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import PipelineRun
from rlhf.data.data_files import as_data_files, content_digest, list_files
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema, check_renames
from rlhf.distributed.compute_context import ComputeContext, compute_threads, find_device, open_compute_context
from rlhf.errors import Interrupted, UserError
from rlhf.evaluate.evaluate_config import COLUMN_RULES, NO_POLICY_RULES, POLICY_RULES, EvaluateConfig
from rlhf.evaluate.evaluation_inputs import (
    Folders,
    TestData,
    classify_files,
    find_folders,
    run_config,
    unique_prompts,
)
from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.evaluate.evaluation_verdict import judge_evaluation
from rlhf.evaluate.held_out import held_out_data, mark_trained, training_pairs
from rlhf.evaluate.judges import Judge, open_judges
from rlhf.evaluate.policy_evaluation import evaluate_policy
from rlhf.evaluate.reward_evaluation import evaluate_reward
from rlhf.evaluate.sft_evaluation import evaluate_sft
from rlhf.io.output import check_output, remove_output, write_json, write_output
from rlhf.io.provenance import provenance_of
from rlhf.io.reward_sources import names_folder
from rlhf.io.user_log import log_user
from rlhf.setting_rules import COMPUTE_RULES, check_rules

FORMAT = 1
"""Version of the format of evaluation.json."""

_KINDS = ("sft", "reward", "policy")
_SCHEMAS: dict[str, Schema] = {"sft": DEMONSTRATIONS, "reward": PREFERENCES, "policy": PROMPTS}


class Report(NamedTuple):
    """Results of a run of rlhf-evaluate."""

    evaluations: list[Evaluation]
    skipped: dict[str, str]
    """Reasons for evaluations that were left out, by kind."""
    folder: Path
    """Folder of evaluation.json, completions.jsonl and pairs.jsonl."""


class _Plan(NamedTuple):
    """One evaluation, before it is made."""

    kind: str
    data: TestData


def run_evaluation(
    config: EvaluateConfig, spinner: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Report:
    """Evaluate, and write evaluation.json, completions.jsonl and pairs.jsonl.

    Args:
        config: settings of the evaluation.
        spinner: function that returns a context, which is open during each evaluation, to show that it is running.

    Raises:
        UserError: models, data, judges or settings cannot be used, or there is nothing to evaluate.
        NonFiniteError: a judge gives NaN or infinity.
        Interrupted: the user pressed Ctrl-C.
    """
    if config.output is not None and config.output.is_file():
        raise UserError(f"--output {config.output}: is a file, expected a folder")
    for line in check_rules(config, (*COMPUTE_RULES, *COLUMN_RULES)):
        log_user(line)
    folders = find_folders(config)
    run = run_config(config.model_dir)
    judges = open_judges(config.judge)
    given = [*config.test_data, *([config.train_data] if config.train_data else [])]
    check_renames([(as_data_files(data.path), data.schema) for data in classify_files(given, config.data.columns)])
    trained_on = folders.reward if _optimises(run, config.model_dir, folders.reward) else None
    plans, skipped = _plan(config, folders, run, judges)
    train = _train_data(config, run)
    folder = config.output or config.model_dir / "report"
    _check_files(config, folder, folders, plans, train)
    evaluations: list[Evaluation] = []
    lines: dict[str, list[dict[str, Any]]] = {"completions": [], "pairs": []}
    try:
        with open_compute_context(config) as context:
            for plan in plans:
                log_user(f"{plan.kind}: {plan.data.path}{_brackets(plan.data.origin)}")
                with spinner():
                    for evaluation, name, records in _evaluate(plan, config, context, folders, judges, run, train):
                        evaluations.append(evaluation._replace(verdict=judge_evaluation(evaluation, trained_on)))
                        lines[name] += records
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written", signal.SIGINT) from None
    report = Report(evaluations, skipped, folder)
    _write(config, report, lines)
    return report


def _optimises(run: PipelineRun | None, model_dir: Path, folder: Path | None) -> bool:
    """Return whether the policy of a run, whose output folder may have moved, was trained on a reward model."""
    if run is None or folder is None:
        return False
    reward_folder = run.output_dir / "reward"
    folder = reward_folder if folder == model_dir / "reward" else folder
    return any(names_folder(spec, folder) for spec in run.ppo.reward or (str(reward_folder),))


def _plan(
    config: EvaluateConfig, folders: Folders, run: PipelineRun | None, judges: list[Judge]
) -> tuple[list[_Plan], dict[str, str]]:
    """Return the evaluations to make, and the reasons for those left out, by kind.

    Raises:
        UserError: there is nothing to evaluate, or a setting has no effect.
    """
    if config.test_data:
        data = mark_trained(classify_files(config.test_data, config.data.columns), config.model_dir, run)
    elif run is not None:
        data = held_out_data(config.model_dir, run)
    else:
        raise UserError(f"--test-data: give files to evaluate on; {_why_no_run(config.model_dir)}")
    plans, skipped = [], {}
    for kind in _KINDS if config.eval_type == "all" else (config.eval_type,):
        usable = [test for test in data if test.schema is _SCHEMAS[kind]]
        if kind == "policy" and not usable:
            usable = [unique_prompts(test) for test in data]
        if reason := _missing(kind, config, folders, usable):
            skipped[kind] = reason
        else:
            plans += [_Plan(kind, test) for test in usable]
    if not plans:
        raise UserError("nothing to evaluate: " + "; ".join(f"{kind}: {reason}" for kind, reason in skipped.items()))
    _check_options(config, folders, judges, {plan.kind for plan in plans})
    return plans, skipped


def _missing(kind: str, config: EvaluateConfig, folders: Folders, usable: list[TestData]) -> str:
    """Return the reason why an evaluation cannot be made; empty where it can."""
    model = {"sft": folders.sft, "reward": folders.reward, "policy": folders.policy}[kind]
    single = (config.model_dir / "config.json").is_file()
    if model is None:
        model_kind = "reward model" if kind == "reward" else "language model"
        return f"{config.model_dir} is not a {model_kind}" if single else f"{config.model_dir} has no {kind}/"
    if not usable:
        return f"no {_SCHEMAS[kind].name} among the test data"
    problems = [data.problem for data in usable if data.problem]
    return f"{problems[0]}; give another file as --test-data" if problems else ""


def _check_options(config: EvaluateConfig, folders: Folders, judges: list[Judge], kinds: set[str]) -> None:
    """Refuse or report settings without effect."""
    for line in check_rules(config, POLICY_RULES if "policy" in kinds else NO_POLICY_RULES):
        log_user(line)
    if "policy" in kinds and folders.reward is not None and folders.reward.name in {judge.name for judge in judges}:
        name = folders.reward.name
        raise UserError(
            f"--judge: {name} is also the name of the reward model {folders.reward}; rename one, so that their figures "
            "can be told apart"
        )
    if "reward" not in kinds and config.train_data is not None:
        raise UserError("--train-data: a baseline of the reward evaluation learns from it, and there is none here")
    if folders.against is None and any(judge.pairwise for judge in judges):
        raise UserError("--judge: a pairwise judge needs a second model; give its folder as --against")


def _why_no_run(folder: Path) -> str:
    """Return the reason why there are no held-out records to take."""
    run = folder.absolute().parent
    if run_config(run) is not None:
        return f"{folder} is one model of a run, whose held-out records --model-dir {run} takes"
    return f"{folder} has no config.yaml of a run, whose held-out records could be taken"


def _train_data(config: EvaluateConfig, run: PipelineRun | None) -> TestData | None:
    """Return the pairs that the bag of words learns from; None is cross-validation."""
    if config.train_data is not None:
        (train,) = classify_files([config.train_data], config.data.columns)
        if train.schema is not PREFERENCES:
            raise UserError(f"--train-data {config.train_data}: has {train.schema.name}, expected preference pairs")
        return train
    return training_pairs(config.model_dir, run) if run is not None and not config.test_data else None


def _evaluate(
    plan: _Plan,
    config: EvaluateConfig,
    context: ComputeContext,
    folders: Folders,
    judges: list[Judge],
    run: PipelineRun | None,
    train: TestData | None,
) -> Iterator[tuple[Evaluation, str, list[dict[str, Any]]]]:
    """Yield each evaluation, with the name and the lines of the file that goes with it."""
    if plan.kind == "sft" and folders.sft is not None:
        yield evaluate_sft(config, context, folders.sft, plan.data), "pairs", []
    elif plan.kind == "reward" and folders.reward is not None:
        evaluation, lines = evaluate_reward(config, context, folders.reward, plan.data, train)
        yield evaluation, "pairs", lines
    else:
        evaluations, lines = evaluate_policy(config, context, folders, plan.data, judges, run)
        for number, evaluation in enumerate(evaluations):
            yield evaluation, "completions", lines if number == 0 else []


def _check_files(
    config: EvaluateConfig, folder: Path, folders: Folders, plans: list[_Plan], train: TestData | None
) -> None:
    """Refuse to replace the evaluation's inputs, or files that no evaluation has written."""
    models = [model for model in folders if model is not None]
    sources = [*(plan.data.path for plan in plans), *([train.path] if train else [])]
    inputs = [file for source in sources for file in list_files(source)]
    inputs += [file for model in models for file in model.iterdir()]
    kinds = {plan.kind for plan in plans}
    names = {"reward": "pairs.jsonl", "policy": "completions.jsonl"}
    for name in ("evaluation.json", *(names[kind] for kind in sorted(kinds & names.keys()))):
        check_output(folder / name, "--output", inputs=inputs, overwrite=config.overwrite)


def _write(config: EvaluateConfig, report: Report, lines: dict[str, list[dict[str, Any]]]) -> None:
    for name, records in lines.items():
        path = report.folder / f"{name}.jsonl"
        if records:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_output(path, text, "--output", overwrite=config.overwrite)
        else:
            remove_output(path)  # an earlier evaluation's, which would not belong to evaluation.json
    content = {
        "format": FORMAT,
        "model_dir": str(config.model_dir),
        "seed": config.seed,
        "threads": compute_threads(config),
        "precision": config.precision,
        "provenance": provenance_of(
            find_device(config.device),
            precision=config.precision,
            threads=compute_threads(config),
            compiled=None,
            digests={"data": {str(item.data.path): content_digest(item.data.path) for item in report.evaluations}},
        ),
        "evaluations": [evaluation.plain() for evaluation in report.evaluations],
        "skipped": report.skipped,
    }
    write_json(report.folder / "evaluation.json", content, "--output", overwrite=config.overwrite)


def _brackets(text: str) -> str:
    return f" ({text})" if text else ""
