"""The figures of a run as one line of JSON, beside those of an earlier run.

Two runs are not interleaved, and the machine may have changed between them. Where a row has a peer, which was measured
in the same rounds, the change of the ratio to it says more than the change of the time.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.timing import show

_NAMES = ("work", "what", "iteration", "phase", "peer", "ranks", "machines", "MB", "backend", "GPUs")
"""Cells that say what a row is about."""


def read(path: Path) -> dict[str, Any]:
    """Return the rows of a JSON file, or of every one in a folder, by their name.

    Raises:
        SystemExit: there is no such file, or it does not hold a benchmark's rows.
    """
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise SystemExit(f"python -m benchmarks: --against {path}: the folder holds no .json file")
    try:
        return {_name(row): row for each in paths for row in json.loads(each.read_text())["rows"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"python -m benchmarks: --against {path} is no file of results ({error!r})") from None


def report(written: list[Path], earlier: dict[str, Any]) -> None:
    """Print a comparison with earlier rows, where there are any, and the figures of this run as the last line.

    Args:
        written: JSON files of this run.
        earlier: rows by their name, as `read` returns them.
    """
    rows = {name: row for path in written for name, row in read(path).items()}
    compared = [_compared(name, row, earlier[name]) for name, row in rows.items() if name in earlier]
    if compared:
        show("this run against the earlier one", compared)
    elif earlier:
        print("No row of this run is among the earlier ones.")
    figures = {name: {"ours": figure(row), "ratio": row.get("ratio")} for name, row in rows.items()}
    print(json.dumps({"rows": figures, "against": compared}))


def figure(row: dict[str, Any]) -> float:
    """Return a row's own figure: the median time in milliseconds, or the peak in MB."""
    if "seconds" in row:
        return 1e3 * statistics.median(row["seconds"]["ours"])
    for heading in ("ours, MB", "ours ms"):
        if heading in row:
            return float(row[heading])
    return float(str(row["ms"]).split()[0])


def _compared(name: str, row: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the comparison."""
    then, now = figure(earlier), figure(row)
    compared = {"row": name, "then": then, "now": now, "now / then": now / then}
    ratios = [each.get("ratio") for each in (row, earlier)]
    if all(isinstance(each, float) for each in ratios):
        compared["ratio to the peer, now / then"] = ratios[0] / ratios[1]
    return compared


def _name(row: dict[str, Any]) -> str:
    """Return the name that a row has in every run."""
    return ", ".join(str(row[heading]) for heading in _NAMES if heading in row)
