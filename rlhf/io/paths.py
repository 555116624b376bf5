"""Paths in a run's configuration: the same wherever a program is started, and found again where the run has moved.

Importing it imports no torch.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import LogConfig, PPOConfig, RunConfig
from rlhf.errors import UserError

_Section = TypeVar("_Section")
_Config = TypeVar("_Config", bound=RunConfig)
_SOURCE = re.compile(r"(?:(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\*)?(?P<target>.+)", re.DOTALL)


def absolute_paths(config: _Section) -> _Section:
    """Return a configuration, or a section of one, with absolute paths, those of user functions' files included."""
    return _map_paths(config, Path.absolute)


def relocate(config: _Config, folder: Path) -> _Config:
    """Return a run's configuration with the paths that moved together with its output folder.

    Args:
        config: as read from the config.yaml in `folder`.
        folder: where the output folder may be now; one without checkpoints is none, and nothing is changed.
    """
    if not config.output_dir.is_absolute() or not (folder / "checkpoints").is_dir():
        return config

    def current(path: Path) -> Path:
        return next((place for place in places(path, config.output_dir, folder) if place.exists()), path)

    return _map_paths(config, current)


def places(path: Path, output_dir: Path, model_dir: Path) -> list[Path]:
    """Return where a file that a run read may be now, the likeliest place first.

    Args:
        path: of the file, as the run recorded it.
        output_dir: of the run, as it recorded it.
        model_dir: where the run's folder is now.
    """
    moved = Path(os.path.normpath(model_dir.absolute() / os.path.relpath(path, output_dir)))
    return [path, moved] if path.is_absolute() else [moved, path]


def same_place(before: str | None, now: Path | None) -> bool:
    """Return whether two paths, which may be None, lead to one place."""
    if before is None or now is None:
        return before is None and now is None
    return Path(before).resolve() == now.resolve()


def parse_source(spec: str) -> tuple[float, str]:
    """Return the weight of a source of reward, and its folder or function.

    Raises:
        UserError: it is empty, or the weight is no finite number.
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
    """Return a configuration, or a section of one, with every path changed."""

    def changed(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return _map_paths(value, change)
        return change(value) if isinstance(value, Path) else value

    def changed_target(target: str) -> str:
        path, colon, function = target.rpartition(":")
        if not colon or Path(target).is_dir():
            return str(change(Path(target)))
        return f"{change(Path(path))}:{function}" if path.endswith(".py") else target

    names = [spec.name for spec in dataclasses.fields(config)]  # type: ignore[arg-type]
    values = {name: changed(getattr(config, name)) for name in names}
    if isinstance(config, PPOConfig):
        targets = [(spec, parse_source(spec)[1]) for spec in config.reward]
        values["reward"] = tuple(spec.removesuffix(target) + changed_target(target) for spec, target in targets)
    if isinstance(config, LogConfig) and config.sink is not None:
        values["sink"] = changed_target(config.sink)
    return type(config)(**values)
