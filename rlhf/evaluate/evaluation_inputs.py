"""Inputs of an evaluation: the models in a folder, and files of test data."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf.config import PipelineRun
from rlhf.data.dataset import Dataset, load_dataset
from rlhf.data.records import read_records
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema, read_checked
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.io.files import check_folder
from rlhf.io.model_folder import check_model_folder, is_reward_model
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
    """Records of one file."""

    path: Path
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
        UserError: there are none, or --against or --reward-model is no model.
    """
    folder = config.model_dir
    if config.against is not None:
        check_model_folder(config.against, "language model")
    if config.reward_model is not None:
        check_model_folder(config.reward_model, "reward model")
    check_folder(folder, "give a run's output folder or a model folder as --model-dir")
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


def classify_files(paths: Sequence[Path]) -> list[TestData]:
    """Return test files with their schemas.

    Raises:
        UserError: a file cannot be read, or its first record is of no kind.
    """
    return [TestData(path, schema_of(path), None, "") for path in paths]


def schema_of(path: Path) -> Schema:
    """Return a data file's schema by the columns of its first record. Errors are those of `classify_files`."""
    record = next(iter(read_records(path)))
    for schema in (PREFERENCES, DEMONSTRATIONS, PROMPTS):
        if all(name in record.fields for name in schema.keys):
            return schema
    columns = ", ".join(map(repr, sorted(record.fields))) or "nothing"
    raise UserError(
        f"{path}: record 1 (line {record.line}) has {columns}; expected 'prompt' with 'completion' (demonstrations), "
        "with 'chosen' and 'rejected' (preference pairs), or alone (prompts)"
    )


def unique_prompts(data: TestData) -> TestData:
    """Return the prompts of demonstrations or preference pairs, each once."""
    first: dict[str, int] = {}
    for number, record in enumerate(read_checked(data.path, data.schema)):
        first.setdefault(record.fields["prompt"], number)
    origin = f"the prompts of its {data.schema.name}" + (f", {data.origin}" if data.origin else "")
    return TestData(data.path, PROMPTS, sorted(first.values()), origin)


def open_data(data: TestData, tokenizer: Tokenizer, config: EvaluateConfig) -> tuple[Dataset, list[int]]:
    """Return the tokenised file and its records to evaluate. Errors are those of `rlhf.data.dataset.load_dataset`."""
    dataset = load_dataset(data.path, data.schema, tokenizer, config.cache_dir)
    if data.records is None:  # the run has told the user of its own data
        for line in dataset.findings.describe(data.schema, len(dataset)):
            log_user(f"{data.path}: {line}")
    records = list(range(len(dataset))) if data.records is None else data.records
    return dataset, records[: config.limit]


def usable_pairs(path: Path) -> list[dict[str, str]]:
    """Return the pairs of a file whose members differ: the records of its `Dataset`, in the same order."""
    fields = (record.fields for record in read_checked(path, PREFERENCES))
    return [pair for pair in fields if pair["chosen"] != pair["rejected"]]
