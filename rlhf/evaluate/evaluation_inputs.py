"""What there is to evaluate: the models in a folder, and test data, given or held out by the run."""

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
from rlhf.io.progress import tell
from rlhf.io.tokenizer import Tokenizer


class Folders(NamedTuple):
    """Model folders by the part they play; None where there is none."""

    sft: Path | None
    """Whose perplexity is measured."""
    reward: Path | None
    """Whose accuracy is measured, and which scores the policy."""
    policy: Path | None
    """Which completes prompts."""
    against: Path | None
    """Which completes the same prompts."""
    reference: Path | None
    """From which the policy's KL is measured."""


class TestData(NamedTuple):
    """Records of one file."""

    path: Path
    schema: Schema
    records: list[int] | None
    """Which; None is all."""
    origin: str
    """Where they come from, for the user: "", "held out by the run"."""
    problem: str = ""
    """Why the file cannot be used; empty where it can."""


def find_folders(config: EvaluateConfig) -> Folders:
    """The models of a run's output folder, or of a single model folder.

    Raises:
        UserError: there are none, or one that is given beside them is no model.
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
    """The configuration that a run left in its output folder; None where there is none."""
    path = model_dir / "config.yaml"
    return load_config(str(path)) if path.is_file() else None


def given_data(paths: Sequence[Path]) -> list[TestData]:
    """Test files with their kinds.

    Raises:
        UserError: a file cannot be read, or its first record is of no kind.
    """
    return [TestData(path, kind_of(path), None, "") for path in paths]


def kind_of(path: Path) -> Schema:
    """The kind of a data file by the columns of its first record. Errors as `given_data`."""
    record = next(iter(read_records(path)))
    for schema in (PREFERENCES, DEMONSTRATIONS, PROMPTS):
        if all(name in record.fields for name in schema.keys):
            return schema
    found = ", ".join(map(repr, sorted(record.fields))) or "nothing"
    raise UserError(
        f"{path}: record 1 (line {record.line}) has {found}; expected 'prompt' with 'completion' (demonstrations), "
        "with 'chosen' and 'rejected' (preference pairs), or alone (prompts)"
    )


def prompts_of(data: TestData) -> TestData:
    """The prompts of demonstrations or preference pairs, each once."""
    first: dict[str, int] = {}
    for number, record in enumerate(read_checked(data.path, data.schema)):
        first.setdefault(record.fields["prompt"], number)
    origin = f"the prompts of its {data.schema.name}" + (f", {data.origin}" if data.origin else "")
    return TestData(data.path, PROMPTS, sorted(first.values()), origin)


def open_data(data: TestData, tokenizer: Tokenizer, config: EvaluateConfig) -> tuple[Dataset, list[int]]:
    """(the tokenised file, its records to evaluate). Errors as `rlhf.data.dataset.load_dataset`."""
    dataset = load_dataset(data.path, data.schema, tokenizer, config.cache_dir)
    if data.records is None:  # of a run's data the run has told it
        for line in dataset.findings.describe(data.schema, len(dataset)):
            tell(f"{data.path}: {line}")
    records = list(range(len(dataset))) if data.records is None else data.records
    return dataset, records[: config.limit]


def usable_pairs(path: Path) -> list[dict[str, str]]:
    """The pairs of a file whose members differ: the records of its `Dataset`, in the same order."""
    fields = (record.fields for record in read_checked(path, PREFERENCES))
    return [pair for pair in fields if pair["chosen"] != pair["rejected"]]
