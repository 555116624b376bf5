"""Documentation of a record's fields: the strings under them in the source, which `help` does not show by itself."""

import ast
import functools
import inspect
import sys
from typing import TypeVar

_Record = TypeVar("_Record")


def documented(kind: type[_Record]) -> type[_Record]:
    """Decorate a NamedTuple or dataclass so that `help` shows the strings under its fields.

    A field of a NamedTuple gets its string in place of "Alias for field number 0". The docstring of a dataclass gets a
    section `Attributes:`. Without source code, nothing changes.

    Args:
        kind: the class.

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
    """Return the string under each field of a class, by the name of the field, as one line of text.

    Fields of base classes come first. Fields without a string are left out.

    Args:
        kind: a NamedTuple or dataclass.

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
    """Return the strings under the fields of every class of a module, or none if there is no source code."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        return {}
    return {node.name: _docs_of(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of(node: ast.ClassDef) -> dict[str, str]:
    """Return the strings under the annotated names of a class, by name."""
    return {
        ast.unparse(field.target): " ".join(str(string.value.value).split())
        for field, string in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(string, ast.Expr) and isinstance(string.value, ast.Constant)
    }
