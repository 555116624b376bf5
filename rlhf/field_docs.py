"""Documentation of a record's fields: the strings under them in the source, which `help` does not show by itself."""

import ast
import functools
import inspect
import sys
from typing import TypeVar

_Record = TypeVar("_Record")


def documented(kind: type[_Record]) -> type[_Record]:
    """Decorate a NamedTuple or dataclass so that `help` shows the strings under its fields.

    Fields of a NamedTuple get them in place of "Alias for field number 0"; the docstring of a dataclass gets a section
    `Attributes:`. Without source code nothing changes.

    Example:
        >>> rlhf.Completions.ended.__doc__
        '[B] bool, True where a stop token was drawn.'
    """
    docs = field_docs(kind)
    for name, text in docs.items():
        if name in getattr(kind, "_fields", ()):
            getattr(kind, name).__doc__ = text
    if docs and not hasattr(kind, "_fields"):
        attributes = "\n".join(f"    {name}: {text}" for name, text in docs.items())
        kind.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}\n\nAttributes:\n{attributes}\n"
    return kind


def field_docs(kind: type) -> dict[str, str]:
    """Return the string under each field of a class, by the field's name, as one line of text.

    Fields of base classes come first. Fields without a string are left out.

    Example:
        >>> field_docs(rlhf.Completions)["ended"]
        '[B] bool, True where a stop token was drawn.'
    """
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if "__annotations__" in vars(base):
            docs |= _docs_by_class(base.__module__).get(base.__qualname__, {})
    return docs


@functools.cache
def _docs_by_class(module: str) -> dict[str, dict[str, str]]:
    """Return the strings under the fields of every class of a module; none where there is no source code."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        return {}
    return {node.name: _docs_of(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for statement, follower in zip(node.body, node.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match follower:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = " ".join(text.split())
    return docs
