"""The page in one file, with its styles and scripts and, in a report, its data. It loads nothing else."""

import base64
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rlhf.io.output import check_output, write_output
from rlhf.io.run_log import finite
from rlhf.monitor.log import LogReader, read_logs
from rlhf.monitor.samples import report_samples
from rlhf.monitor.view import POINTS, metric_table, run_names, run_state, stage_curves

STYLES = ("uPlot.min.css", "style.css")
SCRIPTS = (
    "uPlot.iife.min.js", "dom.js", "source.js", "metrics.js", "curves.js", "export.js", "card.js", "curve_card.js",
    "trade_card.js", "charts.js", "tokens.js", "overview.js", "setup.js", "samples.js", "app.js",
)  # fmt: skip
"""Scripts of the page, each after those that it depends on."""

_SAMPLE_BYTES = 2_200_000
"""Bytes that a report may spend on completions; the curves of a thousand iterations take about a megabyte."""


def write_report(log_dirs: Sequence[Path], path: Path, *, overwrite: bool | None = None) -> list[LogReader]:
    """Write the page with all data in the logs so far; several runs are compared.

    Args:
        log_dirs: logs/ folders, or output folders.
        path: HTML file to write; its folder is created if missing.
        overwrite: True replaces an existing file whoever wrote it; None if the program has no such flag.

    Returns:
        The logs of the runs as they were read.

    Raises:
        UserError: a folder does not belong to a run, its log is empty, or the file cannot be written.
    """
    readers = read_logs(log_dirs)
    check_output(path, "--output-dir", overwrite=overwrite)
    write_output(path, document(_content(readers)), overwrite=overwrite)
    return readers


def document(data: dict[str, Any] | None) -> str:
    """Return the page with its data, or, for None, the page that requests data from its server."""
    styles, scripts = (tuple(map(_asset, names)) for names in (STYLES, SCRIPTS))
    return (
        _asset("index.html")
        .replace("{{policy}}", content_policy(live=data is None))
        .replace("{{styles}}", "\n".join(f"<style>{style}</style>" for style in styles))
        .replace("{{scripts}}", "\n".join(f"<script>{script}</script>" for script in scripts))
        .replace("{{data}}", _inside_script(data))
    )


@functools.cache
def content_policy(*, live: bool) -> str:
    """Return the Content-Security-Policy, which allows the scripts and styles of the page by their hashes only."""
    scripts, styles = (" ".join(map(_hash, names)) for names in (SCRIPTS, STYLES))
    connect = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; {connect}img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def to_json(value: Any) -> str:
    """Return strict JSON: numbers that are not finite are null, and lone surrogates are escaped."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace").decode()


def _content(readers: Sequence[LogReader]) -> dict[str, Any]:
    share = len(readers)
    names = run_names(readers)
    runs = []
    for reader, name in zip(readers, names, strict=True):
        curves = {stage: stage_curves(reader, stage, points=max(100, POINTS // share)) for stage in reader.stages}
        state = run_state(reader, name)
        runs.append({"state": state, "curves": curves, "samples": report_samples(reader, _SAMPLE_BYTES // share)})
    return {"now": time.time(), "runs": runs, "table": metric_table(readers)}


def _inside_script(data: Any) -> str:
    """Return JSON without `<`, so that no text can end its element or begin another."""
    return to_json(data).replace("<", "\\u003c")


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("rlhf.monitor") / "page" / name).read_text(encoding="utf-8")


def _hash(name: str) -> str:
    digest = hashlib.sha256(_asset(name).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
