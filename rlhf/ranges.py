"""Sections of settings, whose ranges and paths are seen to when one is made. Imports only the standard library."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Interval:
    """A range of numbers in a type annotation: `Annotated[float, Interval("(0, 1]")]`."""

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = (float(part) if "inf" in part or "." in part else int(part) for part in self.text[1:-1].split(","))
        above = value > low if self.text[0] == "(" else value >= low
        return above and (value < high if self.text[-1] == ")" else value <= high)

    def __str__(self) -> str:
        low, high = (part.strip() for part in self.text[1:-1].split(","))
        if high == "inf":
            return f"at least {low}" if self.text[0] == "[" else f"above {low}"
        return f"in {self.text}"


Count = Annotated[int, Interval("[1, inf)")]
Index = Annotated[int, Interval("[0, inf)")]
Fraction = Annotated[float, Interval("[0, 1]")]
Share = Annotated[float, Interval("[0, 1)")]
Positive = Annotated[float, Interval("(0, inf)")]
PositiveOrInf = Annotated[float, Interval("(0, inf]")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Seed = Annotated[int, Interval("[0, 18446744073709551615]")]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A dataclass whose annotated ranges are checked, and whose paths may begin with ~, when it is made."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value, interval = getattr(self, name), _interval(hint)
            if interval is not None and value is not None and value not in interval:
                finite = "finite and " if value == math.inf else ""
                raise ValueError(f"{name} must be {finite}{interval}, got {value}")
            object.__setattr__(self, name, _expanded(value))


def _expanded(value: Any) -> Any:
    """Paths with the home folder for ~, as a shell does it, but not in YAML or after `--flag=`; others as they are."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # nobody's home: a name that begins with ~
            return value.expanduser()
    return value


def _interval(hint: Any) -> Interval | None:
    if get_origin(hint) is Annotated:
        return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Interval)), None)
    return next((found for part in get_args(hint) if (found := _interval(part))), None)
