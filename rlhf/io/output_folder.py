"""A run's output folder: what may be put there, where, and the resolved configuration."""

import dataclasses
import os
from pathlib import Path

from rlhf.config import PipelineRun, RunConfig
from rlhf.errors import UserError
from rlhf.io.checkpoint import check_checkpoints, last_step
from rlhf.io.manifest import has_manifest, read_manifest
from rlhf.io.output import has_record, is_ours, write_output
from rlhf.io.paths import absolute_paths
from rlhf.io.presets import dump_config, load_config
from rlhf.io.run_log import check_logs
from rlhf.setting_rules import flag_of
from rlhf.stages import STAGES, Stage, pipeline_type


def checkpoint_folder(config: RunConfig, stage: Stage) -> Path:
    """Where a stage's checkpoints are."""
    return config.output_dir / "checkpoints" / stage.name


def check_output_folder(config: RunConfig, stage: Stage) -> None:
    """Refuse an output folder in which the stage would replace something that is not its own unfinished run.

    Raises:
        UserError: it holds the stage's checkpoints although `resume` is off, or, in the place of the model or of
            config.yaml, something that no run wrote or that has been changed since; or checkpoints or logs that are
            none of ours.
    """
    folder = config.output_dir
    _resolved(config)
    check_logs(folder / "logs")
    checkpoints, model = checkpoint_folder(config, stage), folder / stage.folder
    check_checkpoints(checkpoints)
    done = last_step(checkpoints)
    if os.path.lexists(model) and (done is None or not has_manifest(model)):
        raise UserError(
            f"{model}: is there already, and would be replaced by what {stage.name} trains; move it away, or choose "
            "another --output-dir"
        )
    if done is not None and not config.resume:
        raise UserError(
            f"{folder}: holds checkpoints of another {stage.name} run (step {done}); "
            f"continue it with --resume, or choose another --output-dir{_from_here(folder, stage)}"
        )
    if model.exists():
        try:
            read_manifest(model)
        except UserError as error:
            raise UserError(f"{error}; or move {model} away: --resume then writes it anew") from error


def has_checkpoints(config: RunConfig) -> bool:
    """Whether any stage has a checkpoint in the output folder."""
    return any(last_step(checkpoint_folder(config, stage)) is not None for stage in STAGES.values())


def write_config(config: RunConfig) -> None:
    """Write config.yaml; sections of stages that ran here before stay as they were.

    Raises:
        UserError: as `check_output_folder`.
    """
    resolved = _resolved(config)
    if resolved is not None:
        write_output(config.output_dir / "config.yaml", dump_config(resolved), overwrite=True)


def _resolved(config: RunConfig) -> PipelineRun | None:
    """The configuration to be written to config.yaml; None where it is there, perhaps with comments of the user's."""
    path = config.output_dir / "config.yaml"
    whole = absolute_paths(config)
    fields = {spec.name: getattr(whole, spec.name) for spec in dataclasses.fields(whole)}
    if not path.exists():
        return dataclasses.replace(pipeline_type()(), **fields)
    older = has_checkpoints(config)
    ours = is_ours(path)
    if not ours and not older:
        raise UserError(
            f"{path}: is there already, and no run of rlhf wrote it; it would be replaced by the resolved "
            "configuration. Choose another --output-dir"
        )
    before = load_config(str(path))
    now = dataclasses.replace(before, **fields)
    same = dataclasses.replace(now, config=before.config, resume=before.resume) == before
    if not (same or ours or not has_record(config.output_dir)):
        raise UserError(
            f"{path}: has been changed since a run wrote it, and says something else than this run; move it away, or "
            f"start from it: --config {path}"
        )
    return None if same else now


def _from_here(folder: Path, stage: Stage) -> str:
    """How another run of a stage starts from the models in a folder."""
    models = {setting: folder / STAGES[name].folder for name, setting in stage.sources.items()}
    flags = [f"{flag_of(setting)} {model}" for setting, model in models.items() if model.is_dir()]
    return f"; to start there from the models here, add {' '.join(flags)}" if flags else ""
