"""Checkpoints of a train state: one pytree of tensors and a few plain facts, complete or not there at all.

`checkpoints/<stage>/step-000100/` holds `state.safetensors` and `manifest.json`, written last.
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
    """Steps (PPO: iterations) done."""
    tensors: dict[str, Tensor]
    """By dotted name."""
    facts: dict[str, Any]
    """Plain JSON: everything else that the next step reads, and the configuration the run was started with."""


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `root/step-NNNNNN` and then remove all but the newest `keep`.

    Raises:
        UserError: the disk is full, the folder cannot be written, or there is something else; older checkpoints are
            then untouched.
    """
    folder = root / f"step-{checkpoint.step:06d}"
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / _TENSORS, checkpoint.tensors)
        write_manifest(temporary, {"step": checkpoint.step, "facts": checkpoint.facts})
    kept = _folders(root)[-keep:]
    for old in root.iterdir():
        if old not in kept and _is_ours(old):
            shutil.rmtree(old, ignore_errors=True)
    return folder


def check_checkpoints(root: Path) -> None:
    """Raise UserError if something below `root` has a checkpoint's name and is none."""
    for path in sorted(root.glob("step-*")):
        if re.fullmatch(r"step-\d{6,}", path.name) and not (has_manifest(path) or _is_ours(path)):
            raise UserError(f"{path}: is there already, and is no checkpoint; move it away, or choose another folder")


def _is_ours(path: Path) -> bool:
    """Whether it is a checkpoint, or what a killed run left of one, and nothing else is in it."""
    if _LEFTOVER.fullmatch(path.name):
        return True
    is_step = re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()
    return bool(is_step) and {file.name for file in path.iterdir()} <= {_TENSORS, "manifest.json"}


def save_refused(folder: Path, batch: object, state: Mapping[str, Tensor] | None, facts: dict[str, Any]) -> None:
    """Write what a refused update came from.

    Args:
        folder: to write, or replace.
        batch: a tree of tensors; None where it is not known.
        state: the train state, where it is not in a checkpoint.
        facts: for the manifest.
    """
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        if batch is not None:
            save_tensors(temporary / "batch.safetensors", named_leaves(batch))
        if state is not None:
            save_tensors(temporary / _TENSORS, state)
        write_manifest(temporary, facts)


def load_checkpoint(root: Path, like: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """The newest complete checkpoint below `root`; None where there is none.

    Args:
        root: `checkpoints/<stage>`.
        like: facts that it must have: numbers, or mappings of such.

    Raises:
        UserError: the newest one with a manifest is cut off, altered, or lacks a fact.
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


def _check_facts(found: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raise KeyError unless `found` has every name of `like`, with a mapping or number as there, at all depths."""
    for name, value in like.items():
        if not isinstance(found.get(name), dict if isinstance(value, Mapping) else int | float):
            raise KeyError(name)
        if isinstance(value, Mapping):
            _check_facts(found[name], value)


def last_step(root: Path) -> int | None:
    """Step of the newest complete checkpoint below `root`, from its name alone."""
    folders = _folders(root)
    return int(folders[-1].name.removeprefix("step-")) if folders else None


def _folders(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(r"step-\d{6,}", path.name) and has_manifest(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
