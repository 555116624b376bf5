"""Run a script of `# %%` cells and write what each of them prints and draws as JSON.

python run_cells.py SCRIPT RESULT.json FIGURE_PREFIX
"""

import contextlib
import io
import json
import re
import sys
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


def main(script: str, result: str, prefix: str) -> None:
    """Run the cells in order, in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    sys.path.insert(0, str(Path(script).parent))
    results = []
    for kind, source, line in split_cells(Path(script).read_text()):
        output, figures = "", []
        if kind == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + source, script, "exec"), namespace)
            output, figures = printed.getvalue(), _save_figures(prefix, len(results))
        results.append({"kind": kind, "source": source, "output": output, "figures": figures})
    Path(result).write_text(json.dumps(results))


def _save_figures(prefix: str, cell: int) -> list[str]:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    names = []
    for number in plt.get_fignums():
        names.append(f"{prefix}-{cell}-{number}.svg")
        plt.figure(number).savefig(names[-1], bbox_inches="tight", facecolor="white")
    plt.close("all")
    return [Path(name).name for name in names]


if __name__ == "__main__":
    main(*sys.argv[1:])
