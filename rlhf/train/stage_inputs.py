"""Resolving what a stage starts from: data files or the embedded example, tokenizers, models, record order."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.config import ModelConfig, OptimizerConfig, RunConfig
from rlhf.data.dataset import Dataset, check_file, load_dataset, texts
from rlhf.data.demo_data import PROMPT_COLUMNS, write_embedded
from rlhf.data.schema import PROMPTS, Schema
from rlhf.errors import UserError
from rlhf.io.files import check_folder
from rlhf.io.model_folder import load_shape, weights_digest
from rlhf.io.tokenizer import Tokenizer
from rlhf.models.architecture import ModelShape, get_architecture
from rlhf.random import fold_in, permutation
from rlhf.schedules import Schedule, constant_schedule, cosine_schedule, linear_schedule
from rlhf.stages import STAGES
from rlhf.train.context import Run

_SIZES = ("n_layer", "n_head", "n_embd", "n_positions")
"""Settings that are fields of shapes."""


class ModelSpec(NamedTuple):
    """What is known of a model before its parameters are read, or trained."""

    config: ModelShape
    """Of a model with a tokenizer that is yet to be trained, all but the vocabulary's size."""
    tokenizer: Tokenizer | None
    """None where it is yet to be trained."""
    digest: str
    """`weights_digest`; empty where there are no weights yet."""


def embedded_file(run: Run, name: str) -> Path:
    """One of the embedded example's files, written to OUTPUT_DIR/data; the user is told."""
    files = write_embedded(run.config.output_dir / "data")
    path = Path(files._asdict()[name])
    run.note(f"no data file given: using the embedded example, {path}")
    return path


def open_dataset(run: Run, path: Path, schema: Schema, tokenizer: Tokenizer, max_length: int) -> Dataset:
    """`load_dataset`, telling the user what is odd, what was dropped and what does not fit `max_length` tokens."""
    dataset = load_dataset(path, schema, tokenizer, run.config.cache_dir)
    for line in dataset.findings.describe(schema, len(dataset)):
        run.note(f"{path}: {line}")
    if dataset.dropped:
        run.note(f"{path}: dropped {dataset.dropped} pairs whose chosen text equals the rejected one")
    if cut := dataset.count_cut(max_length):
        what = "records are cut" if schema.answers else "prompts lose their beginning"
        run.note(f"{path}: {cut} of {len(dataset)} {what} to fit {max_length} tokens (see rlhf.data.truncate)")
    return dataset


def train_tokenizer(run: Run, path: Path, schema: Schema) -> Tokenizer:
    """A byte-level BPE trained on every text of a data file."""
    tokenizer = Tokenizer.train(texts(path, schema), run.config.tokenizer.vocab_size)
    run.note(f"trained a byte-level BPE of {tokenizer.vocab_size} entries on {path}")
    return tokenizer


def new_config(settings: ModelConfig, vocab_size: int) -> ModelShape:
    """The shape of a model trained from scratch.

    Raises:
        UserError: the shape is impossible.
    """
    try:
        family = get_architecture(settings.family)
    except ValueError as error:
        raise UserError(f"--model.family: {error}") from error
    if settings.preset not in family.presets:
        raise UserError(f"--model.preset {settings.preset}: {settings.family} has only {', '.join(family.presets)}")
    chosen = {name: getattr(settings, name) for name in _SIZES if getattr(settings, name) is not None}
    fields = {spec.name for spec in dataclasses.fields(family.shape)}
    if unknown := chosen.keys() - fields:
        raise UserError(f"model.{min(unknown)}: {settings.family} has no such size; leave it out")
    try:
        shape: ModelShape = dataclasses.replace(family.presets[settings.preset], vocab_size=vocab_size, **chosen)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    return shape


def read_model_spec(folder: Path, settings: ModelConfig) -> ModelSpec:
    """The language model that a stage is to start from, without its parameters.

    Raises:
        UserError: a file is missing or cannot be read, it is another kind of model, or a field set in `settings`
            contradicts it.
    """
    config, tokenizer = load_shape(folder)
    for name in _SIZES:
        wanted, got = getattr(settings, name), getattr(config, name, None)
        if wanted not in (None, got):
            flag = f"--model.{name.replace('_', '-')} (or the configuration file's)"
            raise UserError(
                f"{folder}: the model there has {name} {got}, but {flag} is {wanted}; drop it, or train anew"
            )
    return ModelSpec(config, tokenizer, weights_digest(folder))


def start_folder(config: RunConfig, model_path: Path | None) -> Path:
    """The SFT model that the reward model and PPO start from: the one that is named, or the run's."""
    return model_path or config.output_dir / STAGES["sft"].folder


def start_model_spec(config: RunConfig, model_path: Path | None, flag: str, sft: ModelSpec | None) -> ModelSpec:
    """What the reward model and PPO start from.

    Args:
        config: of the run.
        model_path: the model folder that the user names.
        flag: by which it is named.
        sft: what the run's own SFT model will be, where it is trained first.

    Raises:
        UserError: there is no such model, or it is not fit: see `read_model_spec`.
    """
    if model_path is None and sft is not None:
        return sft
    folder = start_folder(config, model_path)
    check_folder(folder, f"run `rlhf-train sft` first, or name a model folder: {flag} FOLDER")
    return read_model_spec(folder, config.model)


def check_validation(path: Path | None, validation: Path | None, schema: Schema) -> None:
    """Raise UserError if there is a validation file, but none to learn from: it would be the embedded example."""
    if validation is not None and path is None:
        raise UserError(f"{validation}: validates what is learnt from a file of {schema.name}; add {schema.flag} FILE")


def check_data(schema: Schema, path: Path | None, validation: Path | None = None) -> set[str]:
    """Read data files through; the keys of the records to learn from, which may be the embedded example's.

    Raises:
        UserError: a record is not valid.
    """
    if validation is not None:
        check_file(validation, schema)
    if path is not None:
        return check_file(path, schema)
    return set(PROMPT_COLUMNS if schema is PROMPTS else schema.keys)


def record_order(key: Tensor, count: int, first: int, number: int) -> list[int]:
    """Records first..first+number-1 of an endless sequence: one permutation of 0..count-1 after the other.

    Args:
        key: [2] int32; each epoch's permutation has a key derived from it.
        count: records in the data set.
        first: place in the sequence.
        number: records wanted.
    """
    records: list[int] = []
    while len(records) < number:
        epoch, place = divmod(first + len(records), count)
        order = permutation(fold_in(key, epoch), count)
        records += order[place : place + number - len(records)].tolist()
    return records


def make_schedule(settings: OptimizerConfig, total_steps: int) -> Schedule:
    """The learning-rate schedule over `total_steps` updates."""
    warmup = min(int(settings.warmup_fraction * total_steps), total_steps - 1)
    if settings.schedule == "constant":
        return constant_schedule(settings.learning_rate, warmup_steps=warmup)
    course = linear_schedule if settings.schedule == "linear" else cosine_schedule
    return course(settings.learning_rate, total_steps, warmup_steps=warmup)


def lr_at_step(schedule: Schedule, step: int) -> float:
    """The learning rate of update `step`."""
    return float(schedule(torch.tensor(step)))
