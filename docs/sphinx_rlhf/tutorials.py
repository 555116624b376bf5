"""Tutorials: the scripts of `examples/`, run when the documentation is built, with what they print and draw."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from .api import write_if_changed
from .source import ROOT

_RUNNER = Path(__file__).with_name("run_cells.py")


def setup(app: Sphinx) -> None:
    """Run the scripts and write the pages when the build begins."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "tutorials"))


def write_pages(folder: Path) -> None:
    """Write a page for every script; scripts run again when they or the library have changed."""
    folder.mkdir(parents=True, exist_ok=True)
    scripts = sorted((ROOT / "examples").glob("*.py"))
    folders = {script: _folder_of(script) for script in scripts}
    if missing := {script: work for script, work in folders.items() if not (work / "cells.json").is_file()}:
        _run(missing)
    pages = {script: _page(script, work, folder) for script, work in folders.items()}
    for script, text in pages.items():
        write_if_changed(folder / f"{script.stem}.md", text)
    for old in folder.glob("*.md"):
        if old.stem not in {"index", *(script.stem for script in scripts)}:
            old.unlink()
    listed = "\n".join(script.stem for script in scripts)
    write_if_changed(folder / "index.md", f"{_INDEX}\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n")


_INDEX = """# Tutorials

Each tutorial is a script in `examples/`. Building this documentation runs it, and the outputs on its page are what it
printed. All of them run on a CPU, in seconds. Open one in an editor that knows `# %%` cells, or run it with `python`.
"""


def _page(script: Path, work: Path, folder: Path) -> str:
    results = json.loads((work / "cells.json").read_text())
    for cell in results:
        for name in cell["figures"]:
            shutil.copyfile(work / name, folder / name)
    parts = [_render(cell) for cell in results]
    download = f"{{download}}`{script.name} <../../examples/{script.name}>`"
    return "\n\n".join((*parts, f"---\n\nThe script: {download}.")) + "\n"


def _folder_of(script: Path) -> Path:
    """Return the folder of what the script writes, which depends on its text and on the library's."""
    digest = _digest([script, _RUNNER, *sorted((ROOT / "rlhf").rglob("*.py"))])
    return ROOT / "build" / "examples" / f"{script.stem}-{digest}"


def _run(folders: Mapping[Path, Path]) -> None:
    """Run scripts in their folders, in place of what they wrote before."""
    for script, work in folders.items():
        for old in work.parent.glob(f"{script.stem}-*"):
            shutil.rmtree(old)
        work.mkdir(parents=True)
    command = [sys.executable, str(_RUNNER), *(str(path) for pair in folders.items() for path in pair)]
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        failed = ", ".join(script.name for script, work in folders.items() if not (work / "cells.json").is_file())
        raise ExtensionError(f"{failed}: failed:\n{done.stderr[-3000:]}")


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _render(cell: dict[str, str]) -> str:
    if cell["kind"] == "markdown":
        return cell["source"]
    source = re.sub(r"  # (noqa|fmt|isort).*", "", cell["source"])  # for the linter, not for readers
    parts = [f"```python\n{source}\n```"]
    if cell["output"].strip():
        parts.append(f":::{{code-block}} text\n:class: output\n\n{cell['output'].rstrip()}\n:::")
    parts += [f"![What the cell draws]({name})" for name in cell["figures"]]
    return "\n\n".join(parts)
