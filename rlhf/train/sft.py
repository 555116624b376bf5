"""Supervised fine-tuning of a language model on demonstrations."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf.batches import TokenBatch
from rlhf.config import SFTConfig, SFTRun
from rlhf.data.collate import token_batches
from rlhf.data.data_files import Source
from rlhf.data.dataset import Dataset
from rlhf.data.encoding import chat_tokenizer
from rlhf.data.schema import DEMONSTRATIONS
from rlhf.errors import UserError
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.io.model_folder import LanguageModel, load_language_model, save_language_model
from rlhf.io.tokenizer import Tokenizer
from rlhf.losses import sft_loss
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.forward import packed_hidden_states
from rlhf.ops import gather_rows, is_argmax, masked_sum, mean_metrics, token_log_probs
from rlhf.random import Purpose
from rlhf.remat import chunk_size, in_chunks
from rlhf.stages import STAGES, StageProgram, StageResult
from rlhf.train.compile_policy import compile_folder, compile_obstacle
from rlhf.train.context import Run, open_run
from rlhf.train.demonstrations import demonstration_facts, fitted_context, unigram_baseline
from rlhf.train.observers import Observer
from rlhf.train.resume import digests_of
from rlhf.train.signals import StopRequest
from rlhf.train.stage_defaults import StartFacts, choose_learning_rate, choose_settings, start_facts
from rlhf.train.stage_inputs import (
    ModelSpec,
    check_conversations,
    check_data,
    check_dropout,
    check_validation,
    embedded_file,
    given_files,
    make_schedule,
    new_config,
    read_model_spec,
    train_tokenizer,
    with_template,
)
from rlhf.train.supervised import (
    length_limit,
    make_adamw,
    make_plan,
    open_split,
    train_supervised,
)
from rlhf.tree import tree_sum
from rlhf.types import FrozenParams, MetricSums, Params
from rlhf.verdicts import sft_verdict

_STAGE = STAGES["sft"]


def run_sft(config: SFTRun, observers: Sequence[Observer] = (), stop: StopRequest | None = None) -> StageResult:
    """Train on demonstrations and write OUTPUT_DIR/sft.

    Args:
        config: configuration of the run.
        observers: observers of the training.
        stop: request to stop the run.

    Raises:
        UserError, NonFiniteError, Interrupted, WorkersLostError: the reasons are those of `rlhf.train.loop.train`.
    """
    with open_run(config, _STAGE, observers, stop) as run:
        return _run(run, config)


def check_sft(config: SFTRun, models: Mapping[str, ModelSpec]) -> ModelSpec:
    """Return the spec of the model after checking settings and all data files, as `StageProgram.check`."""
    model_spec = _model_spec(config)
    path, validation = given_files(config, config.sft_data), given_files(config, config.sft_val_data)
    check_data(DEMONSTRATIONS, path, validation)
    check_conversations(config, (path, validation), DEMONSTRATIONS, model_spec.tokenizer)
    return model_spec


def _model_spec(config: SFTRun) -> ModelSpec:
    """Return the spec of the model, after the checks that need no data.

    Raises:
        UserError: the model to start from does not fit, the shape is impossible, or settings contradict each other.
    """
    compile_obstacle(config, _STAGE)
    check_validation(config.sft_data, config.sft_val_data, DEMONSTRATIONS)
    folder, tokenizer_path = config.sft.model_path, config.tokenizer.path
    tokenizer = None if tokenizer_path is None else Tokenizer.load(tokenizer_path)
    if folder is None:
        shape = new_config(config.model, tokenizer.vocab_size if tokenizer else 1)
        check_dropout(shape, config.sft.dropout, "--sft.dropout")
        return with_template(config, ModelSpec(shape, tokenizer, ""))
    start = with_template(config, read_model_spec(folder, config.model))
    check_dropout(start.config, config.sft.dropout, "--sft.dropout")
    if tokenizer is not None and start.tokenizer is not None and not tokenizer.same_vocabulary(start.tokenizer):
        raise UserError(
            f"{folder}: the model has another vocabulary than --tokenizer.path {tokenizer_path}; drop the flag"
        )
    return start


def _run(run: Run, config: SFTRun) -> StageResult:
    model, start_digest, path, facts = _start(run, config)
    config = choose_learning_rate(run, run.config, facts)
    settings, rows = config.sft, config.sft.micro_batch_size
    validation = given_files(config, config.sft_val_data)
    split = open_split(run, path, validation, DEMONSTRATIONS, settings, model)
    digests = digests_of(path, model.tokenizer, validation)
    plan, max_length = make_plan(settings, len(split.train)), length_limit(settings, model)

    def batches(
        source: Dataset, records: Sequence[int], key: Tensor, loss_on: Literal["completion", "all"] = "completion"
    ) -> list[TokenBatch]:
        return token_batches(source, records, max_length=max_length, rows=rows, loss_on=loss_on, key=key)

    tokens = plan.steps * settings.batch_size * split.dataset.mean_tokens(max_length)
    compile_to = compile_folder(run, model.params, tokens)
    executor = run.open_executor(
        functools.partial(make_sft_program, model.config, settings, plan.steps, run.dtype, compile_to),
        ModelState(model.params, {}),
    )
    model = model._replace(params={})  # the executor has its own, and memory matters
    held_out = batches(split.validation, split.held_out, run.key(Purpose.DROPOUT)) if split.held_out else []

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        means = mean_metrics(tree_sum(executor.map("measure", held_out)))
        loss = float(means["loss/sft"])
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/accuracy": float(means["sft/accuracy"]),
        }

    metrics = train_supervised(
        run,
        executor,
        settings,
        plan,
        split,
        batches=lambda records, key: batches(split.dataset, records, key, settings.loss_on),
        evaluate=evaluate,
        loss="loss/sft",
        identity=digests | {"model": start_digest},
    )
    verdict = None
    if held_out:
        unigram = unigram_baseline(split, model.config.vocab_size)
        metrics |= {"eval/baseline/unigram": unigram}
        verdict = sft_verdict(metrics["eval/perplexity"], unigram, len(split.held_out))
    if not run.is_saved:
        params = run.trained_params(executor, metrics.get("eval/loss", 0.0))
        facts = facts._replace(**demonstration_facts(path, split, max_length))
        manifest = run.manifest(digests, steps=plan.steps, metrics=metrics, **facts._asdict())
        save_language_model(run.model_folder, model._replace(params=params), facts=manifest)
    return StageResult(run.model_folder, metrics, verdict=run.conclude(verdict) if verdict else None)


def make_sft_objective(
    config: ModelShape,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
) -> Callable[[Params, FrozenParams, TokenBatch], tuple[Tensor, MetricSums]]:
    """Return a function (decoder, frozen, TokenBatch) -> `sft_loss` of the masked tokens, with `sft/accuracy_sum`.

    Args:
        config: shape of the model.
        dtype: dtype of forward and backward passes.
        dropout: dropout probability, in [0, 1).
        gradient_checkpointing: True recomputes the activations of each block in the backward pass.
    """
    decoder = architecture_of(config)

    def per_token(params: Params, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = decoder.logits(params, hidden, config=config, padded=True)
        return token_log_probs(logits, targets), is_argmax(logits.detach(), targets).float()

    def objective(params: Params, frozen: FrozenParams, batch: TokenBatch) -> tuple[Tensor, MetricSums]:
        params = decoder.cast_for_compute(params, dtype)
        hidden = packed_hidden_states(
            params,
            batch.rows,
            config,
            dropout_rate=dropout,
            key=batch.key,
            gradient_checkpointing=gradient_checkpointing,
        )
        log_probs, correct = in_chunks(per_token, chunk_size(config.vocab_size))(
            decoder.unembedding(params), gather_rows(hidden, batch.predictors), batch.targets
        )
        loss, metrics = sft_loss(log_probs, mask=batch.mask)
        return loss, metrics | {"sft/accuracy_sum": masked_sum(correct, batch.mask)}

    return objective


def make_sft_program(
    config: ModelShape, settings: SFTConfig, steps: int, dtype: torch.dtype, compile_to: Path | None = None
) -> Program:
    """Return the program of SFT: `main` steps, and `measure` for evaluation.

    Args:
        config: shape of the model.
        settings: settings of the sft section.
        steps: number of steps of the whole run, for the schedule.
        dtype: dtype of forward and backward passes.
        compile_to: folder of compiled code. None runs eagerly.
    """
    objective = make_sft_objective(
        config, dtype=dtype, dropout=settings.dropout, gradient_checkpointing=settings.gradient_checkpointing
    )
    measure = make_sft_objective(config, dtype=dtype)
    optimizer = make_adamw(settings, make_schedule(settings, steps))
    return Program(
        steps={"main": StepSpec(objective, optimizer, settings.max_grad_norm)},
        eval_fns={"measure": lambda params, frozen, batch: measure(params, frozen, batch)[1]},
        frozen_updates={},
        compile_to=compile_to,
    )


def _start(run: Run, config: SFTRun) -> tuple[LanguageModel, str, Source, StartFacts]:
    """Return the model that training starts from, the digest of its folder's weights, the data file and its facts.

    The digest is empty if the weights are random. Checks are made before the embedded example is written. The
    configuration of `run` gets the context of a new model.
    """
    model_spec, folder = _model_spec(config), config.sft.model_path
    if folder is not None:
        model = load_language_model(folder)
        for line in model.notes:
            run.note(line)
        model = model._replace(tokenizer=chat_tokenizer(model.tokenizer, config.data))
        path = given_files(config, config.sft_data) or embedded_file(run, "demonstrations")
        return model, model_spec.digest, path, start_facts(folder)
    path = given_files(config, config.sft_data) or embedded_file(run, "demonstrations")
    check_conversations(config, [given_files(config, config.sft_data)], DEMONSTRATIONS, model_spec.tokenizer)
    tokenizer = chat_tokenizer(model_spec.tokenizer or train_tokenizer(run, path, DEMONSTRATIONS), config.data)
    for line in tokenizer.notes:
        run.note(line)
    preset = new_config(config.model, tokenizer.vocab_size)
    context = fitted_context(config, path, tokenizer)
    if context > preset.n_positions:
        config = choose_settings(run, config, {"model.n_positions": context}, "the length of the records")
    shape = new_config(config.model, tokenizer.vocab_size)
    params = architecture_of(shape).init(shape, key=run.key(Purpose.INIT))
    size = f"{shape.n_layer} layers, {shape.n_embd} wide"
    run.note(f"new {shape.model_type}: {size}, vocabulary {shape.vocab_size}, context {shape.n_positions}")
    return LanguageModel(params, shape, tokenizer), model_spec.digest, path, StartFacts(pretrained=False)


PROGRAM = StageProgram(check_sft, run_sft)
