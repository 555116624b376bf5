"""Checkpoints of a train state: a pytree of tensors and JSON values. A checkpoint is complete or does not exist.

`checkpoints/<stage>/step-000100/` holds `state.safetensors` and `manifest.json`, which is written last.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import UserError
from rlhf.io.files import atomic_folder, save_tensors
from rlhf.io.manifest import check_replaceable, has_manifest, read_manifest, write_manifest
from rlhf.tree import named_leaves

_TENSORS = "state.safetensors"
_LEFTOVER = re.compile(r"\.step-\d{6,}\.\d+\.(tmp|old)")  # of a killed run


class Checkpoint(NamedTuple):
    """A train state on disk."""

    step: int
    """Number of completed steps (iterations for PPO)."""
    tensors: dict[str, Tensor]
    """Tensors by dotted name."""
    facts: dict[str, Any]
    """JSON values: all other state that the next step reads, and the configuration of the run."""


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `root/step-NNNNNN` and then delete all but the newest `keep` checkpoints.

    Args:
        root: `checkpoints/<stage>`, created if missing.
        checkpoint: state to write.
        keep: number of checkpoints to keep, at least 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: the disk is full, or the folder cannot be written or holds something else. Older checkpoints are not
            deleted then.
    """
    folder = root / f"step-{checkpoint.step:06d}"
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / _TENSORS, checkpoint.tensors)
        write_manifest(temporary, {"step": checkpoint.step, "facts": checkpoint.facts})
    newest = _folders(root)[-keep:]
    for path in root.iterdir():
        if path not in newest and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)
    return folder


def check_checkpoints(root: Path) -> None:
    """Raise UserError if a path in `root` has the name of a checkpoint but is not one."""
    for path in sorted(root.glob("step-*")):
        if re.fullmatch(r"step-\d{6,}", path.name) and not (has_manifest(path) or _is_ours(path)):
            raise UserError(f"{path}: already exists, and is not a checkpoint; move it away, or choose another folder")


def _is_ours(path: Path) -> bool:
    """Return whether the path is a checkpoint, or an incomplete one of a killed run, without any other files."""
    if _LEFTOVER.fullmatch(path.name):
        return True
    is_step = re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()
    return bool(is_step) and {file.name for file in path.iterdir()} <= {_TENSORS, "manifest.json"}


def save_refused(folder: Path, batch: object, state: Mapping[str, Tensor] | None, facts: dict[str, Any]) -> None:
    """Write the inputs of a refused update.

    Args:
        folder: the folder to write or replace.
        batch: micro-batch, a tree of tensors; None if it is not known.
        state: tensors of the train state by dotted name; None if a checkpoint has them.
        facts: further fields of the manifest.
    """
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        if batch is not None:
            save_tensors(temporary / "batch.safetensors", named_leaves(batch))
        if state is not None:
            save_tensors(temporary / _TENSORS, state)
        write_manifest(temporary, facts)


def load_checkpoint(root: Path, like: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """Return the newest complete checkpoint in `root`; None if there is none.

    Args:
        root: `checkpoints/<stage>`.
        like: facts that the checkpoint must have; their values are numbers, or nested mappings of numbers.

    Raises:
        UserError: the newest checkpoint with a manifest is truncated or altered, or lacks a fact.
    """
    folders = _folders(root)
    if not folders:
        return None
    newest = folders[-1]
    try:
        manifest = read_manifest(newest)
        _check_facts(manifest, {"step": 0, "facts": like or {}})
        return Checkpoint(manifest["step"], load_file(newest / _TENSORS), manifest["facts"])
    except UserError as error:
        problem = str(error)
    except KeyError as error:
        problem = f"{newest / 'manifest.json'}: has no {error} of the kind that checkpoints have; it is damaged"
    except (SafetensorError, OSError) as error:
        problem = f"{newest / _TENSORS}: cannot be read ({error})"
    raise UserError(f"{problem}; remove {newest} to use an older one")


def _check_facts(facts: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise KeyError unless `facts` has the nested keys of `like`, with mappings and numbers in the same places."""
    for name, value in like.items():
        if not isinstance(facts.get(name), dict if isinstance(value, Mapping) else int | float):
            raise KeyError(name)
        if isinstance(value, Mapping):
            _check_facts(facts[name], value)


def last_step(root: Path) -> int | None:
    """Return the step of the newest complete checkpoint in `root`, from its name alone; None if there is none."""
    folders = _folders(root)
    return int(folders[-1].name.removeprefix("step-")) if folders else None


def _folders(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if re.fullmatch(r"step-\d{6,}", path.name) and has_manifest(path)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))
