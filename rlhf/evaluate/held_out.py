"""Training and held-out data of a run, at their present paths, checked against the digests that the run recorded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config import PipelineRun, SupervisedConfig
from rlhf.data.hold_out import hold_out
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema, read_checked
from rlhf.errors import UserError
from rlhf.evaluate.evaluation_inputs import TestData, usable_pairs
from rlhf.io.checkpoint import last_step
from rlhf.io.files import read_json, sha256
from rlhf.io.paths import places
from rlhf.random import Purpose, fold_in, key
from rlhf.stages import STAGES

_STAGES = {stage.schema: stage.name for stage in reversed(STAGES.values())}
"""The first stage that learns from each schema, by the name of the schema."""

_HELD_OUT = "held out by the run"


def held_out_data(model_dir: Path, run: PipelineRun) -> list[TestData]:
    """Return a run's test data: the records that each stage held out, and the example's held-out prompts.

    Without held-out prompts, those that PPO was trained on; the user is told. A file that has changed or is no longer
    there has a `problem`.
    """
    return [
        _held_out(model_dir, run, DEMONSTRATIONS, run.sft_val_data),
        _held_out(model_dir, run, PREFERENCES, run.preference_val_data),
        _prompts(model_dir, run),
    ]


def training_pairs(model_dir: Path, run: PipelineRun) -> TestData | None:
    """Return the preference pairs that a run learnt from; None where the file has changed or is no longer there."""
    path, problem = _training_file(model_dir, run, PREFERENCES)
    if problem:
        return None
    train = None if run.preference_val_data is not None else _split(run, path, PREFERENCES)[0]
    return TestData(path, PREFERENCES, train, "of the run's training")


def mark_trained(data: Sequence[TestData], model_dir: Path, run: PipelineRun | None) -> list[TestData]:
    """Return test data with an `origin` that says so where the models in a folder were trained on them.

    Files are recognised by their content, and so are single records as long as the run's training data are there.
    """
    folders = [model_dir, *(model_dir / stage.folder for stage in STAGES.values())]
    digests = {_read(folder / "manifest.json").get("data") for folder in folders}
    digests |= {_recorded(model_dir, stage).get("data") for stage in STAGES}
    return [test._replace(origin=_trained_origin(test, digests, model_dir, run)) for test in data]


def _trained_origin(test: TestData, digests: set[str | None], model_dir: Path, run: PipelineRun | None) -> str:
    if test.path.is_file() and sha256(test.path) in digests:
        return "which the model was trained on"
    count, shared = _count_shared(test, model_dir, run) if run is not None else (0, 0)
    return f"{shared} of its {count} records are among those that the model was trained on" if shared else test.origin


def _count_shared(test: TestData, model_dir: Path, run: PipelineRun) -> tuple[int, int]:
    """Return the number of test records, and of those that a stage was trained on."""
    path, problem = _training_file(model_dir, run, test.schema)
    if problem or not path.is_file():
        return 0, 0
    records = _texts(path, test.schema)
    validation = {DEMONSTRATIONS: run.sft_val_data, PREFERENCES: run.preference_val_data}.get(test.schema)
    if test.schema is not PROMPTS and validation is None:
        records = [records[number] for number in _split(run, path, test.schema)[0]]
    trained, tested = set(records), _texts(test.path, test.schema)
    return len(tested), sum(record in trained for record in tested)


def _texts(path: Path, schema: Schema) -> list[tuple[str, ...]]:
    """Return the texts of each record that a `Dataset` of the file has."""
    if schema is PREFERENCES:
        fields: Any = usable_pairs(path)
    else:
        fields = [record.fields for record in read_checked(path, schema)]
    return [tuple(record[name] for name in schema.keys) for record in fields]


def _held_out(model_dir: Path, run: PipelineRun, schema: Schema, validation: Path | None) -> TestData:
    if validation is not None:
        digest = _recorded(model_dir, _STAGES[schema.name]).get("validation")
        path, problem = _locate(places(validation, run.output_dir, model_dir), digest, "was validated on")
        return TestData(path, schema, None, _HELD_OUT, problem)
    path, problem = _training_file(model_dir, run, schema)
    if problem:
        return TestData(path, schema, None, _HELD_OUT, problem)
    _, held_out = _split(run, path, schema)
    return TestData(path, schema, held_out or None, _HELD_OUT if held_out else "which it learnt from")


def _prompts(model_dir: Path, run: PipelineRun) -> TestData:
    digest = _recorded(model_dir, "ppo").get("data")
    for candidate in _training_paths(model_dir, run, PROMPTS):
        path = candidate.with_name("heldout_prompts.json")
        if path.is_file() and sha256(path) != digest:
            return TestData(path, PROMPTS, None, _HELD_OUT)
    path, problem = _training_file(model_dir, run, PROMPTS)
    return TestData(path, PROMPTS, None, "which PPO was trained on", problem)


def _training_file(model_dir: Path, run: PipelineRun, schema: Schema) -> tuple[Path, str]:
    """Return the file that a stage learnt from, and the reason why it cannot be used, empty where it can."""
    digest = _recorded(model_dir, _STAGES[schema.name]).get("data")
    return _locate(_training_paths(model_dir, run, schema), digest, "learnt from")


def _training_paths(model_dir: Path, run: PipelineRun, schema: Schema) -> list[Path]:
    """Return the paths at which the file that a stage learnt from may be."""
    setting, example = {
        "sft": (run.sft_data, "demonstrations.json"),
        "reward": (run.preference_data, "preferences.json"),
        "ppo": (run.prompt_data, "prompts.json"),
    }[_STAGES[schema.name]]
    return [model_dir / "data" / example] if setting is None else places(setting, run.output_dir, model_dir)


def _locate(candidates: Sequence[Path], digest: str | None, use: str) -> tuple[Path, str]:
    """Return the first candidate of that content, and the reason why none can be used, empty where one can.

    Args:
        candidates: the likeliest first.
        digest: of the file that the run read; None where it is not known, and any content will do.
        use: the run's use of it, in words for the user.
    """
    files = [path for path in candidates if path.is_file()]
    for path in files:
        if digest is None or sha256(path) == digest:
            return path, ""
    if files:
        return files[0], f"{files[0]} is no longer what the run {use}"
    return candidates[0], f"{candidates[0]}, which the run had, is no longer there"


def _recorded(model_dir: Path, stage: str) -> dict[str, Any]:
    """Return the digests of a stage's data, from its model's manifest or its last checkpoint; empty where unknown."""
    manifest = _read(model_dir / STAGES[stage].folder / "manifest.json")
    root = model_dir / "checkpoints" / stage
    if "data" in manifest or (step := last_step(root)) is None:
        return manifest
    facts = _read(root / f"step-{step:06d}" / "manifest.json").get("facts")
    identity = facts.get("identity") if isinstance(facts, dict) else None
    return identity if isinstance(identity, dict) else {}


def _read(manifest: Path) -> dict[str, Any]:
    """Return a manifest's content; empty where there is none that can be read."""
    try:
        value = read_json(manifest)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def _split(run: PipelineRun, path: Path, schema: Schema) -> tuple[list[int], list[int]]:
    """Return (records trained on, records held out), as the stage drew them."""
    settings: SupervisedConfig = run.reward if schema is PREFERENCES else run.sft
    count = len(usable_pairs(path)) if schema is PREFERENCES else sum(1 for _ in read_checked(path, schema))
    return hold_out(fold_in(key(run.seed), int(Purpose.SPLIT)), count, settings.val_fraction)
