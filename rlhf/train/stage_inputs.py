"""Inputs of a stage: data files or the embedded example, tokenizers, models, order of records and schedule."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.config import DataPaths, ModelConfig, OptimizerConfig, RunConfig
from rlhf.data.chat_tokens import TEMPLATE_FLAG, check_template
from rlhf.data.data_files import DataFiles, Source, data_files
from rlhf.data.dataset import Dataset, check_file, load_dataset, texts
from rlhf.data.demo_data import PROMPT_COLUMNS, write_embedded
from rlhf.data.encoding import chat_tokenizer, holds_conversations
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema, check_renames, read_checked
from rlhf.errors import UserError
from rlhf.io.files import check_folder
from rlhf.io.model_folder import load_shape, weights_digest
from rlhf.io.tokenizer import Tokenizer
from rlhf.models.architecture import Architecture, ModelShape, architecture_of, architectures, get_architecture
from rlhf.random import fold_in, permutation
from rlhf.schedules import Schedule, constant_schedule, cosine_schedule, linear_schedule
from rlhf.stages import STAGES
from rlhf.train.context import Run

_SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "n_positions")
"""Settings in the section `model` that are fields of shapes."""


class ModelSpec(NamedTuple):
    """Shape, tokenizer and digest of a model whose parameters are not read, or are not trained yet."""

    config: ModelShape
    """Shape of the model. The vocabulary size is meaningless if the tokenizer is not trained yet."""
    tokenizer: Tokenizer | None
    """Tokenizer of the model; None if it is not trained yet."""
    digest: str
    """Digest of the weights, from `weights_digest`; empty if there are no weights yet."""


def embedded_file(run: Run, name: str) -> Path:
    """Write the embedded example to OUTPUT_DIR/data, with a note, and return the path of one of its files."""
    files = write_embedded(run.config.output_dir / "data")
    path = Path(files._asdict()[name])
    run.note(f"no data file given: using the embedded example, {path}")
    return path


def given_files(config: RunConfig, paths: DataPaths) -> DataFiles | None:
    """Return the files of a setting with the columns that the configuration names; None if it names no file."""
    return data_files(paths, config.data.columns)


def check_named_columns(config: RunConfig) -> None:
    """Raise UserError if a column that the configuration names is in none of its data files.

    Nothing is checked where a file is missing, because the stage that reads it says so.
    """
    schemas = {schema.name: schema for schema in (DEMONSTRATIONS, PREFERENCES, PROMPTS)}
    settings = {
        name: schemas[stage.schema]
        for stage in STAGES.values()
        for name, content in stage.files.items()
        if content in ("data", "validation") and hasattr(config, name) and stage.schema in schemas
    }
    given = [(given_files(config, getattr(config, name)), schema) for name, schema in settings.items()]
    sources = [(files, schema) for files, schema in given if files is not None]
    if all(path.exists() for files, _ in sources for path in files.paths):
        check_renames(sources)


def check_conversations(
    config: RunConfig, sources: Sequence[Source | None], schema: Schema, tokenizer: Tokenizer | None
) -> None:
    """Raise UserError if files hold conversations, and neither the settings nor the tokenizer have a chat template.

    Args:
        config: configuration of the run.
        sources: checked files, such as those of training and validation; None where there are none.
        schema: kind of their records.
        tokenizer: tokenizer of the model; None if it is not trained yet.
    """
    if config.data.template is not None:
        return
    for source in sources:
        if source is None or not holds_conversations(next(read_checked(source, schema))):
            continue
        if tokenizer is None:
            raise UserError(
                f"{source}: holds conversations, and a new tokenizer has no chat template; add {TEMPLATE_FLAG}"
            )
        check_template(tokenizer, source)


def open_dataset(run: Run, path: Source, schema: Schema, tokenizer: Tokenizer, max_length: int) -> Dataset:
    """Return the data set of a file, with notes on findings, dropped records and records longer than `max_length`.

    Args:
        run: run of the stage.
        path: data files.
        schema: kind of the records.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens of a record.
    """
    dataset = load_dataset(path, schema, tokenizer, run.config.cache_dir)
    for line in dataset.findings.describe(schema, len(dataset)):
        run.note(f"{path}: {line}")
    if dataset.dropped:
        run.note(f"{path}: dropped {dataset.dropped} pairs whose chosen text equals the rejected one")
    if cut := dataset.count_cut(max_length):
        what = "lose their end or the beginning of their prompt" if schema.answers else "lose their beginning"
        run.note(
            f"{path}: {len(dataset) - cut} of {len(dataset)} {schema.name} are whole within {max_length} tokens, the "
            f"other {cut} {what}; a longer context (--model.n-positions, for a model from scratch) keeps more"
        )
    return dataset


def train_tokenizer(run: Run, path: Source, schema: Schema) -> Tokenizer:
    """Return a byte-level BPE trained on every text of a data file."""
    tokenizer = Tokenizer.train(texts(path, schema), run.config.tokenizer.vocab_size)
    run.note(f"trained a byte-level BPE of {tokenizer.vocab_size} entries on {path}")
    return tokenizer


def new_config(settings: ModelConfig, vocab_size: int) -> ModelShape:
    """Return the shape of a model trained from scratch.

    Raises:
        UserError: the shape is impossible.
    """
    family = _family(settings)
    sizes = {name: getattr(settings, name) for name in _SIZES if getattr(settings, name) is not None}
    fields = {spec.name for spec in dataclasses.fields(family.shape)}
    if unknown := sizes.keys() - fields:
        raise UserError(f"model.{min(unknown)}: {family.model_type} has no such size; leave it out")
    try:
        shape: ModelShape = dataclasses.replace(family.presets[settings.preset], vocab_size=vocab_size, **sizes)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    return shape


def _family(settings: ModelConfig) -> Architecture:
    """Return the family that the user names, or the one that the preset belongs to; GPT-2 is the first of several."""
    owners = {family.model_type: family for family in architectures() if settings.preset in family.presets}
    if settings.family is None:
        return owners.get("gpt2") or next(iter(owners.values()))
    try:
        family = get_architecture(settings.family)
    except ValueError as error:
        raise UserError(f"--model.family: {error}") from error
    if settings.preset not in family.presets:
        raise UserError(
            f"--model.preset {settings.preset}: belongs to {', '.join(owners)}, not to {family.model_type}; drop "
            f"--model.family, or name a preset of {family.model_type}: {', '.join(family.presets)}"
        )
    return family


def check_dropout(shape: ModelShape, dropout: float, flag: str) -> None:
    """Raise UserError if a model is to be trained with dropout whose family has none."""
    if dropout and not architecture_of(shape).has_dropout:
        raise UserError(f"{flag} {dropout:g}: models of the family {shape.model_type} have no dropout; leave it out")


def read_model_spec(folder: Path, settings: ModelConfig) -> ModelSpec:
    """Return the spec of a language model that a stage starts from.

    Raises:
        UserError: a file is missing or cannot be read, the model is of another kind, or a field in `settings`
            contradicts it.
    """
    config, tokenizer = load_shape(folder)
    for name in _SIZES:
        setting, size = getattr(settings, name), getattr(config, name, None)
        if setting not in (None, size):
            flag = f"--model.{name.replace('_', '-')} (or the configuration file's)"
            raise UserError(
                f"{folder}: the model there has {name} {size}, but {flag} is {setting}; drop it, or train a new model"
            )
    return ModelSpec(config, tokenizer, weights_digest(folder))


def with_template(config: RunConfig, spec: ModelSpec) -> ModelSpec:
    """Return a spec whose tokenizer has the chat template that the configuration names."""
    return spec if spec.tokenizer is None else spec._replace(tokenizer=chat_tokenizer(spec.tokenizer, config.data))


def start_folder(config: RunConfig, model_path: Path | None) -> Path:
    """Return the folder of the SFT model that a stage starts from: `model_path`, or that of the run itself."""
    return model_path or config.output_dir / STAGES["sft"].folder


def start_model_spec(config: RunConfig, model_path: Path | None, flag: str, sft: ModelSpec | None) -> ModelSpec:
    """Return the spec of the SFT model that the reward model or PPO starts from.

    Args:
        config: configuration of the run.
        model_path: model folder that the user names.
        flag: flag of `model_path`.
        sft: spec of the run's own SFT model, if it is trained first.

    Raises:
        UserError: the model is missing, cannot be read, or does not fit the settings.
    """
    if model_path is None and sft is not None:
        return sft
    folder = start_folder(config, model_path)
    check_folder(folder, f"run `rlhf-train sft` first, or name a model folder: {flag} FOLDER")
    return with_template(config, read_model_spec(folder, config.model))


def check_validation(path: DataPaths, validation: DataPaths, schema: Schema) -> None:
    """Raise UserError if there is a validation file but no training file."""
    if validation is not None and path is None:
        raise UserError(
            f"{data_files(validation)}: validation data need training data ({schema.name}); add {schema.flag} FILE"
        )


def check_data(schema: Schema, path: Source | None, validation: Source | None = None) -> set[str]:
    """Read all records of data files, and return the keys of the training records or of the embedded example.

    Raises:
        UserError: a record is invalid.
    """
    if validation is not None:
        check_file(validation, schema)
    if path is not None:
        return check_file(path, schema)
    return set(PROMPT_COLUMNS if schema is PROMPTS else schema.keys)


def record_order(key: Tensor, count: int, first: int, number: int) -> list[int]:
    """Return records first..first+number-1 of an endless sequence of permutations of 0..count-1.

    Args:
        key: [2] int32, from which the key of each epoch is derived.
        count: number of records in the data set.
        first: index of the first record in the sequence.
        number: number of records to return.
    """
    records: list[int] = []
    while len(records) < number:
        epoch, offset = divmod(first + len(records), count)
        order = permutation(fold_in(key, epoch), count)
        records += order[offset : offset + number - len(records)].tolist()
    return records


def make_schedule(settings: OptimizerConfig, total_steps: int) -> Schedule:
    """Return the learning-rate schedule over `total_steps` updates."""
    warmup = min(int(settings.warmup_fraction * total_steps), total_steps - 1)
    if settings.schedule == "constant":
        return constant_schedule(settings.peak_learning_rate, warmup_steps=warmup)
    decay_schedule = linear_schedule if settings.schedule == "linear" else cosine_schedule
    return decay_schedule(settings.peak_learning_rate, total_steps, warmup_steps=warmup)


def lr_at_step(schedule: Schedule, step: int) -> float:
    """Return the learning rate of the update with number `step`."""
    return float(schedule(torch.tensor(step)))
