"""Direct preference optimisation: from preference pairs and an SFT model to an aligned policy, without a reward model.

The reference is the model that training starts from. Its log-probs are computed once, before the first step, and the
model itself is not kept. Metrics have TRL's names.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf.batches import CompletionPairBatch
from rlhf.config import DPORun
from rlhf.data.data_files import Source
from rlhf.data.dataset import Dataset
from rlhf.data.encoding import chat_tokenizer
from rlhf.data.preference_batches import PackedCompletionPairs, completion_pair_batches
from rlhf.data.schema import PREFERENCES
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Objective, Program, StepSpec
from rlhf.io.model_folder import load_language_model, save_language_model
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.forward import packed_hidden_states
from rlhf.ops import gather_rows, mean_metrics, token_log_probs
from rlhf.preference_losses import dpo_loss, ipo_loss
from rlhf.remat import chunk_size, in_chunks
from rlhf.stage_config import DPOConfig
from rlhf.stages import STAGES, StageProgram, StageResult
from rlhf.train.compile_policy import compile_folder, compile_obstacle
from rlhf.train.context import Run, open_run
from rlhf.train.observers import Observer
from rlhf.train.resume import digests_of
from rlhf.train.reward_verdict import judge_implicit_rewards
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
from rlhf.train.supervised import length_limit, make_adamw, make_plan, open_split, train_supervised
from rlhf.tree import tree_sum
from rlhf.types import FrozenParams, MetricSums, Params

_STAGE = STAGES["dpo"]


def run_dpo(config: DPORun, observers: Sequence[Observer] = (), stop: StopRequest | None = None) -> StageResult:
    """Train on preference pairs and write OUTPUT_DIR/policy.

    Args:
        config: configuration of the run.
        observers: observers of the training.
        stop: request to stop the run.

    Raises:
        UserError, NonFiniteError, Interrupted, WorkersLostError: the reasons are those of `rlhf.train.loop.train`.
    """
    with open_run(config, _STAGE, observers, stop) as run:
        return _run(run, config)


def check_dpo(config: DPORun, models: Mapping[str, ModelSpec]) -> ModelSpec:
    """Return the spec of the policy after checking settings and all data files, as `StageProgram.check`."""
    model_spec = _model_spec(config, models.get("sft"))
    path, validation = given_files(config, config.preference_data), given_files(config, config.preference_val_data)
    check_data(PREFERENCES, path, validation)
    check_conversations(config, (path, validation), PREFERENCES, model_spec.tokenizer)
    return model_spec


def _needs(config: DPORun) -> tuple[str, ...]:
    return () if config.dpo.model_path else ("sft",)


def _model_spec(config: DPORun, sft: ModelSpec | None = None) -> ModelSpec:
    """Return the spec of the model that training starts from, after the checks that need no data."""
    compile_obstacle(config, _STAGE)
    check_validation(config.preference_data, config.preference_val_data, PREFERENCES)
    return start_model_spec(config, config.dpo.model_path, "--dpo.model-path", sft)


def _run(run: Run, config: DPORun) -> StageResult:
    model_spec, folder = _model_spec(config), start_folder(config, config.dpo.model_path)
    facts, start = start_facts(folder), load_language_model(folder)
    start = start._replace(tokenizer=chat_tokenizer(start.tokenizer, config.data))
    config = choose_learning_rate(run, config, facts)
    settings = config.dpo
    for line in start.notes:
        run.note(line)
    max_length = length_limit(settings, start)
    path: Source = given_files(config, config.preference_data) or embedded_file(run, "preferences")
    validation = given_files(config, config.preference_val_data)
    split = open_split(run, path, validation, PREFERENCES, settings, start)
    digests = digests_of(path, start.tokenizer, validation)
    run.note(f"policy and reference from {folder}")
    plan = make_plan(settings, len(split.train))
    tokens = plan.steps * settings.batch_size * split.dataset.mean_tokens(max_length)
    compile_to = compile_folder(run, start.params, tokens)
    executor = run.open_executor(
        functools.partial(make_dpo_program, start.config, settings, plan.steps, run.dtype, compile_to),
        ModelState(start.params, {}),
    )
    start = start._replace(params={})  # the executor has its own, and memory matters
    pack = functools.partial(completion_pair_batches, max_length=max_length, rows=settings.micro_batch_size)
    # before a checkpoint is restored, the parameters are those of the reference
    train_ref = reference_log_probs(executor, split.dataset, pack(split.dataset, split.train))
    held_out_packs = pack(split.validation, split.held_out)
    held_out_ref = reference_log_probs(executor, split.validation, held_out_packs)
    held_out = pack(split.validation, split.held_out, ref_log_probs=held_out_ref)

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        means = mean_metrics(tree_sum(executor.map("measure", [packed.batch for packed in held_out])))
        return {f"eval/{name}": float(mean) for name, mean in means.items()}

    metrics = train_supervised(
        run,
        executor,
        settings,
        plan,
        split,
        batches=lambda records, key: [p.batch for p in pack(split.dataset, records, ref_log_probs=train_ref)],
        evaluate=evaluate,
        loss="loss/ipo" if settings.loss == "ipo" else "loss/dpo",
        identity=digests | {"model": model_spec.digest},
    )
    verdict, baselines = judge_implicit_rewards(config, path, split, metrics)
    metrics |= baselines
    if not run.is_saved:
        params = run.trained_params(executor)
        manifest = run.manifest(digests, steps=plan.steps, metrics=metrics, **facts._asdict())
        save_language_model(run.model_folder, start._replace(params=params), facts=manifest)
    return StageResult(run.model_folder, metrics, verdict=verdict and run.conclude(verdict))


def reference_log_probs(executor: Executor, dataset: Dataset, packs: Sequence[PackedCompletionPairs]) -> Tensor:
    """Return the log-probs of packed chosen and rejected completions, [len(dataset), 2] float32, nats; 0 for others.

    Args:
        executor: executor of `make_dpo_program`, whose parameters are the reference.
        dataset: preference pairs.
        packs: micro-batches of the pairs to compute.
    """
    found = torch.zeros(len(dataset), 2)
    for packed, result in zip(packs, executor.map("log_probs", [packed.batch for packed in packs]), strict=True):
        found[packed.records] = torch.stack(result, dim=1)[: len(packed.records)]
    return found


def make_completion_log_probs(
    config: ModelShape, *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False
) -> Callable[[Params, CompletionPairBatch], tuple[Tensor, Tensor]]:
    """Return a function (decoder, CompletionPairBatch) -> log-probs [B] of chosen and rejected completions, in nats.

    Args:
        config: shape of the model.
        dtype: dtype of forward and backward passes.
        gradient_checkpointing: True recomputes the activations of each block in the backward pass.
    """
    decoder = architecture_of(config)

    def per_token(params: Params, hidden: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (token_log_probs(decoder.logits(params, hidden, config=config, padded=True), targets),)

    def log_probs(params: Params, batch: CompletionPairBatch) -> tuple[Tensor, Tensor]:
        params = decoder.cast_for_compute(params, dtype)
        hidden = packed_hidden_states(params, batch.rows, config, gradient_checkpointing=gradient_checkpointing)
        (tokens,) = in_chunks(per_token, chunk_size(config.vocab_size))(
            decoder.unembedding(params), gather_rows(hidden, batch.predictors), batch.targets
        )
        sequences = torch.arange(2 * len(batch.mask), device=tokens.device).unsqueeze(1)
        sums = torch.where(batch.sequences == sequences, tokens, 0.0).sum(dim=1)  # in a fixed order, unlike a scatter
        return sums[0::2], sums[1::2]

    return log_probs


def make_dpo_objective(
    config: ModelShape,
    settings: DPOConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> Objective:
    """Return a function (decoder, frozen, CompletionPairBatch) -> `dpo_loss` or `ipo_loss` of the pairs.

    Args:
        config: shape of the model.
        settings: settings of the dpo section.
        dtype: dtype of forward and backward passes.
    """
    log_probs = make_completion_log_probs(config, dtype=dtype, gradient_checkpointing=settings.gradient_checkpointing)

    def objective(params: Params, frozen: FrozenParams, batch: CompletionPairBatch) -> tuple[Tensor, MetricSums]:
        chosen, rejected = log_probs(params, batch)
        chosen, rejected = chosen - batch.ref_chosen, rejected - batch.ref_rejected
        if settings.loss == "ipo":
            return ipo_loss(chosen, rejected_log_ratios=rejected, mask=batch.mask, beta=settings.beta)
        smoothing = settings.label_smoothing
        return dpo_loss(
            chosen, rejected_log_ratios=rejected, mask=batch.mask, beta=settings.beta, label_smoothing=smoothing
        )

    return objective


def make_dpo_program(
    config: ModelShape, settings: DPOConfig, steps: int, dtype: torch.dtype, compile_to: Path | None = None
) -> Program:
    """Return the program of DPO: `main` steps, `log_probs` of pairs, and `measure` for evaluation.

    Args:
        config: shape of the model.
        settings: settings of the dpo section.
        steps: number of steps of the whole run, for the schedule.
        dtype: dtype of forward and backward passes.
        compile_to: folder of compiled code. None runs eagerly.
    """
    objective = make_dpo_objective(config, settings, dtype=dtype)
    log_probs = make_completion_log_probs(config, dtype=dtype)
    optimizer = make_adamw(settings, make_schedule(settings, steps))
    return Program(
        steps={"main": StepSpec(objective, optimizer, settings.max_grad_norm)},
        eval_fns={
            "log_probs": lambda params, frozen, batch: log_probs(params, batch),
            "measure": lambda params, frozen, batch: objective(params, frozen, batch)[1],
        },
        frozen_updates={},
        compile_to=compile_to,
    )


PROGRAM = StageProgram(check_dpo, run_dpo, _needs)
