"""The Sphinx extension of this project: reference pages, tutorials and source pages, all made at build time."""

from typing import Any

from sphinx.application import Sphinx

from . import api, health, mathml, metrics, results, settings, source, tutorials


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the parts; where the code has changed, all pages are made again."""
    app.add_config_value("rlhf_digest", source.digest_of_code(), "env")
    for part in (api, health, mathml, metrics, results, settings, source, tutorials):
        part.setup(app)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
