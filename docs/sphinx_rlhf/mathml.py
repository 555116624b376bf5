"""Equations as MathML, which every browser draws without a script from the network."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)
_SYNONYMS = {
    r"\dots": r"\ldots",
    r"\texttt": r"\text",
    r"\lVert": r"\|",
    r"\rVert": r"\|",
    r"\bigm": r"\big",
    r"\tfrac": r"\frac",
}
"""Commands that docutils does not know, with what it calls them."""


def setup(app: Sphinx) -> None:
    """Register the renderer under the name `mathml`."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))


def _visit_inline(writer, node) -> None:
    writer.body.append(_mathml(node))
    raise nodes.SkipNode


def _visit_block(writer, node) -> None:
    writer.body.append(f'<div class="equation">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def _mathml(node, **options) -> str:
    """Return the markup of an equation; one that cannot be read is a warning."""
    text = re.sub(r"\\[A-Za-z]+", lambda match: _SYNONYMS.get(match.group(), match.group()), node.astext())
    try:
        return tex2mathml(text, **options)
    except MathError as error:
        _logger.warning("equation %r: %s", text, error, location=node)
        return ""
