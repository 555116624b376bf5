"""Pages of source code, and the role `src` that links to a function in one: {src}`rlhf/losses.py:sft_loss`.

A link to a file or name that does not exist is a warning, and so fails the build.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

ROOT = Path(__file__).parents[2]
_logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> None:
    """Register the role and the pages."""
    app.add_role("src", _SourceRole())
    app.connect("html-collect-pages", _pages)


class _SourceRole(SphinxRole):
    """{src}`path:name`, or {src}`text <path:name>`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        title, _, target = self.text.removesuffix(">").rpartition("<")
        path, _, name = target.strip().partition(":")
        line = line_of(path, name)
        if line is None:
            _logger.warning("no such source: %s", target, location=self.get_location())
            return [nodes.literal(text=target)], []
        used = self.env.__dict__.setdefault("rlhf_sources", set())
        used.add(path)
        uri = self.env.app.builder.get_relative_uri(self.env.docname, _page_name(path))
        shown = title.strip() or (f"{name}" if name else path)
        text = nodes.inline("", shown) if title.strip() else nodes.literal("", shown)
        return [nodes.reference("", "", text, internal=True, refuri=f"{uri}#L-{line}", classes=["src"])], []


def line_of(path: str, name: str) -> int | None:
    """Return the line on which a name is defined, `Class.method` too; 1 without a name; None if there is none."""
    if not (ROOT / path).is_file():
        return None
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    node: ast.stmt | None = None
    for part in filter(None, name.split(".")):
        node = next((child for child in body if part in _names(child)), None)
        if node is None:
            return None
        body = getattr(node, "body", [])
    return 1 if node is None else node.lineno


def digest_of_code() -> str:
    """Return a digest of the library and of this extension."""
    digest = hashlib.sha256()
    for folder in ("rlhf", "cli", "docs/sphinx_rlhf", "docs/results"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _page_name(path: str) -> str:
    return f"source/{path.removesuffix('.py')}"


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    formatter = HtmlFormatter(lineanchors="L", linenos="inline", anchorlinenos=True)
    for path in sorted(app.env.__dict__.get("rlhf_sources", ())):
        code = highlight((ROOT / path).read_text(), PythonLexer(), formatter)
        body = f'<h1>{path}</h1><div class="source-page">{code}</div>'
        yield _page_name(path), {"title": path, "body": body}, "page.html"
