"""Paths in a run's configuration: made absolute, and relocated with the run. This module does not import torch."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import DataConfig, LogConfig, PPOConfig, RunConfig
from rlhf.errors import UserError

_Section = TypeVar("_Section")
_Config = TypeVar("_Config", bound=RunConfig)
_SOURCE = re.compile(r"(?:(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\*)?(?P<target>.+)", re.DOTALL)


def absolute_paths(config: _Section) -> _Section:
    """Return a configuration or section with absolute paths, including those of files with user functions."""
    return _map_paths(config, Path.absolute)


def relocate(config: _Config, folder: Path) -> _Config:
    """Return a run's configuration with the paths of files that moved together with its output folder.

    Args:
        config: the configuration in `folder`'s config.yaml.
        folder: the possible current output folder; if it has no checkpoints, nothing is changed.
    """
    if not config.output_dir.is_absolute() or not (folder / "checkpoints").is_dir():
        return config

    def current(path: Path) -> Path:
        return next((candidate for candidate in places(path, config.output_dir, folder) if candidate.exists()), path)

    return _map_paths(config, current)


def places(path: Path, output_dir: Path, model_dir: Path) -> list[Path]:
    """Return the possible current paths of a file that a run read, most likely first.

    Args:
        path: the file's path as the run recorded it.
        output_dir: the run's output folder as it recorded it.
        model_dir: the current folder.
    """
    moved = Path(os.path.normpath(model_dir.absolute() / os.path.relpath(path, output_dir)))
    return [path, moved] if path.is_absolute() else [moved, path]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path that tells it apart from the others; equal paths get a number.

    Args:
        folders: the paths.

    Example:
        >>> short_names([Path("runs/a/policy"), Path("runs/b/policy"), Path("runs/b/sft")])
        ['a/policy', 'b/policy', 'sft']
    """
    paths = [folder.absolute().parts for folder in folders]
    names = []
    for number, own in enumerate(paths, start=1):
        ends = (count for count in range(1, len(own) + 1) if {own} == {p for p in paths if p[-count:] == own[-count:]})
        name = str(Path(*own[-next(ends) :]))
        names.append(name if paths.count(own) == 1 else f"{name} #{number}")
    return names


def same_place(before: str | None, now: Path | None) -> bool:
    """Return whether two paths, which may be None, refer to the same file or folder."""
    if before is None or now is None:
        return before is None and now is None
    return Path(before).resolve() == now.resolve()


def is_file_name(template: str) -> bool:
    """Return whether a chat template is named by its file, and not by the name of one that ships with rlhf."""
    return os.sep in template or "." in template


def parse_source(spec: str) -> tuple[float, str]:
    """Return the weight of a reward source, and its folder or function.

    Raises:
        UserError: the source is empty, or the weight is not a finite number.
    """
    match = _SOURCE.fullmatch(spec)
    if match is None:
        raise UserError("--ppo.reward: a source is empty; give a folder or module:function")
    try:
        weight = float(match["weight"] or 1.0)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--ppo.reward {spec}: the weight {match['weight']!r} is not a number")
    return weight, match["target"]


def _map_paths(config: _Section, change: Callable[[Path], Path]) -> _Section:
    """Return a configuration or section with `change` applied to every path."""

    def changed(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _map_paths(value, change)
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return change(value) if isinstance(value, Path) else value

    def changed_target(target: str) -> str:
        path, colon, function = target.rpartition(":")
        if not colon or Path(target).is_dir():
            return str(change(Path(target)))
        return f"{change(Path(path))}:{function}" if path.endswith(".py") else target

    def changed_name(name: str) -> str:
        return changed_target(name) if ":" in name else name

    names = [spec.name for spec in dataclasses.fields(config)]  # type: ignore[arg-type]
    values = {name: changed(getattr(config, name)) for name in names}
    if isinstance(config, PPOConfig):
        targets = [(spec, parse_source(spec)[1]) for spec in config.reward]
        values["reward"] = tuple(spec.removesuffix(target) + changed_target(target) for spec, target in targets)
        values |= {name: changed_name(values[name]) for name in ("estimator", "loss")}
    if isinstance(config, LogConfig) and config.sink is not None:
        values["sink"] = changed_target(config.sink)
    if isinstance(config, DataConfig) and config.template is not None and is_file_name(config.template):
        values["template"] = str(change(Path(config.template)))
    return type(config)(**values)
