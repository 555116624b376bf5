"""Types of settings with their ranges, and the base class of sections, which checks them. Does not import torch."""

import contextlib
import dataclasses
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from rlhf.field_docs import documented

_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""Smallest normal and largest number of float32."""

PositiveInt = Annotated[int, Ge(1), Le(2**31 - 1)]
NonNegativeInt = Annotated[int, Ge(0), Le(2**31 - 1)]
BatchSize = Annotated[int, Ge(1), Le(2**20)]
"""Number of records, rows, samples or tokens that are in memory at once."""
ProcessCount = Annotated[int, Ge(0), Le(1024)]
ThreadCount = Annotated[int, Ge(1), Le(1024)]
UnitInterval = Annotated[float, Interval(ge=0, le=1)]
HalfOpenUnitInterval = Annotated[float, Interval(ge=0, lt=1)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
PositiveFloatOrInf = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
Seconds = Annotated[float, Ge(1), Le(86_400)]
Seed = Annotated[int, Interval(ge=0, le=2**64 - 1)]

Bound = Gt | Ge | Lt | Le | Interval
"""Bound of a range in an annotation."""


def bounds_of(hint: Any) -> list[Bound]:
    """Return the bounds in an annotation, including those of an optional type.

    Args:
        hint: the annotation.

    Example:
        >>> bounds_of(PositiveInt | None)
        [Ge(ge=1), Le(le=2147483647)]
    """
    if get_origin(hint) is Annotated:
        return [extra for extra in get_args(hint)[1:] if isinstance(extra, Bound)]
    return [bound for part in get_args(hint) for bound in bounds_of(part)]


def range_error(bounds: Sequence[Bound], value: Any) -> str:
    """Return the condition that a number violates, in words, or an empty text if it is within its bounds.

    Programs compute in float32, so a float must also be within the bounds after rounding to float32, and must not be
    subnormal there.

    Args:
        bounds: the bounds, from `bounds_of`. Without bounds there is no condition.
        value: the value of the setting. Values that are not numbers are not checked.

    Example:
        >>> range_error(bounds_of(UnitInterval), 1.5), range_error(bounds_of(UnitInterval), 0.5)
        ('in [0, 1]', '')
    """
    if not bounds or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if violated := _first_violated(bounds, value):
        finite = "finite and " if value == math.inf and violated != bounds[0] else ""
        return f"{finite}{_describe(bounds[0] if finite else violated)}"
    if isinstance(value, float) and math.isfinite(value) and value != 0:
        if not _FLOAT32_MIN <= abs(value) <= _FLOAT32_MAX:
            zero = "" if _first_violated(bounds, 0.0) else "0 or "
            return f"{zero}between {_FLOAT32_MIN:.2g} and {_FLOAT32_MAX:.2g}, which float32 holds"
        if violated := _first_violated(bounds, struct.unpack("f", struct.pack("f", value))[0]):
            return f"{_describe(violated)} in float32"
    return ""


def _first_violated(bounds: Sequence[Bound], value: float) -> Bound | None:
    """Return the first bound that a value violates, or None; NaN violates every bound."""
    return next((bound for bound in bounds if not _holds(bound, value)), None)


def _holds(bound: Bound, value: Any) -> bool:
    match bound:
        case Interval():
            return all(_holds(part, value) for part in bound if isinstance(part, Bound))
        case Gt(gt=low):
            return bool(value > low)
        case Ge(ge=low):
            return bool(value >= low)
        case Lt(lt=high):
            return bool(value < high)
        case Le(le=high):
            return bool(value <= high)


def _describe(bound: Bound) -> str:
    match bound:
        case Interval():
            left = f"({bound.gt}" if bound.gt is not None else f"[{bound.ge}"
            right = f"{bound.lt})" if bound.lt is not None else f"{bound.le}]"
            return f"in {left}, {right}"
        case Gt(gt=low):
            return f"above {low}"
        case Ge(ge=low):
            return f"at least {low}"
        case Lt(lt=high):
            return f"below {high}"
        case Le(le=high):
            return f"at most {high}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of settings: checks ranges when an object is created, and accepts paths as texts and with ~."""

    def __init_subclass__(cls) -> None:
        documented(cls)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = _as_path(hint, getattr(self, name))
            if expected := range_error(bounds_of(hint), value):
                raise ValueError(f"{name} must be {expected}, got {value}")
            object.__setattr__(self, name, _expanded(value))


def _as_path(hint: Any, value: Any) -> Any:
    """Return texts as paths if the annotation is a path or a tuple of them, and other values unchanged."""
    if isinstance(value, tuple | list) and tuple[Path, ...] in (hint, *get_args(hint)):
        return tuple(map(Path, value))
    return Path(value) if isinstance(value, str) and (hint is Path or Path in get_args(hint)) else value


def _expanded(value: Any) -> Any:
    """Return paths with ~ expanded, which shells do not do after `--flag=`, and other values unchanged."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # no user of that name: a file name that begins with ~
            return value.expanduser()
    return value


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a config dataclass by its dotted name.

    Args:
        config: the dataclass, which may contain other dataclasses.
        prefix: text before every name.

    Example:
        >>> from rlhf.config import CheckpointConfig
        >>> flat_fields(CheckpointConfig(), prefix="checkpoint.")
        {'checkpoint.every': None, 'checkpoint.keep': 2}
    """
    leaves: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), prefix + spec.name
        leaves |= flat_fields(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return leaves
