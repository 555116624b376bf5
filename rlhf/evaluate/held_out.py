"""Training and held-out data of a run, at their present paths, checked against the digests that the run recorded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config import DataPaths, PipelineRun, SupervisedConfig
from rlhf.data.data_files import DataFiles, Source, content_digest, data_files
from rlhf.data.hold_out import hold_out
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, Schema, read_checked
from rlhf.errors import UserError
from rlhf.evaluate.evaluation_inputs import TestData, usable_pairs
from rlhf.io.checkpoint import last_step
from rlhf.io.files import read_json
from rlhf.io.paths import places
from rlhf.random import Purpose, fold_in, key
from rlhf.stages import STAGES

_EXAMPLES = {"demonstrations": "demonstrations.json", "preference pairs": "preferences.json", "prompts": "prompts.json"}
"""The embedded example's file of each schema, by the name of the schema."""

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
    train = (
        None
        if run.preference_val_data is not None
        else _split(run, path, PREFERENCES, _stage_of(model_dir, PREFERENCES))[0]
    )
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
    """Return the origin of test data, which says so if the models were trained on them or on some of their records."""
    if content_digest(test.path) in digests:
        return "which the model was trained on"
    count, shared = _count_shared(test, model_dir, run) if run is not None else (0, 0)
    return f"{shared} of its {count} records are among those that the model was trained on" if shared else test.origin


def _count_shared(test: TestData, model_dir: Path, run: PipelineRun) -> tuple[int, int]:
    """Return the number of test records, and of those that a stage was trained on."""
    path, problem = _training_file(model_dir, run, test.schema)
    if problem:
        return 0, 0
    records = _texts(path, test.schema)
    validation = {DEMONSTRATIONS: run.sft_val_data, PREFERENCES: run.preference_val_data}.get(test.schema)
    if test.schema is not PROMPTS and validation is None:
        stage = _stage_of(model_dir, test.schema)
        records = [records[number] for number in _split(run, path, test.schema, stage)[0]]
    trained, tested = set(records), _texts(test.path, test.schema)
    return len(tested), sum(record in trained for record in tested)


def _texts(path: Source, schema: Schema) -> list[str]:
    """Return the texts or conversations of each record that a `Dataset` of the file has, as JSON."""
    if schema is PREFERENCES:
        fields: Any = usable_pairs(path)
    else:
        fields = [record.fields for record in read_checked(path, schema)]
    return [json.dumps([record[name] for name in schema.keys]) for record in fields]


def _held_out(model_dir: Path, run: PipelineRun, schema: Schema, validation: DataPaths) -> TestData:
    if validation is not None:
        digest = _recorded(model_dir, _stage_of(model_dir, schema)).get("validation")
        path, problem = _locate(_places(model_dir, run, validation), digest, "was validated on")
        return TestData(path, schema, None, _HELD_OUT, problem)
    path, problem = _training_file(model_dir, run, schema)
    if problem:
        return TestData(path, schema, None, _HELD_OUT, problem)
    _, held_out = _split(run, path, schema, _stage_of(model_dir, schema))
    return TestData(path, schema, held_out or None, _HELD_OUT if held_out else "which it learnt from")


def _prompts(model_dir: Path, run: PipelineRun) -> TestData:
    digest = _recorded(model_dir, "ppo").get("data")
    for candidate in _training_paths(model_dir, run, PROMPTS):
        held_out = candidate.paths[0].with_name("heldout_prompts.json")
        if held_out.is_file() and content_digest(held_out) != digest:
            return TestData(candidate._replace(paths=(held_out,)), PROMPTS, None, _HELD_OUT)
    path, problem = _training_file(model_dir, run, PROMPTS)
    if run.prompt_data is None and problem and digest is None:
        problem = "the run had no prompts, as one that ended with DPO; name a file of them: --test-data FILE"
    return TestData(path, PROMPTS, None, "which PPO was trained on", problem)


def _training_file(model_dir: Path, run: PipelineRun, schema: Schema) -> tuple[DataFiles, str]:
    """Return the file that a stage learnt from, and the reason why it cannot be used, empty where it can."""
    digest = _recorded(model_dir, _stage_of(model_dir, schema)).get("data")
    return _locate(_training_paths(model_dir, run, schema), digest, "learnt from")


def _training_paths(model_dir: Path, run: PipelineRun, schema: Schema) -> list[DataFiles]:
    """Return the paths at which the file that a stage learnt from may be."""
    setting = {DEMONSTRATIONS: run.sft_data, PREFERENCES: run.preference_data, PROMPTS: run.prompt_data}[schema]
    if setting is None:
        return [DataFiles((model_dir / "data" / _EXAMPLES[schema.name],))]
    return _places(model_dir, run, setting)


def _places(model_dir: Path, run: PipelineRun, setting: DataPaths) -> list[DataFiles]:
    """Return the files of a setting at each place where they may be now."""
    files = data_files(setting, run.data.columns)
    assert files is not None, "only settings that name files"
    by_place = zip(*(places(path, run.output_dir, model_dir) for path in files.paths), strict=True)
    return [files._replace(paths=paths) for paths in by_place]


def _locate(candidates: Sequence[DataFiles], digest: str | None, use: str) -> tuple[DataFiles, str]:
    """Return the first candidate of that content, and the reason why none can be used, empty where one can.

    Args:
        candidates: possible files, the likeliest first.
        digest: digest of the file that the run read; None if it is unknown, in which case any content is accepted.
        use: use of the file in the run, in words for the user.
    """
    files = [source for source in candidates if all(path.exists() for path in source.paths)]
    for path in files:
        if digest is None or content_digest(path) == digest:
            return path, ""
    if files:
        return files[0], f"{files[0]} is no longer what the run {use}"
    return candidates[0], f"{candidates[0]}, which the run read, no longer exists"


def _stage_of(model_dir: Path, schema: Schema) -> str:
    """Return the first stage that learnt from a schema in a run's folder, or else the first that learns from it."""
    names = [stage.name for stage in STAGES.values() if stage.schema == schema.name]
    return next((name for name in names if _recorded(model_dir, name)), names[0])


def _recorded(model_dir: Path, stage: str) -> dict[str, Any]:
    """Return the digests of a stage's data, from its model's manifest or its last checkpoint; empty where unknown."""
    manifest = _read(model_dir / STAGES[stage].folder / "manifest.json")
    if manifest.get("stage", stage) != stage:  # of another stage that writes the same folder
        manifest = {}
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


def _split(run: PipelineRun, path: Source, schema: Schema, stage: str) -> tuple[list[int], list[int]]:
    """Return (records trained on, records held out), as the stage drew them."""
    settings: SupervisedConfig = STAGES[stage].section_of(run)
    count = len(usable_pairs(path)) if schema is PREFERENCES else sum(1 for _ in read_checked(path, schema))
    return hold_out(fold_in(key(run.seed), int(Purpose.SPLIT)), count, settings.val_fraction)
