"""Resolving what a stage starts from: data files or the embedded example, tokenizers, models, record order."""

from pathlib import Path

import torch
from torch import Tensor

from rlhf.config import ModelConfig, OptimizerConfig
from rlhf.data.dataset import Dataset, load_dataset, texts
from rlhf.data.embedded import write_embedded
from rlhf.data.schema import Schema
from rlhf.errors import UserError
from rlhf.gpt2_config import PRESETS, GPT2Config
from rlhf.io.tokenizer import Tokenizer
from rlhf.random import fold_in, permutation
from rlhf.schedules import Schedule, constant, cosine, linear
from rlhf.stages.run import Run


def embedded_file(run: Run, name: str) -> Path:
    """One of the embedded example's files, written to OUTPUT_DIR/data; the user is told."""
    files = write_embedded(run.config.output_dir / "data")
    path = Path(files._asdict()[name])
    run.note(f"no data file given: using the embedded example, {path}")
    return path


def open_dataset(run: Run, path: Path, schema: Schema, tokenizer: Tokenizer, max_length: int) -> Dataset:
    """`load_dataset`, telling the user what was dropped and what does not fit `max_length` tokens."""
    dataset = load_dataset(path, schema, tokenizer, run.config.cache_dir)
    if dataset.dropped:
        run.note(f"{path}: dropped {dataset.dropped} pairs whose chosen text equals the rejected one")
    if cut := dataset.count_cut(max_length):
        what = "records are cut" if schema.answers else "prompts lose their beginning"
        run.note(f"{path}: {cut} of {len(dataset)} {what} to fit {max_length} tokens (see rlhf.data.truncation)")
    return dataset


def train_tokenizer(run: Run, path: Path, schema: Schema) -> Tokenizer:
    """A byte-level BPE trained on every text of a data file."""
    tokenizer = Tokenizer.train(texts(path, schema), run.config.tokenizer.vocab_size)
    run.note(f"trained a byte-level BPE of {tokenizer.vocab_size} entries on {path}")
    return tokenizer


def new_config(settings: ModelConfig, vocab_size: int) -> GPT2Config:
    """The shape of a model trained from scratch.

    Raises:
        UserError: the shape is impossible.
    """
    preset = PRESETS[settings.preset]
    try:
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=settings.n_positions or preset.n_positions,
            n_embd=settings.n_embd or preset.n_embd,
            n_layer=settings.n_layer or preset.n_layer,
            n_head=settings.n_head or preset.n_head,
        )
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def check_agrees(settings: ModelConfig, config: GPT2Config, folder: Path) -> None:
    """Raise UserError if a field set in `settings` contradicts the model that `folder` holds."""
    for name in ("n_layer", "n_head", "n_embd", "n_positions"):
        wanted, got = getattr(settings, name), getattr(config, name)
        if wanted not in (None, got):
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"{folder}: the model there has {name} {got}, but {flag} is {wanted}; drop the flag, or train anew"
            )


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
        return constant(settings.learning_rate, warmup_steps=warmup)
    course = linear if settings.schedule == "linear" else cosine
    return course(settings.learning_rate, total_steps, warmup_steps=warmup)


def rate_at(schedule: Schedule, step: int) -> float:
    """The learning rate of update `step`."""
    return float(schedule(torch.tensor(step)))
