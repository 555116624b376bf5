"""Tutorials: the scripts of `examples/`, run when the documentation is built, with what they print and draw."""

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
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
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pages = dict(zip(scripts, pool.map(lambda script: _page(script, folder), scripts), strict=True))
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


def _page(script: Path, folder: Path) -> str:
    work = _run(script)
    results = json.loads((work / "cells.json").read_text())
    for cell in results:
        for name in cell["figures"]:
            shutil.copyfile(work / name, folder / name)
    parts = [_render(cell) for cell in results]
    download = f"{{download}}`{script.name} <../../examples/{script.name}>`"
    return "\n\n".join((*parts, f"---\n\nThe script: {download}.")) + "\n"


def _run(script: Path) -> Path:
    """Return the folder with what the script wrote and the results of its cells, after running it if necessary."""
    digest = _digest([script, _RUNNER, *sorted((ROOT / "rlhf").rglob("*.py"))])
    work = ROOT / "build" / "examples" / f"{script.stem}-{digest}"
    if (work / "cells.json").is_file():
        return work
    for old in work.parent.glob(f"{script.stem}-*"):
        shutil.rmtree(old)
    work.mkdir(parents=True)
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(work / "cache")}
    command = [sys.executable, str(_RUNNER), str(script), "cells.json", script.stem]
    done = subprocess.run(command, cwd=work, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExtensionError(f"{script.relative_to(ROOT)} failed:\n{done.stderr[-3000:]}")
    return work


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
