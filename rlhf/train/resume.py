"""Checkpoints of a run, and the comparison of a run with its continuation: settings by value, files by content."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf.config import OptimizerConfig, RunConfig
from rlhf.data.data_files import Source, content_digest
from rlhf.distributed.compute_context import compute_threads
from rlhf.errors import NonFiniteError, UserError
from rlhf.execution.executor import Executor
from rlhf.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rlhf.io.paths import same_place
from rlhf.io.reward_identity import diff_sources, upgrade_sources
from rlhf.io.tokenizer import Tokenizer
from rlhf.ranges import flat_fields
from rlhf.stages import STAGES, Stage
from rlhf.train.context import Run
from rlhf.train.observers import LoopState, Observer
from rlhf.tree import all_finite

Identity = dict[str, Any]
"""JSON values that a run and its continuation must share: settings and digests of files."""

_FREE_TO_CHANGE = (
    "config", "output_dir", "resume", "cache_dir", "start_at", "strict", "stop_early", "checkpoint.", "log.", "dist",
    "threads",
)  # fmt: skip
"""Prefixes of settings that may differ when a run is resumed. Of these, only the threads change its bits."""

_NOT_FREE = ("dist.reduce",)
"""Settings with one of these prefixes that must not differ, because they change bits."""

_BEFORE: dict[str, Any] = {"ppo.kl_budget": math.inf}
"""The values of newer settings that older versions behaved by, where those are not the defaults."""

_LENGTHS = ("epochs", "max_steps", "num_iterations")
"""Settings, in any stage's section, that say how long it trains."""

_CONTENTS = {
    "data": "the data have changed",
    "validation": "the validation file has changed, so the evaluations before and after would be of different records",
    "tokenizer": "the tokenizer has changed",
    "estimator": "the estimator has changed",
    "loss": "the loss has changed",
    "template": "the chat template has changed",
    "model": "the weights that the stage starts from have changed",
}


class Difference(NamedTuple):
    """Differences between a run and its continuation."""

    changes: list[str]
    """Differences that prevent the continuation."""
    notes: list[str]
    """Differences that are shown to the user."""


def settings_of(config: RunConfig, stage: Stage) -> Identity:
    """Return the settings that determine the results of a stage, as JSON values, except those that name files."""
    other_stages = [candidate for candidate in STAGES.values() if candidate.name != stage.section]
    foreign = [prefix for other in other_stages for prefix in (f"{other.name}.", *other.own_settings)]
    files = _file_settings()
    return {
        name: _json(value)
        for name, value in flat_fields(config).items()
        if name in _NOT_FREE or (name not in files and not name.startswith((*_FREE_TO_CHANGE, *foreign)))
    }


def _file_settings() -> dict[str, str]:
    """Return the settings that name files, each with the kind of its content."""
    return {setting: content for stage in STAGES.values() for setting, content in stage.files.items()}


def digests_of(data: Source, tokenizer: Tokenizer, validation: Source | None = None) -> Identity:
    """Return the digests of data files and tokenizer of a stage, by the kinds in `Stage.files`."""
    template = tokenizer.chat_template
    return {
        "data": content_digest(data),
        "validation": content_digest(validation) if validation is not None else None,
        "tokenizer": f"{tokenizer.fingerprint}:{tokenizer.eos_id}",
        "template": None if template is None else hashlib.sha256(template.source.encode()).hexdigest(),
    }


def diff_settings(config: RunConfig, stage: Stage, before: Identity, now: Identity) -> Difference:
    """Return the differences between the identities of a checkpoint and of the run.

    A setting that the checkpoint lacks, because a newer version has added it, had its default. A missing digest is not
    compared. A setting that this version does not know counts as a change, because its effect is unknown.

    Args:
        config: configuration of the run.
        stage: stage of the run.
        before: identity in the checkpoint.
        now: identity of the run.
    """
    before, now = _upgrade(config, before, now)
    defaults = settings_of(type(config)(), stage)
    changes, notes = diff_sources(before.pop("sources", []), now.pop("sources", []))
    for name in sorted({*before, *now}):
        if name not in now:
            changes.append(f"{name} was {before[name]}, and this version of rlhf has no such setting")
        elif _is_longer(stage, name, before, now):
            change = f"{name} was {before[name]}, is {now[name]}"
            if _depends_on_length(config, stage):
                flags = f"--{stage.section}.schedule constant --{stage.section}.warmup-fraction 0"
                changes.append(f"{change}, and the learning rates follow from it; only a run with {flags} is extended")
            else:
                notes.append(f"extended: {change}; the result has the bits of a run that was as long from the start")
        elif (value := before.get(name, _BEFORE.get(name, defaults.get(name, now[name])))) != now[name]:
            described = f"{_origin(config, stage, name)}: {_CONTENTS[name]}" if name in _CONTENTS else None
            changes.append(described or f"{name} was {value}, is {now[name]}")
    return Difference(changes, notes)


def _is_longer(stage: Stage, name: str, before: Identity, now: Identity) -> bool:
    """Return whether a setting makes the stage train longer than it was to before."""
    section, _, field = name.partition(".")
    if section != stage.section or field not in _LENGTHS or name not in before or before[name] is None:
        return False
    return now[name] is None or bool(now[name] > before[name])


def _depends_on_length(config: RunConfig, stage: Stage) -> bool:
    """Return whether the learning rates of the first steps follow from the number of all steps."""
    settings: OptimizerConfig = stage.section_of(config)
    return settings.schedule != "constant" or settings.warmup_fraction > 0


def restore(run: Run, executor: Executor, state: LoopState, identity: Identity, total: int) -> tuple[int, LoopState]:
    """Load the newest checkpoint into the executor, if the run is resumed.

    Args:
        run: run of the stage.
        executor: executor that receives the state.
        state: state at the start of the run.
        identity: identity of the run.
        total: number of steps of the run.

    Returns:
        The number of steps made before, and the state for the next step.

    Raises:
        UserError: the checkpoint belongs to another configuration, data or shape.
    """
    config, folder = run.config, run.checkpoints
    expected = {"carried": state, "identity": {}, "threads": 1, "version": 0}
    checkpoint = load_checkpoint(folder, expected) if config.resume else None
    if checkpoint is None:
        return 0, state
    changes, notes = diff_settings(config, run.stage, checkpoint.facts["identity"], identity)
    if changes:
        shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
        raise UserError(
            f"{folder}: cannot be continued, because the run has changed: {shown}. "
            "Undo the change, or choose another --output-dir"
        )
    try:
        executor.restore(checkpoint.tensors, checkpoint.facts["version"])
    except ValueError as error:
        raise UserError(f"{folder}: the checkpoint has another shape: {error}") from error
    if checkpoint.step < total:
        run.is_saved = False  # the model of a run that is extended is replaced
    for line in (f"continuing after step {checkpoint.step}", *notes, *_rounding_notes(config, checkpoint)):
        run.note(line)
    return checkpoint.step, checkpoint.facts["carried"]


class CheckpointWriter(Observer):
    """Observer that writes the checkpoints that `restore` reads."""

    def __init__(self, run: Run, executor: Executor, identity: Identity) -> None:
        """Store the run, its executor and its identity."""
        self._run, self._executor, self._identity = run, executor, identity

    def on_save(self, step: int, state: LoopState) -> None:
        """Write a checkpoint.

        Raises:
            NonFiniteError: the state is not finite.
        """
        run, tensors = self._run, self._executor.snapshot()
        if bad := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
            section = run.stage.section
            raise NonFiniteError(
                f"{bad[0]} is not finite after the last update, though its gradient was; no checkpoint was written, "
                f"and those before stay. Raise --{section}.adam-eps, or lower --{section}.learning-rate"
            )
        facts = {
            "carried": state,
            "identity": self._identity,
            "threads": compute_threads(run.config),
            "workers": run.config.dist.num_workers,
            "version": self._executor.version,
        }
        save_checkpoint(run.checkpoints, Checkpoint(step, tensors, facts), keep=run.config.checkpoint.keep)


def _rounding_notes(config: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line for each change of threads or workers that can change the rounding."""
    before, now = checkpoint.facts["threads"], compute_threads(config)
    if before != now:
        yield f"it was made with {before} threads per process and continues with {now}: rounding may differ from here"
    workers = config.dist.num_workers
    before = checkpoint.facts.get("workers", workers)
    if config.dist.reduce == "ring" and before != workers:
        yield (
            f"it was made with {before} workers and continues with {workers}: with --dist.reduce ring, rounding may "
            "differ from here"
        )


def _upgrade(config: RunConfig, before: Identity, now: Identity) -> tuple[Identity, Identity]:
    """Return both identities in the current form.

    Older checkpoints lack `dist.reduce` and have paths instead of digests. If a digest is missing, the path must lead
    to the same place.
    """
    values, files = flat_fields(config), _file_settings()
    if now.get("ppo.kl_horizon") is None:  # which older checkpoints have, whether or not it is used
        before = {name: value for name, value in before.items() if name != "ppo.kl_horizon"}
    paths = {name: path for name, path in before.items() if name in files}
    reduce = {name: now[name] for name in _NOT_FREE if name in now}
    before = reduce | {name: value for name, value in before.items() if name not in paths}
    now = dict(now)
    if "ppo.reward" in paths and "sources" in now:
        before["sources"] = upgrade_sources(paths.pop("ppo.reward"), before.pop("reward"), now["sources"])
    for name, path in paths.items():
        if files[name] not in before and not same_place(path, values[name]):
            before[name], now[name] = path, _json(values[name])
    return before, now


def _origin(config: RunConfig, stage: Stage, content: str) -> str:
    """Return the setting that names the file of a kind of content, with its value."""
    setting = next((name for name, content_name in stage.files.items() if content_name == content), None)
    value = flat_fields(config)[setting] if setting else None
    if value is not None:
        return f"{setting} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
    return {"data": "the embedded example", "validation": f"{setting}"}.get(content, f"the start of {stage.name}")


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
