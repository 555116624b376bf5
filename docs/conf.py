"""Configuration of the documentation; `make docs` builds it into build/docs, without a network."""

import sys
from pathlib import Path

import rlhf

sys.path.insert(0, str(Path(__file__).parent))

project = "rlhf"
author = "the rlhf developers"
copyright = "2026, the rlhf developers"  # noqa: A001  (Sphinx's name)
release = version = rlhf.__version__

extensions = ["myst_parser", "sphinx_rlhf"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["sphinx_rlhf"]
nitpicky = True
add_module_names = False
maximum_signature_line_length = 80
smartquotes = False

html_theme = "furo"
html_title = "rlhf"
html_static_path = ["_static"]
html_css_files = ["rlhf.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def setup(app):
    """Enter the pages bring_your_*.md, as many as there are, into the index."""
    pages = sorted(path.stem for path in Path(__file__).parent.glob("bring_your_*.md"))

    def replace(app, name, source):
        if name == "index":
            source[0] = source[0].replace("BRING_YOUR_PAGES\n", "".join(f"{page}\n" for page in pages))

    app.connect("source-read", replace)
