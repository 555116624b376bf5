"""Paths of a run: they mean the same wherever a program is started, and after the run has moved."""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import LogConfig, PPOConfig
from rlhf.stages.rewards import parse_source

_Section = TypeVar("_Section")


def absolute_paths(config: _Section) -> _Section:
    """Return a configuration, or a section of one, with absolute paths, those of user functions' files included."""
    values: dict[str, Any] = {
        spec.name: _absolute(getattr(config, spec.name))
        for spec in dataclasses.fields(config)  # type: ignore[arg-type]
    }
    if isinstance(config, PPOConfig):
        targets = [(spec, parse_source(spec)[1]) for spec in config.reward]
        values["reward"] = tuple(spec.removesuffix(target) + _absolute_target(target) for spec, target in targets)
    if isinstance(config, LogConfig) and config.sink is not None:
        values["sink"] = _absolute_target(config.sink)
    return type(config)(**values)


def same_place(before: str | None, now: Path | None) -> bool:
    """Return whether two paths, which may be None, lead to one place."""
    if before is None or now is None:
        return before is None and now is None
    return Path(before).resolve() == now.resolve()


def places(path: Path, output_dir: Path, model_dir: Path) -> list[Path]:
    """Return where a file that a run read may be now, the likeliest place first.

    Args:
        path: of the file, as the run recorded it.
        output_dir: of the run, as it recorded it.
        model_dir: where the run's folder is now.
    """
    moved = Path(os.path.normpath(model_dir.absolute() / os.path.relpath(path, output_dir)))
    return [path, moved] if path.is_absolute() else [moved, path]


def _absolute(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return absolute_paths(value)
    return value.absolute() if isinstance(value, Path) else value


def _absolute_target(target: str) -> str:
    """Return a folder, or `file.py:function`, with an absolute path; `module:function` stays as it is."""
    path, colon, function = target.rpartition(":")
    if not colon or Path(target).is_dir():
        return str(Path(target).absolute())
    return f"{Path(path).absolute()}:{function}" if path.endswith(".py") else target
