"""Inputs of an evaluation: the models in a folder, and files of test data."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf.config import PipelineRun
from rlhf.data.conversations import as_key, as_text, is_conversation
from rlhf.data.data_files import DataFiles, Source, list_files
from rlhf.data.dataset import Dataset, load_dataset
from rlhf.data.encoding import chat_tokenizer
from rlhf.data.records import read_records
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema, read_checked, rename_columns
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import MODEL_DIR, EvaluateConfig
from rlhf.io.files import check_folder
from rlhf.io.model_config import check_model_folder, is_reward_model
from rlhf.io.near_misses import folder_remedy
from rlhf.io.presets import load_config
from rlhf.io.tokenizer import Tokenizer
from rlhf.io.user_log import log_user


class Folders(NamedTuple):
    """Model folders by role; None where there is none."""

    sft: Path | None
    """Language model whose perplexity is measured."""
    reward: Path | None
    """Reward model whose accuracy is measured, and which scores completions."""
    policy: Path | None
    """Language model that completes prompts."""
    against: Path | None
    """Language model that completes the same prompts."""
    reference: Path | None
    """Language model from which the policy's KL is measured."""


class TestData(NamedTuple):
    """Records of one file, folder of shards, or several files."""

    path: Source
    schema: Schema
    records: list[int] | None
    """Numbers of the records to evaluate; None is all."""
    origin: str
    """Origin of the records, in words for the user: "held out by the run"; empty for a file as it is."""
    problem: str = ""
    """Reason why the file cannot be used; empty where it can."""


def find_folders(config: EvaluateConfig) -> Folders:
    """Return the models of a run's output folder, or a single model folder.

    Raises:
        UserError: the folder has no model, or --against or --reward-model does not name one.
    """
    folder = config.model_dir
    if config.against is not None:
        check_model_folder(config.against, "language model")
    if config.reward_model is not None:
        check_model_folder(config.reward_model, "reward model")
    check_folder(folder, MODEL_DIR)
    if (folder / "config.json").is_file():
        if is_reward_model(folder):
            return Folders(None, folder, None, None, None)
        return Folders(folder, config.reward_model, folder, config.against, config.against)
    sft, reward, policy = (
        folder / name if (folder / name / "config.json").is_file() else None for name in ("sft", "reward", "policy")
    )
    if not (sft or reward or policy):
        if remedy := folder_remedy(folder):
            raise UserError(f"{folder}: {remedy}")
        raise UserError(
            f"{folder}: holds no model, expected a run's sft/, reward/ or policy/, or a model folder with config.json "
            "and model.safetensors"
        )
    against = config.against or (sft if policy else None)
    return Folders(sft, config.reward_model or reward, policy, against, sft or against)


def run_config(model_dir: Path) -> PipelineRun | None:
    """Return the configuration that a run wrote to its output folder; None where there is none."""
    path = model_dir / "config.yaml"
    return load_config(str(path)) if path.is_file() else None


def classify_files(paths: Sequence[Path], columns: Sequence[str] = ()) -> list[TestData]:
    """Return test files with their schemas.

    Args:
        paths: files, or folders of shards.
        columns: other names of columns, each as `name=column`.

    Raises:
        UserError: a file cannot be read, or its first record fits no schema.
    """
    sources = [DataFiles((path,), tuple(columns)) for path in paths]
    return [TestData(source, schema_of(source), None, "") for source in sources]


def schema_of(source: DataFiles) -> Schema:
    """Return a data file's schema by the columns of its first record.

    Conversations in `messages` are demonstrations if the last turn is the assistant's, otherwise prompts.

    Raises:
        UserError: the file cannot be read, or its first record fits no schema.
    """
    path = list_files(source)[0]
    record = next(iter(read_records(path)))
    fields = rename_columns(record.fields, source.renames)
    for schema in (PREFERENCES, DEMONSTRATIONS):
        if all(name in fields for name in schema.answers):
            return schema
    if "messages" in fields:
        messages = fields["messages"]
        unanswered = is_conversation(messages) and messages[-1]["role"] != "assistant"
        return PROMPTS if unanswered else DEMONSTRATIONS
    if "prompt" in fields:
        return PROMPTS
    columns = ", ".join(map(repr, sorted(record.fields))) or "nothing"
    raise UserError(
        f"{path}: {record.where} has {columns}; expected 'prompt' with 'completion' (demonstrations), "
        "with 'chosen' and 'rejected' (preference pairs), or alone (prompts), or 'messages'; other names: "
        "--data.columns"
    )


def unique_prompts(data: TestData) -> TestData:
    """Return the prompts of demonstrations or preference pairs, each once."""
    first: dict[str, int] = {}
    pairs = zip(read_checked(data.path, data.schema), read_checked(data.path, PROMPTS), strict=True)
    for number, (_, record) in enumerate(pairs):
        first.setdefault(as_key(record.fields["prompt"]), number)
    origin = f"the prompts of its {data.schema.name}" + (f", {data.origin}" if data.origin else "")
    return TestData(data.path, PROMPTS, sorted(first.values()), origin)


def open_data(data: TestData, tokenizer: Tokenizer, config: EvaluateConfig) -> tuple[Dataset, list[int]]:
    """Return the tokenised file and its records to evaluate.

    Raises:
        UserError: the file or a record is invalid.
    """
    tokenizer = chat_tokenizer(tokenizer, config.data)
    dataset = load_dataset(data.path, data.schema, tokenizer, config.cache_dir)
    if data.records is None:  # the run has told the user of its own data
        for line in dataset.findings.describe(data.schema, len(dataset)):
            log_user(f"{data.path}: {line}")
    records = list(range(len(dataset))) if data.records is None else data.records
    return dataset, records[: config.limit]


def usable_pairs(source: Source) -> list[dict[str, str]]:
    """Return the texts of the pairs whose members differ: the records of its `Dataset`, in the same order."""
    fields = (record.fields for record in read_checked(source, PREFERENCES))
    pairs = ([pair[name] for name in PREFERENCES.keys] for pair in fields if pair["chosen"] != pair["rejected"])
    return [dict(zip(PREFERENCES.keys, map(as_text, values), strict=True)) for values in pairs]
