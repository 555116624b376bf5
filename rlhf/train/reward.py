"""Training of the reward model on preference pairs, and the statistics of its scores."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.batches import PairBatch
from rlhf.config import RewardConfig, RewardRun
from rlhf.data.collate import PackedPairs, pair_batches
from rlhf.data.data_files import Source
from rlhf.data.dataset import Dataset, load_dataset
from rlhf.data.encoding import chat_tokenizer
from rlhf.data.schema import PREFERENCES
from rlhf.errors import UserError
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.io.model_folder import RewardModel, RewardStatistics, load_trunk, save_reward_model
from rlhf.losses import reward_loss
from rlhf.models.architecture import ModelShape
from rlhf.models.forward import trunk_states
from rlhf.models.heads import apply_head, init_reward_head
from rlhf.models.scoring import make_pair_scores
from rlhf.ops import gather_rows
from rlhf.random import Purpose
from rlhf.stages import STAGES, StageProgram, StageResult
from rlhf.statistics import preference_metrics, spread
from rlhf.train.compile_policy import compile_folder, compile_obstacle
from rlhf.train.context import Run, open_run
from rlhf.train.observers import Observer
from rlhf.train.resume import digests_of
from rlhf.train.reward_verdict import judge_reward_model
from rlhf.train.signals import StopRequest
from rlhf.train.stage_defaults import choose_learning_rate, start_facts
from rlhf.train.stage_inputs import (
    ModelSpec,
    check_conversations,
    check_data,
    check_validation,
    embedded_file,
    given_files,
    make_schedule,
    start_folder,
    start_model_spec,
)
from rlhf.train.supervised import (
    check_pairs_differ,
    length_limit,
    make_adamw,
    make_plan,
    open_split,
    train_supervised,
)
from rlhf.types import FrozenParams, MetricSums, Params

_REFERENCE_PAIRS = 1024
"""Number of training pairs whose chosen completions give the mean and standard deviation of the reward."""

_STAGE = STAGES["reward"]


def run_reward(config: RewardRun, observers: Sequence[Observer] = (), stop: StopRequest | None = None) -> StageResult:
    """Train on preference pairs and write OUTPUT_DIR/reward, or its members into OUTPUT_DIR/reward/0 and so on.

    Args:
        config: configuration of the run.
        observers: observers of the training.
        stop: request to stop the run.

    Raises:
        UserError, NonFiniteError, Interrupted, WorkersLostError: the reasons are those of `rlhf.train.loop.train`.
    """
    if config.reward.members == 1:
        with open_run(config, _STAGE, observers, stop) as run:
            return _run(run, config)
    metrics: dict[str, list[float]] = {}
    for number in range(config.reward.members):
        with open_run(config, _STAGE.with_member(number), observers, stop) as run:
            for name, value in _run(run, config).metrics.items():
                metrics.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in metrics.items()}
    return StageResult(config.output_dir / _STAGE.folder, means)


def check_reward(config: RewardRun, models: Mapping[str, ModelSpec]) -> ModelSpec:
    """Return the spec of the model after checking settings and all data files, as `StageProgram.check`."""
    model_spec = _model_spec(config, models.get("sft"))
    path, validation = given_files(config, config.preference_data), given_files(config, config.preference_val_data)
    _check_margin(config, check_data(PREFERENCES, path, validation))
    check_conversations(config, (path, validation), PREFERENCES, model_spec.tokenizer)
    _check_pairs(config, model_spec)
    return model_spec


def _needs(config: RewardRun) -> tuple[str, ...]:
    return () if config.reward.model_path else ("sft",)


def _model_spec(config: RewardRun, sft: ModelSpec | None = None) -> ModelSpec:
    """Return the spec of the model that training starts from, after the checks that need no data.

    Args:
        config: configuration of the stage.
        sft: spec of the future OUTPUT_DIR/sft, if it is trained first.

    Raises:
        UserError: the model is missing or does not fit, or settings contradict each other.
    """
    compile_obstacle(config, _STAGE)
    check_validation(config.preference_data, config.preference_val_data, PREFERENCES)
    return start_model_spec(config, config.reward.model_path, "--reward.model-path", sft)


def _check_margin(config: RewardRun, keys: Collection[str]) -> None:
    """Raise UserError if margins are requested but are not among the keys of the training pairs."""
    if config.reward.use_margin and "margin" not in keys:
        where = given_files(config, config.preference_data) or "the embedded example"
        raise UserError(f"{where}: no pair has a 'margin'; add the column, or drop --reward.use-margin")


def _check_pairs(config: RewardRun, model_spec: ModelSpec) -> None:
    """Raise UserError if truncation makes all training pairs equal. Does nothing if the tokenizer is not trained yet.

    Args:
        config: configuration of the stage.
        model_spec: spec of the model that training starts from.
    """
    path = given_files(config, config.preference_data)
    if path is not None and model_spec.tokenizer is not None:
        dataset = load_dataset(path, PREFERENCES, model_spec.tokenizer, config.cache_dir)
        max_length = length_limit(config.reward, model_spec)
        different = len(dataset) - len(dataset.equal_pairs(max_length))
        check_pairs_differ(path, different, max_length)


def _run(run: Run, config: RewardRun) -> StageResult:
    model_spec, folder = _model_spec(config), start_folder(config, config.reward.model_path)
    facts, start = start_facts(folder), load_trunk(folder)
    start = start._replace(tokenizer=chat_tokenizer(start.tokenizer, config.data))
    config = choose_learning_rate(run, config, facts)
    settings = config.reward
    for line in start.notes:
        run.note(line)
    max_length = length_limit(settings, start)
    path: Source = given_files(config, config.preference_data) or embedded_file(run, "preferences")
    validation = given_files(config, config.preference_val_data)
    split = open_split(run, path, validation, PREFERENCES, settings, start)
    digests = digests_of(path, start.tokenizer, validation)
    _check_margin(config, split.dataset.keys)
    run.note(f"trunk from {folder}")
    plan = make_plan(settings, len(split.train))
    head = init_reward_head(start.config.n_embd, key=run.key(Purpose.HEAD))
    tokens = plan.steps * settings.batch_size * split.dataset.mean_tokens(max_length)
    compile_to = compile_folder(run, {"trunk": start.params, "head": head}, tokens)
    executor = run.open_executor(
        functools.partial(make_reward_program, start.config, settings, plan.steps, run.dtype, compile_to),
        ModelState({"trunk": start.params, "head": head}, {}),
    )
    start = start._replace(params={})  # the executor has its own, and memory matters

    def batches(source: Dataset, records: Sequence[int]) -> list[PackedPairs]:
        return pair_batches(
            source, records, max_length=max_length, rows=settings.micro_batch_size, margins=settings.use_margin
        )

    def measure(source: Dataset, records: Sequence[int], prefix: str) -> dict[str, float]:
        if not records:
            return {}
        packs = batches(source, records)
        chosen, rejected = _score(executor, packs)
        lengths = torch.tensor([source.answer_lengths(record) for pack in packs for record in pack.records])
        metrics = preference_metrics(chosen, rejected, lengths[:, 0], lengths[:, 1])
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    metrics = train_supervised(
        run,
        executor,
        settings,
        plan,
        split,
        batches=lambda records, key: [pack.batch for pack in batches(split.dataset, records)],
        evaluate=lambda: (
            measure(split.validation, split.held_out, "eval")
            | {"eval/reward/pairs": float(len(split.held_out))}
            | measure(split.dataset, split.train[: max(len(split.held_out), 2)], "train")
        ),
        loss="loss/reward",
        identity=digests | {"model": model_spec.digest},
    )
    verdict, baselines = judge_reward_model(config, path, split, metrics)
    metrics |= baselines
    if run.is_saved:
        return StageResult(run.model_folder, metrics, verdict=verdict and run.conclude(verdict))
    statistics = _statistics(run, *_score(executor, batches(split.dataset, split.train[:_REFERENCE_PAIRS])))
    run.note(
        f"reward of {statistics.completions} chosen completions: mean {statistics.mean:.3f}, std {statistics.std:.3f}"
    )
    params = run.trained_params(executor, statistics.mean, statistics.std)
    manifest = run.manifest(digests, steps=plan.steps, metrics=metrics, pretrained=facts.pretrained)
    model = RewardModel(params, start.config, start.tokenizer, statistics)
    save_reward_model(run.model_folder, model, facts=manifest)
    return StageResult(run.model_folder, metrics, verdict=verdict and run.conclude(verdict))


def _statistics(run: Run, chosen: Tensor, rejected: Tensor) -> RewardStatistics:
    """Return the statistics of the scores [B] of chosen completions, with a warning if they do not differ."""
    size = float(torch.cat([chosen, rejected]).double().square().mean().sqrt())
    measured = float(chosen.double().std()) if len(chosen) > 1 else 0.0
    std = spread(measured, size, run.dtype)
    if not std:
        run.note(
            f"WARNING: the scores of the {len(chosen)} chosen completions do not differ beyond rounding (standard "
            f"deviation {measured:.1e}), so PPO will not scale by it; are the chosen texts all the same?"
        )
    return RewardStatistics(float(chosen.double().mean()), std or 1.0, len(chosen))


def make_reward_objective(
    config: ModelShape,
    *,
    dtype: torch.dtype = torch.float32,
    centre_coef: float = 0.0,
    gradient_checkpointing: bool = False,
) -> Callable[[Params, FrozenParams, PairBatch], tuple[Tensor, MetricSums]]:
    """Return a function (reward model, frozen, PairBatch) -> the `reward_loss` of the pairs.

    Args:
        config: shape of the model.
        dtype: dtype of forward and backward passes.
        centre_coef: weight of the penalty on the sum of the two scores of a pair, at least 0.
        gradient_checkpointing: True recomputes the activations of each block in the backward pass.
    """

    def objective(params: Params, frozen: FrozenParams, batch: PairBatch) -> tuple[Tensor, MetricSums]:
        hidden = trunk_states(params["trunk"], batch.rows, config, dtype, gradient_checkpointing=gradient_checkpointing)
        chosen, rejected = (
            apply_head(params["head"], gather_rows(hidden, last)) for last in (batch.chosen, batch.rejected)
        )
        return reward_loss(
            chosen, rejected_scores=rejected, mask=batch.mask, margin=batch.margin, centre_coef=centre_coef
        )

    return objective


def make_reward_program(
    config: ModelShape, settings: RewardConfig, steps: int, dtype: torch.dtype, compile_to: Path | None = None
) -> Program:
    """Return the program of the reward model: `main` steps, and `scores` of pairs.

    Args:
        config: shape of the model.
        settings: settings of the reward section.
        steps: number of steps of the whole run, for the schedule.
        dtype: dtype of forward and backward passes.
        compile_to: folder of compiled code. None runs eagerly.
    """
    objective = make_reward_objective(
        config, dtype=dtype, centre_coef=settings.centre_coef, gradient_checkpointing=settings.gradient_checkpointing
    )
    optimizer = make_adamw(settings, make_schedule(settings, steps))
    return Program(
        steps={"main": StepSpec(objective, optimizer, settings.max_grad_norm)},
        eval_fns={"scores": make_pair_scores(config, dtype=dtype)},
        frozen_updates={},
        compile_to=compile_to,
    )


def _score(executor: Executor, packs: Sequence[PackedPairs]) -> tuple[Tensor, Tensor]:
    """Return the scores [B] of chosen and rejected completions, in the order of the packs."""
    results = executor.map("scores", [pack.batch for pack in packs])
    pairs = torch.cat([torch.stack(result)[:, pack.batch.mask] for result, pack in zip(results, packs, strict=True)], 1)
    return pairs[0], pairs[1]


PROGRAM = StageProgram(check_reward, run_reward, _needs)
