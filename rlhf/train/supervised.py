"""Supervised training of SFT and reward models: shuffled epochs, and evaluation on held-out records."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.config import SupervisedConfig
from rlhf.data.collate import Prefetch
from rlhf.data.data_files import Source
from rlhf.data.dataset import Dataset
from rlhf.data.hold_out import hold_out
from rlhf.data.schema import Schema
from rlhf.errors import UserError
from rlhf.execution.executor import Executor
from rlhf.io.model_folder import LanguageModel
from rlhf.optim import Optimizer, adamw
from rlhf.random import Purpose, fold_in
from rlhf.schedules import Schedule
from rlhf.setting_rules import flag_of
from rlhf.train.context import Run
from rlhf.train.loop import train
from rlhf.train.observers import LoopState, Observers
from rlhf.train.resume import Identity
from rlhf.train.stage_inputs import ModelSpec, lr_at_step, make_schedule, open_dataset, record_order
from rlhf.types import Tree

_EVAL_RECORDS = 1024
"""Maximum number of held-out records that an evaluation reads."""

_COMPARED, _LONGEST = 10_000, 1_000_000
"""Training pairs that held-out pairs are compared with, and the tokens of a text that are compared."""


class DataSplit(NamedTuple):
    """Training records and held-out records."""

    dataset: Dataset
    train: list[int]
    """Indices of the training records in `dataset`."""
    validation: Dataset
    """Data set of the held-out records: the same data set, or that of the validation file."""
    held_out: list[int]
    """Indices of the held-out records in `validation`."""


def open_split(
    run: Run, path: Source, validation: Source | None, schema: Schema, settings: SupervisedConfig, model: LanguageModel
) -> DataSplit:
    """Open the data and hold out records: those of the validation file, or a random fraction, which is at least one.

    Args:
        run: run of the stage.
        path: training data.
        validation: validation data; None holds out a fraction of the training data.
        schema: kind of the records.
        settings: maximum length and held-out fraction.
        model: model that is trained, with its tokenizer.

    Raises:
        UserError: a file cannot be read, a record is invalid, or truncation makes every training pair equal.
    """
    max_length = length_limit(settings, model)
    dataset = held_out_data = open_dataset(run, path, schema, model.tokenizer, max_length)
    equal = equal_held_out = _equal_pairs(run, path, dataset, max_length)
    if validation is not None:
        held_out_data = open_dataset(run, validation, schema, model.tokenizer, max_length)
        equal_held_out = _equal_pairs(run, validation, held_out_data, max_length)
        train, held_out = list(range(len(dataset))), list(range(len(held_out_data)))
    else:
        train, held_out = hold_out(run.key(Purpose.SPLIT), len(dataset), settings.val_fraction)
    train = [record for record in train if record not in equal]
    held_out = [record for record in held_out if record not in equal_held_out]
    check_pairs_differ(path, len(train), max_length)
    split = DataSplit(dataset, train, held_out_data, held_out[:_EVAL_RECORDS])
    _note_shared(run, validation or path, split)
    if dataset.members > 1:
        _note_known_texts(run, validation or path, split)
    run.note(f"{len(split.train)} {schema.name}, {len(split.held_out)} held out")
    return split


def check_pairs_differ(path: Source, different: int, max_length: int) -> None:
    """Raise UserError if no pair is different after truncation; `different` is the number of such pairs."""
    if not different:
        raise UserError(
            f"{path}: after truncation to {max_length} tokens the chosen text equals the rejected one in every pair; "
            "nothing is left to learn from. Shorten the texts, or take a model with a longer context"
        )


def _equal_pairs(run: Run, path: Source, dataset: Dataset, max_length: int) -> set[int]:
    """Return the pairs that are equal after truncation, and note their number."""
    equal = set(dataset.equal_pairs(max_length))
    if equal:
        run.note(
            f"{path}: dropped {len(equal)} pairs whose chosen text equals the rejected one after truncation to "
            f"{max_length} tokens"
        )
    return equal


def _note_shared(run: Run, path: Source, split: DataSplit) -> None:
    """Note the number of held-out records that are also training records."""
    if shared := int(np.isin(split.validation.digests[split.held_out], split.dataset.digests[split.train]).sum()):
        run.note(
            f"{path}: {shared} of {len(split.held_out)} held-out records are also training records; what is measured "
            "on them says nothing about new text"
        )


def _note_known_texts(run: Run, path: Source, split: DataSplit) -> None:
    """Note that most held-out pairs are of texts from training pairs, as where every text is in many pairs."""
    trained: set[bytes] = set().union(*(_texts_of(split.dataset, record) for record in split.train[:_COMPARED]))
    known = sum(_texts_of(split.validation, record) <= trained for record in split.held_out)
    if known > len(split.held_out) / 2:
        run.note(
            f"{path}: both texts of {known} of {len(split.held_out)} held-out pairs are in training pairs too; what is "
            "measured on them says little about new texts. Hold pairs of other texts out: --preference-val-data FILE"
        )


def _texts_of(dataset: Dataset, record: int) -> set[bytes]:
    """Return a key of each of the record's sequences."""
    return {sequence.tokens.tobytes() for sequence in dataset.sequences(record, _LONGEST)}


def length_limit(settings: SupervisedConfig, model: LanguageModel | ModelSpec) -> int:
    """Return the maximum number of tokens of a record."""
    context = model.config.n_positions
    return min(settings.max_length or context, context)


class TrainPlan(NamedTuple):
    """Number of steps and learning-rate schedule of a supervised stage."""

    steps: int
    schedule: Schedule


def make_plan(settings: SupervisedConfig, records: int) -> TrainPlan:
    """Return the plan of `settings.epochs` passes over a number of records."""
    steps = max(1, math.ceil(settings.epochs * records / settings.batch_size))
    steps = min(steps, settings.max_steps or steps)
    return TrainPlan(steps, make_schedule(settings, steps))


def make_adamw(settings: Any, schedule: Schedule, lr_multiplier: Callable[[Tree], Tree] | None = None) -> Optimizer:
    """Return AdamW with the settings of a section."""
    return adamw(
        schedule,
        b1=settings.adam_b1,
        b2=settings.adam_b2,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        lr_multiplier=lr_multiplier,
    )


def train_supervised(
    run: Run,
    executor: Executor,
    settings: SupervisedConfig,
    plan: TrainPlan,
    split: DataSplit,
    *,
    batches: Callable[[Sequence[int], Any], list[Any]],
    evaluate: Callable[[], dict[str, float]],
    loss: str,
    identity: Identity,
) -> dict[str, float]:
    """Train for `plan.steps` steps and return the last evaluation.

    Args:
        run: run of the stage.
        executor: executor that holds the trained model.
        settings: batch size and evaluation interval.
        plan: number of steps and schedule, from `make_plan`.
        split: training and held-out records, from `open_split`.
        batches: function (records, key) -> micro-batches of one optimiser step.
        evaluate: function that returns metrics of the current parameters on held-out records.
        loss: name of the training loss.
        identity: values besides settings that a continuation must share, such as the digest of the data.
    """
    if 0 < settings.warmup_fraction * plan.steps < 1 and settings.warmup_fraction != type(settings)().warmup_fraction:
        flag = flag_of(f"{run.stage.section}.warmup_fraction", settings.warmup_fraction)
        run.note(f"{flag}: has no effect: it is less than one of the run's {plan.steps} steps")
    order_key, dropout_key = run.key(Purpose.ORDER), run.key(Purpose.DROPOUT)
    last_evaluation: dict[str, float] = {}
    prefetched: Prefetch[list[Any]] | None = None

    def micro_batches_at(step: int) -> list[Any]:
        order = record_order(order_key, len(split.train), step * settings.batch_size, settings.batch_size)
        return batches([split.train[index] for index in order], fold_in(dropout_key, step))

    def advance(step: int, state: LoopState, observers: Observers) -> tuple[dict[str, float], LoopState]:
        nonlocal prefetched
        start = time.perf_counter()
        prefetched = prefetched or Prefetch(map(micro_batches_at, range(step, plan.steps)))
        micro_batches = next(prefetched)
        metrics = executor.step("main", micro_batches, overlap=prefetched.prepare)
        tokens = sum(int((batch.rows.segments > 0).sum()) for batch in micro_batches)
        metrics |= {"lr": lr_at_step(plan.schedule, step), "perf/tokens_per_s": tokens / (time.perf_counter() - start)}
        if (step + 1) % settings.eval_every == 0 or step + 1 == plan.steps:
            evaluated = evaluate()
            last_evaluation.update(evaluated)
            metrics |= evaluated
        return metrics, state

    train(run, executor, total=plan.steps, state={}, identity=identity, advance=advance, loss=loss)
    return last_evaluation or evaluate()
