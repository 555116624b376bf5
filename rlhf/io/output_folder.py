"""The output folder of a run: checks before writing, the place of checkpoints, and the resolved configuration."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from rlhf.config import PipelineRun, RunConfig
from rlhf.errors import UserError
from rlhf.io.checkpoint import check_checkpoints, last_step
from rlhf.io.manifest import has_manifest, read_manifest
from rlhf.io.output import has_record, is_ours, write_output
from rlhf.io.paths import absolute_paths
from rlhf.io.presets import dump_config, load_config
from rlhf.io.provenance import PROMISE, Provenance
from rlhf.io.run_log import check_logs
from rlhf.setting_rules import flag_of
from rlhf.stage_rules import CHOSEN_BY_RULE
from rlhf.stages import STAGES, Stage, pipeline_type

_HEADER = f"""\
# The settings of a run as resolved. Each stage's result also depends on what its line here says:
# {PROMISE}.
"""


def checkpoint_folder(config: RunConfig, stage: Stage) -> Path:
    """Return the folder of a stage's checkpoints."""
    return config.output_dir / "checkpoints" / stage.name


def check_output_folder(config: RunConfig, stage: Stage) -> None:
    """Refuse an output folder in which the stage would replace anything but its own unfinished run.

    Raises:
        UserError: the folder holds checkpoints of the stage and `resume` is False; or a model or config.yaml that no
            run wrote or that was changed since; or checkpoints or logs that rlhf did not write.
    """
    folder = config.output_dir
    _resolved(config)
    check_logs(folder / "logs")
    checkpoints, model = checkpoint_folder(config, stage), folder / stage.folder
    check_checkpoints(checkpoints)
    done = last_step(checkpoints)
    if os.path.lexists(model) and (done is None or not has_manifest(model)):
        raise UserError(
            f"{model}: already exists, and would be replaced by what {stage.name} trains; move it away, or choose "
            "another --output-dir"
        )
    if done is not None and not config.resume:
        raise UserError(
            f"{folder}: holds checkpoints of another {stage.name} run (step {done}); "
            f"continue it with --resume, or choose another --output-dir{_start_hint(folder, stage)}"
        )
    if model.exists():
        try:
            trained_by = read_manifest(model).get("stage", stage.name)
        except UserError as error:
            raise UserError(f"{error}; or move {model} away: --resume then writes it again") from error
        if trained_by != stage.name:
            raise UserError(
                f"{model}: was trained by {trained_by}, and would be replaced by what {stage.name} trains; move it "
                "away, or choose another --output-dir"
            )


def has_checkpoints(config: RunConfig) -> bool:
    """Return whether any stage, or member of an ensemble, has a checkpoint in the output folder."""
    folder = config.output_dir / "checkpoints"
    return any(last_step(path) is not None for path in (*folder.glob("*"), *folder.glob("*/*")))


def write_config(config: RunConfig, stage: Stage, provenance: Provenance) -> None:
    """Write config.yaml with the stage's provenance, keeping the sections and provenance of stages that ran before.

    Args:
        config: configuration of the run.
        stage: stage that begins.
        provenance: provenance of the stage.

    Raises:
        UserError: config.yaml cannot be read or written, or the disk is full.
    """
    path, resolved = config.output_dir / "config.yaml", _resolved(config)
    if resolved is not None or is_ours(path):
        comments = read_provenance(path) | {stage.name: provenance}
        text = dump_config(load_config(str(path)) if resolved is None else resolved)
        lines = "".join(f"# {name}: {json.dumps(facts)}\n" for name, facts in comments.items())
        write_output(path, f"{_HEADER}{lines}{text}", overwrite=True)


def read_provenance(path: Path) -> dict[str, Provenance]:
    """Return the provenance in the comments of a config.yaml, by stage or member; unreadable ones are left out."""
    found: dict[str, Provenance] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        name, separator, text = line.removeprefix("# ").partition(": {")
        if line.startswith("# ") and separator and name.partition("/")[0] in STAGES:
            with contextlib.suppress(ValueError):
                found[name] = json.loads("{" + text)
    return found


def _resolved(config: RunConfig) -> PipelineRun | None:
    """Return the configuration to write to config.yaml; None if the file, perhaps with the user's comments, has it."""
    path = config.output_dir / "config.yaml"
    absolute = absolute_paths(config)
    fields = {spec.name: getattr(absolute, spec.name) for spec in dataclasses.fields(absolute)}
    if not path.exists():
        return dataclasses.replace(pipeline_type()(), **fields)
    ours = is_ours(path)
    if not ours and not has_checkpoints(config):
        raise UserError(
            f"{path}: already exists, and no run of rlhf wrote it; it would be replaced by the resolved "
            "configuration. Choose another --output-dir"
        )
    previous = load_config(str(path))
    columns = dict.fromkeys((*previous.data.columns, *config.data.columns))  # those of every stage's files
    fields["data"] = dataclasses.replace(absolute.data, columns=tuple(columns))
    resolved = _with_chosen(dataclasses.replace(previous, **fields), previous)
    same = dataclasses.replace(resolved, config=previous.config, resume=previous.resume) == previous
    if not (same or ours or not has_record(config.output_dir)):
        raise UserError(
            f"{path}: has been changed since a run wrote it, and says something else than this run; move it away, or "
            f"start from it: --config {path}"
        )
    return None if same else resolved


def _with_chosen(config: PipelineRun, previous: PipelineRun) -> PipelineRun:
    """Return the configuration with the values that earlier stages chose for settings that `config` leaves open."""
    for section, names in CHOSEN_BY_RULE.items():
        now, before = getattr(config, section), getattr(previous, section)
        kept = {name: getattr(before, name) for name in names if getattr(now, name) is None}
        config = dataclasses.replace(config, **{section: dataclasses.replace(now, **kept)})
    return config


def _start_hint(folder: Path, stage: Stage) -> str:
    """Return a hint about the flags that start another run of a stage from the models in a folder, or an empty text."""
    models = {setting: folder / STAGES[name].folder for name, setting in stage.sources.items()}
    flags = [f"{flag_of(setting)} {model}" for setting, model in models.items() if model.is_dir()]
    return f"; to start there from the models here, add {' '.join(flags)}" if flags else ""
