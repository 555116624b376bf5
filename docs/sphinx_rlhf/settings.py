"""Settings as Sphinx's `confval` objects, from the config dataclasses: name, type and range, default, meaning."""

import ast
import dataclasses
import importlib
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rlhf.config import RunConfig
from rlhf.ranges import bounds_of
from rlhf.stages import STAGES

from .docstrings import inline


def setup(app: Sphinx) -> None:
    """Register the directives."""
    app.add_directive("settings", _Settings)
    app.add_directive("section-settings", _SectionSettings)
    app.add_directive("stage-settings", _StageSettings)


class _Settings(SphinxDirective):
    """```{settings} module:Class prefix```: the fields of a dataclass, without the sections in it."""

    required_arguments, optional_arguments, final_argument_whitespace = 1, 1, True
    option_spec = {"only": str.split}  # noqa: RUF012  (as docutils wants it)

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        kind = getattr(importlib.import_module(module), name)
        prefix = self.arguments[1] if len(self.arguments) > 1 else ""
        return self.parse_text_to_nodes(markdown_of(kind, prefix, self.options.get("only")))


class _SectionSettings(SphinxDirective):
    """The sections that all stages share."""

    def run(self) -> list[nodes.Node]:
        parts = []
        for field in dataclasses.fields(RunConfig):
            if dataclasses.is_dataclass(field.type):
                parts += [f"### `{field.name}`", inspect.getdoc(field.type) or ""]
                parts.append(markdown_of(field.type, f"{field.name}."))
        return self.parse_text_to_nodes("\n\n".join(parts), allow_section_headings=True)


class _StageSettings(SphinxDirective):
    """The section of every registered stage, and the settings that only its run has."""

    def run(self) -> list[nodes.Node]:
        parts, shown = [], {f.name for f in dataclasses.fields(RunConfig)}
        for stage in STAGES.values():
            section = next(f.type for f in dataclasses.fields(stage.config) if f.name == stage.name)
            own = [n for n in stage.files if "." not in n and n not in shown]
            shown |= set(own)
            parts += [f"### `{stage.name}`", stage.help, markdown_of(stage.config, "", only=own)]
            parts.append(markdown_of(section, f"{stage.name}."))
        return self.parse_text_to_nodes("\n\n".join(parts), allow_section_headings=True)


def markdown_of(kind: type, prefix: str, only: list[str] | None = None) -> str:
    """Return a `confval` for every field that is not itself a section."""
    hints, texts = get_type_hints(kind, include_extras=True), dict(_docstrings(kind))
    parts = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) or (only is not None and field.name not in only):
            continue
        name = prefix + (field.name.replace("_", "-") if prefix.endswith("--") else field.name)
        text = inline(" ".join(texts.get(field.name, "").split()), lambda _: None)
        value = f"`{show_type(hint)}`" if not show_range(hint) else f"`{show_type(hint)}`, {show_range(hint)}"
        parts.append(f":::{{confval}} {name}\n{value}; default `{_default(field)}`\n\n{text}\n:::")
    return "\n\n".join(parts)


def _docstrings(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass and of its bases, with the texts that follow them."""
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, following in zip(body.body, [*body.body[1:], None], strict=True):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
                yield node.target.id, inspect.cleandoc(str(following.value.value))


def show_type(hint: Any) -> str:
    """Return a type in words: `int`, `one of a, b`, `path`, `list of texts`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return show_type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is type(None) else show_type(option) for option in arguments)
    if origin is tuple:
        return f"list of {show_type(arguments[0])}"
    return {str: "text", Path: "path", bool: "true | false"}.get(hint, getattr(hint, "__name__", str(hint)))


def show_range(hint: Any) -> str:
    """Return the range of a number in words; empty if it has none."""
    return " and ".join(part for bound in bounds_of(hint) for part in _show_bound(bound))


def _show_bound(bound: Any) -> Iterator[str]:
    if isinstance(bound, Interval):
        for part in bound:
            yield from _show_bound(part)
    elif isinstance(bound, Gt):
        yield f"above {bound.gt:,}"
    elif isinstance(bound, Ge):
        yield f"at least {bound.ge:,}"
    elif isinstance(bound, Lt):
        yield "finite" if bound.lt == float("inf") else f"below {bound.lt:,}"
    elif isinstance(bound, Le):
        yield f"at most {bound.le:,}"


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, float) else str(value)
