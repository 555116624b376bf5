"""Reference pages of the public modules, written from their syntax trees before Sphinx reads its sources."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sphinx.application import Sphinx

from .docstrings import first_line, inline, to_markdown
from .source import ROOT

PUBLIC_FOLDERS = ("rlhf",)
"""Folders whose modules are all public: the mathematics, and the tables of settings, stages and metrics."""

PUBLIC_MODULES = (
    "rlhf.data.schema",
    "rlhf.distributed.parameter_server",
    "rlhf.evaluate.judges",
    "rlhf.execution.program",
    "rlhf.io.user_log",
    "rlhf.models.architecture",
    "rlhf.models.gpt2",
    "rlhf.monitor.health",
    "rlhf.monitor.thresholds",
    "rlhf.train.observers",
    "rlhf.train.pipeline",
)
"""Public modules of other folders, beside those whose names `rlhf` has."""


class Entry(NamedTuple):
    """A public name."""

    module: str
    name: str
    docstring: str
    node: ast.stmt

    @property
    def full_name(self) -> str:
        """The name with its module."""
        return f"{self.module}.{self.name}"


def path_of(module: str) -> str:
    """Return the file of a module, relative to the repository."""
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


def exported() -> dict[str, str]:
    """Return the names of `rlhf`, each with the module or object that it is."""
    names = {}
    for node in ast.parse((ROOT / "rlhf/__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.name] = f"rlhf.{node.module}.{alias.name}" if node.module else f"rlhf.{alias.name}"
    return names


def public_modules() -> list[str]:
    """Return the public modules: those of the core, those that `rlhf` has names of, and those to extend it with."""
    core = {f"rlhf.{path.stem}" for path in (ROOT / "rlhf").glob("*.py") if not path.stem.startswith("_")}
    of_names = {name.rpartition(".")[0] for name in exported().values()} - {"rlhf", "rlhf.models"}
    return sorted(core | of_names | set(PUBLIC_MODULES))


def entries_of(module: str) -> list[Entry]:
    """Return the public functions, classes and constants that a module defines, in its order."""
    body = ast.parse((ROOT / path_of(module)).read_text()).body
    found = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, docstring = node.name, ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if not isinstance(target, ast.Name):
                continue
            name, docstring = target.id, _string(following)
        else:
            continue
        if not name.startswith("_"):
            found.append(Entry(module, name, docstring, node))
    return found


def _string(node: ast.stmt | None) -> str:
    """Return the text of a string that stands alone after an assignment."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""


def setup(app: Sphinx) -> None:
    """Write the pages when the build begins."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "reference" / "api"))
    app.connect("missing-reference", _resolve_exported)


def _resolve_exported(app: Sphinx, env, node, content):
    """Resolve `rlhf.gae`, and any other name that a module has from another one, to where it is defined."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or not module.startswith("rlhf"):
        return None
    try:
        found = getattr(importlib.import_module(module), name)
        target = f"{found.__module__}.{found.__qualname__}"
    except (ImportError, AttributeError):
        return None
    domain, page = env.get_domain("py"), node.get("refdoc", env.docname)
    return domain.resolve_xref(env, page, app.builder, "obj", target, node, content)


def write_pages(folder: Path) -> None:
    """Write a page for every public module, and their index, where the text has changed."""
    modules = {module: entries_of(module) for module in public_modules()}
    known = {entry.full_name for entries in modules.values() for entry in entries}
    pages = {module: _module_page(module, entries, known) for module, entries in modules.items()}
    pages["index"] = _index_page(modules)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        write_if_changed(folder / f"{name}.md", text)


def write_if_changed(path: Path, text: str) -> None:
    """Write a file unless it has that text, so that Sphinx reads only what has changed."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


class _Linker:
    """What a name in backticks refers to, as seen from one module."""

    def __init__(self, module: str, known: set[str]) -> None:
        self._module, self._known, self._exported = module, known, exported()

    def __call__(self, name: str) -> str | None:
        for candidate in (name, f"{self._module}.{name}", self._exported.get(name.removeprefix("rlhf."), "")):
            if candidate in self._known:
                return candidate
        return None


def _module_page(module: str, entries: list[Entry], known: set[str]) -> str:
    linker, path = _Linker(module, known), path_of(module)
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    parts = [f"# {module}", to_markdown(docstring, link=linker), f"{{src}}`Source <{path}>`"]
    for entry in entries:
        if isinstance(entry.node, ast.FunctionDef):
            parts.append(_function(entry, linker, path))
        elif isinstance(entry.node, ast.ClassDef):
            parts.append(_class(entry, linker, path))
        else:
            text = inline(entry.docstring, linker) if entry.docstring else ""
            parts.append(_directive("data", entry.name, module, text, ":::"))
    return "\n\n".join(parts) + "\n"


def _directive(kind: str, signature: str, module: str, body: str, fence: str) -> str:
    return f"{fence}{{py:{kind}}} {signature}\n:module: {module}\n\n{body}\n{fence}"


def _function(entry: Entry, linker: _Linker, path: str) -> str:
    node = entry.node
    assert isinstance(node, ast.FunctionDef)
    body = to_markdown(entry.docstring, link=linker, annotations=_annotations(node))
    body += f"\n\n{{src}}`source <{path}:{entry.name}>`"
    return _directive("function", f"{entry.name}({_arguments(node)})", entry.module, body, ":::")


def _class(entry: Entry, linker: _Linker, path: str) -> str:
    node = entry.node
    assert isinstance(node, ast.ClassDef)
    parts = [to_markdown(entry.docstring, link=linker), *_fields(node, linker)]
    initialiser = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            body = to_markdown(ast.get_docstring(method) or "", link=linker, annotations=_annotations(method))
            is_property = any(getattr(d, "id", "") == "property" for d in method.decorator_list)
            signature = f"{entry.name}.{method.name}" + ("" if is_property else f"({_arguments(method, skip=1)})")
            kind = "property" if is_property else "method"
            parts.append(_directive(kind, signature, entry.module, body, ":::"))
    parts.append(f"{{src}}`source <{path}:{entry.name}>`")
    arguments = f"({_arguments(initialiser, skip=1)})" if initialiser else ""
    return _directive("class", entry.name + arguments, entry.module, "\n\n".join(filter(None, parts)), "::::")


def _fields(node: ast.ClassDef, linker: _Linker) -> Iterator[str]:
    """Yield a list of the fields of a record, with types, defaults and meanings."""
    lines = []
    for field, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_":
            default = f", default `{ast.unparse(field.value)}`" if field.value else ""
            text = inline(" ".join(_string(following).split()), linker)
            lines.append(f"- `{field.target.id}` (`{ast.unparse(field.annotation)}`{default}): {text}".rstrip(": "))
    if lines:
        yield "**Fields**\n\n" + "\n".join(lines)


def _arguments(node: ast.FunctionDef, skip: int = 0) -> str:
    """Return the arguments of a signature, without annotations."""
    spec = node.args
    positional = spec.args[
        skip if not any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list) else 0 :
    ]
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    shown = [_argument(a.arg, default) for a, default in zip(positional, defaults[-len(positional) :], strict=True)]
    if spec.vararg:
        shown.append(f"*{spec.vararg.arg}")
    elif spec.kwonlyargs:
        shown.append("*")
    shown += [_argument(a.arg, default) for a, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    if spec.kwarg:
        shown.append(f"**{spec.kwarg.arg}")
    return ", ".join(shown)


def _argument(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def _annotations(node: ast.FunctionDef) -> dict[str, str]:
    arguments = [*node.args.args, *node.args.kwonlyargs]
    return {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation is not None}


def _index_page(modules: dict[str, list[Entry]]) -> str:
    documented = {entry.full_name: entry for entries in modules.values() for entry in entries}
    lines = [
        "# API",
        "Names of `rlhf` itself come first; each is loaded from its module when it is first used. "
        "The modules that follow are public, too: see [what is public](../../contributing.md#what-is-public).",
        "## `rlhf`",
        "| name | what it does or is |\n|---|---|",
    ]
    rows = []
    for name, target in exported().items():
        if target in documented:
            entry = documented[target]
            text = first_line(entry.docstring) or f"Constant of `{entry.module}`."
            rows.append(f"| {{py:obj}}`{name} <{target}>` | {inline(text, lambda _: None)} |")
        else:
            module = target if target in modules else f"rlhf.models.{name}" if name == "gpt2" else target
            page = module if module in modules else "rlhf.train.pipeline"
            rows.append(f"| [`{name}`]({page}.md) | The module `{module}`. |")
    lines[-1] += "\n" + "\n".join(rows)
    lines += ["## Modules", "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(modules) + "\n```"]
    return "\n\n".join(lines) + "\n"
