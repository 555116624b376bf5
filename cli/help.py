"""The text of --help: flags in groups, those that are set most first, examples, and the page of the documentation."""

import dataclasses
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf.config import ComputeConfig, PipelineRun, RunConfig
from rlhf.field_docs import field_docs
from rlhf.stages import STAGES

_FIRST = (
    "model_path", "reward", "epochs", "num_iterations", "batch_size", "learning_rate", "kl_coef", "max_new_tokens",
    "device", "precision", "threads",
)  # fmt: skip
"""Settings that are set most: they lead their section."""

_INDENT, _MAX_WIDTH, _MOST_IN_LINE = " " * 6, 100, 8
_SPACE = "\N{NO-BREAK SPACE}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Help:
    """Texts of a program's help, besides its flags."""

    prog: str
    """Name of the program, with its command."""
    description: str
    """Purpose of the program, in one or two sentences."""
    usage: str
    """Docstring of the program's module; its lines that begin with `prog` are the examples."""
    page: str
    """Page of the documentation, by its path in the repository."""


def help_of_flags(about: Help, kind: type, values: Any) -> str:
    """Return the help of a program whose flags are the fields of a dataclass.

    Args:
        about: texts of the program.
        kind: the dataclass.
        values: object of the dataclass, whose values are the defaults.
    """
    parts = [f"usage: {about.prog} [FLAGS]", _fill(about.description), *_groups(kind, values), *_end(about)]
    return "\n\n".join(parts)


def help_of_commands(about: Help, commands: Mapping[str, str]) -> str:
    """Return the help of a program with commands, each with a line that describes it."""
    width = max(map(len, commands)) + 4
    lines = [_fill(f"  {name:{width - 2}}{text}", " " * width) for name, text in commands.items()]
    parts = [
        f"usage: {about.prog} {{{','.join(commands)}}} [FLAGS]",
        _fill(about.description),
        "commands:\n" + "\n".join(lines),
        _fill(f"{about.prog} {next(iter(commands))} --help shows the flags of {next(iter(commands))}."),
        *_end(about),
    ]
    return "\n\n".join(parts)


def _end(about: Help) -> Iterator[str]:
    examples = [line.strip() for line in about.usage.splitlines() if line.strip().startswith(f"{about.prog} ")]
    if examples:
        yield "examples:\n" + "\n".join(_fill(f"  {line}", _INDENT, end=" \\") for line in examples)
    yield _fill(f"documentation: {about.page} in the repository of rlhf")


def _groups(kind: type, values: Any) -> Iterator[str]:
    """Yield the program's own flags, its stages' sections, those of the computation, and the shared sections."""
    hints = get_type_hints(kind, include_extras=True)
    names = _by_owner(kind)
    unused = {stage.section for stage in STAGES.values() if kind is PipelineRun and not stage.in_pipeline}
    sections = [name for name in names if dataclasses.is_dataclass(hints[name]) and name not in unused]
    computation = [name for name in names if _owner(kind, name) in (ComputeConfig, RunConfig) and name not in sections]
    own = [name for name in names if name not in (*sections, *computation, *unused)]
    parts = {name: _group(_title(name, hints[name]), hints[name], getattr(values, name), name) for name in sections}
    last = parts.pop("dist", None)
    yield _group("options:\n  -h, --help\n      Show this text.", kind, values, "", own)
    yield from parts.values()
    if computation:
        yield _group("computation:", kind, values, "", _ranked(computation))
    if last is not None:
        yield last


def _group(title: str, kind: type, values: Any, section: str, names: Sequence[str] = ()) -> str:
    """Return a title, and the flag and text of every field, or of those named."""
    hints, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
    lines = [title]
    for name in names or _ranked(_by_owner(kind)):
        text = docs[name].replace("If None,", "If omitted,") + _default(getattr(values, name))
        lines += [_fill(f"  {_invocation(section, name, hints[name])}", " " * 4), _fill(_INDENT + text, _INDENT)]
    return "\n".join(lines)


def _ranked(names: Sequence[str]) -> list[str]:
    """Return names with those of `_FIRST` in front, otherwise in their order."""
    return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def _by_owner(kind: type) -> list[str]:
    """Return the fields of a dataclass, those of derived classes before those of their bases."""
    fields = {field.name for field in dataclasses.fields(kind)}
    annotated = [name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})]
    return [name for name in dict.fromkeys(annotated) if name in fields]


def _owner(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", {}))


def _title(section: str, kind: type) -> str:
    """Return the title of a section: the first paragraph of its docstring."""
    text = (kind.__doc__ or "").split("\n\n")[0]
    return _fill(f"--{section}.*: {' '.join(text.split())}")


def _invocation(section: str, name: str, hint: Any) -> str:
    prefix, flag = f"--{section}." if section else "--", name.replace("_", "-")
    return f"{prefix}{flag}, {prefix}no-{flag}" if hint is bool else f"{prefix}{flag} {_metavar(hint)}"


def _metavar(hint: Any) -> str:
    """Return what stands for a flag's value: `INT`, `PATH`, `{a,b}` or `TEXT [TEXT ...]`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _metavar(options[0])
    if origin is Literal:
        separator = "," if len(options) <= _MOST_IN_LINE else ", "  # a long list is wrapped
        return "{" + separator.join(map(str, options)) + "}"
    if origin is tuple:
        one = _metavar(options[0])
        return f"{one} [{one} ...]"
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(option) for option in options if option is not type(None))
    return {int: "INT", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


def _default(value: Any) -> str:
    """Return the default in brackets; empty where there is none, and the text says what happens."""
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f" (default:{_SPACE}{value:g})" if isinstance(value, float) else f" (default:{_SPACE}{value})"


def _fill(text: str, indent: str = "", end: str = "") -> str:
    """Return text wrapped at the terminal's width, with `indent` before and `end` after each line break."""
    width = min(max(shutil.get_terminal_size().columns, 40), _MAX_WIDTH) - len(end)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return f"{end}\n".join(textwrap.wrap(text, width, subsequent_indent=indent, **options)).replace(_SPACE, " ")
