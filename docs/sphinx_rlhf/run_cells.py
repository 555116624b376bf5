"""Run scripts of `# %%` cells, each in its folder, and write what their cells print and draw to cells.json there.

python run_cells.py SCRIPT FOLDER [SCRIPT FOLDER ...]

A script runs in a process that is forked from this one, so that torch is imported once for all of them.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path


def split_cells(text: str) -> list[tuple[str, str, int]]:
    """Return (kind, source, line before it) of the cells of a script; what stands before the first one is left out."""
    marks = list(re.finditer(r"^# %%( \[markdown\])?\n", text, re.MULTILINE))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    cells = []
    for mark, end in zip(marks, ends, strict=True):
        kind, source = "markdown" if mark.group(1) else "code", text[mark.end() : end].strip("\n")
        if kind == "markdown":
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
        cells.append((kind, source, text[: mark.end()].count("\n")))
    return cells


def main(words: Sequence[str]) -> int:
    """Run the scripts, two at a time, and return 1 if one of them failed."""
    import matplotlib.pyplot  # noqa: F401
    import torch  # noqa: F401

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_script, args=pair) for pair in zip(words[::2], words[1::2], strict=True)]
    waiting, running = list(processes), []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(waiting.pop(0))
            running[-1].start()
        wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
    return int(any(process.exitcode for process in processes))


def run_script(script: str, folder: str) -> None:
    """Run the cells of a script in order, in one namespace."""
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
    namespace: dict[str, object] = {"__name__": "__main__"}
    sys.path.insert(0, str(Path(script).parent))
    results = []
    for kind, source, line in split_cells(Path(script).read_text()):
        output, figures = "", []
        if kind == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + source, script, "exec"), namespace)
            output, figures = printed.getvalue(), _save_figures(Path(script).stem, len(results))
        results.append({"kind": kind, "source": source, "output": output, "figures": figures})
    Path("cells.json").write_text(json.dumps(results))


def _save_figures(prefix: str, cell: int) -> list[str]:
    import matplotlib.pyplot as plt

    names = []
    for number in plt.get_fignums():
        names.append(f"{prefix}-{cell}-{number}.svg")
        plt.figure(number).savefig(names[-1], bbox_inches="tight", facecolor="white")
    plt.close("all")
    return [Path(name).name for name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
