"""Command lines before tyro reads them: repeated flags are joined, and numbers out of range are refused."""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from rlhf.cli.help import Help, help_of_flags

import rlhf
from rlhf.errors import UserError
from rlhf.ranges import bounds_of, range_error

_Config = TypeVar("_Config")


def parse_arguments(
    kind: type[_Config],
    argv: Sequence[str],
    *,
    about: Help,
    default: Callable[[Sequence[str]], _Config] | None = None,
) -> _Config:
    """Return the configuration of a command line. Prints the help and exits, or prints errors and exits with code 2.

    Args:
        kind: the dataclass whose fields are the flags.
        argv: the words after the program's name.
        about: the program's name and help.
        default: arguments -> the configuration below the flags.

    Raises:
        UserError: a number is out of its range.
    """
    if "--version" in argv:
        print(f"{about.prog.split(maxsplit=1)[0]} {rlhf.__version__}")
        raise SystemExit(0)
    arguments = join_flags(kind, argv)
    _check_aliases(kind, arguments)
    base = kind() if default is None else default(arguments)
    if {"-h", "--help"} & set(argv):
        print(help_of_flags(about, kind, base))
        raise SystemExit(0)
    return tyro.cli(kind, prog=about.prog, default=base, args=arguments)


_ALIASES = {
    "lr": "learning-rate", "batch": "batch-size", "bs": "batch-size", "epoch": "epochs", "iterations": "num-iterations",
    "steps": "max-steps", "kl": "kl-coef", "beta": "kl-coef", "workers": "num-workers", "max-tokens": "max-new-tokens",
    "wd": "weight-decay", "warmup": "warmup-fraction",
}  # fmt: skip
"""Last parts of flags by other names, which other programs have for them."""


def _check_aliases(kind: type, arguments: Sequence[str]) -> None:
    """Raise UserError for a flag that is known by another name."""
    known = {flag for flag, _ in flag_types(kind)}
    for word in arguments:
        flag = word.partition("=")[0]
        section, dot, last = flag.removeprefix("--").rpartition(".")
        name = f"--{section}{dot}{_ALIASES.get(last, last)}"
        if flag.startswith("--") and flag not in known and name in known:
            raise UserError(f"{flag}: is called {name} here")


def join_flags(kind: type, argv: Sequence[str]) -> list[str]:
    """Return a command line in which no flag is repeated. The values of list flags are joined in order.

    If a flag with a single value is repeated, the last value is used, with a line on stderr if the values differ.

    Raises:
        UserError: a number is out of its range.
    """
    hints = dict(flag_types(kind))
    joined: list[list[str]] = []
    positions: dict[str, int] = {}
    for flag, *values in _by_flag(argv):
        name = flag if flag in hints else flag.replace("--no-", "--").replace(".no-", ".")
        hint = hints.get(name)
        if "" in values and _takes_names(hint):
            raise UserError(f"{name}: is empty (a variable that is not set?); give a name, or leave the flag out")
        if name not in positions or hint is None:
            positions[name] = len(joined)
            joined.append([flag, *values])
        elif tuple in [get_origin(option) for option in (hint, *get_args(hint))]:
            joined[positions[name]] += values
        elif joined[positions[name]] != [flag, *values]:
            before, joined[positions[name]] = joined[positions[name]], [flag, *values]
            print(f"given twice: {' '.join(before)} and {' '.join([flag, *values])}; the last counts", file=sys.stderr)
        if len(values) == 1 and (problem := _number_error(hint, values[0])):
            raise UserError(f"{name} {values[0]}: {_field(name)} must be {problem}, got {values[0]!r}")
        if len(values) == 1 and (expected := range_error(bounds_of(hint), _number(hint, values[0]))):
            raise UserError(f"{name} {values[0]}: {_field(name)} must be {expected}, got {values[0]}")
    return [word for words in joined for word in _flag_words(words)]


def _by_flag(argv: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words before the flags, and then each flag, with hyphens for underscores, and its values."""
    words = [""]
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            yield words
            flag, equals, value = word.partition("=")
            words = [flag.replace("_", "-"), *([value] if equals else [])]
        else:
            words.append(word)
    yield words


def _flag_words(words: Sequence[str]) -> list[str]:
    """Return a flag and its values as words of a command line. After =, the first value may begin with a hyphen."""
    flag, *values = words
    if any(value.startswith("--") for value in values[1:]):
        raise UserError(f"{flag}: of several values only the first may begin with --")
    if values and values[0].startswith("-"):
        return [f"{flag}={values[0]}", *values[1:]]
    return [flag, *values] if flag else values


def _number(hint: Any, text: str) -> float | None:
    """Return the number in the text of a flag, or None if tyro should refuse it."""
    kind = next((get_args(option)[0] for option in _options(hint) if get_origin(option) is Annotated), str)
    try:
        return kind(text) if kind in (int, float) else None
    except ValueError:
        return None


def _number_error(hint: Any, text: str) -> str:
    """Return what a flag for one number expects if the text is none; else empty."""
    kinds = {(get_args(option) or (option,))[0] for option in _options(hint)}
    if not kinds <= {int, float, type(None)} or not kinds & {int, float} or text == "None":
        return ""
    kind: type = float if float in kinds else int
    try:
        kind(text)
    except ValueError:
        return ("a number" if kind is float else "a whole number") + (" or None" if type(None) in kinds else "")
    return ""


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or else the annotation itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _takes_names(hint: Any) -> bool:
    """Return True if a flag takes paths or names, which cannot be empty."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType, tuple) else (hint,)
    return Path in options or (str in options and type(None) in options)


def _field(flag: str) -> str:
    return flag.rpartition(".")[2].removeprefix("--").replace("-", "_")


def flag_types(kind: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yield the flag and annotation of every field of a dataclass and of those within it."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from flag_types(hint, f"{flag}.")  # type: ignore[arg-type]
        else:
            yield flag, hint
