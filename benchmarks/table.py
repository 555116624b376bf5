"""The tables of README.md, made from the JSON files of whole runs that docs/results/benchmarks keeps.

There is a folder for each kind of CPU, because what its bf16 units are decides more than anything else.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import material

ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks" / "README.md"
RECORD = ROOT / "docs" / "results" / "benchmarks"
"""A folder for each kind of machine, with the JSON files as `python -m benchmarks` wrote them."""
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->\n"
_HEADINGS = ("work", "peer", "ours", "peer's", "ratio", "aim", "of the roofline")
_ALIKE = ("cpu", "cores", "bf16_units", "torch", "peers")
"""Facts of the machine that must be the same in all files of a folder."""


def run(folder: Path | None, programs: Sequence[str]) -> None:
    """Keep the files of a run, if there is one, and write README.md's tables anew.

    Raises:
        SystemExit: there is nothing to keep, or files of a folder are of different machines.
    """
    if folder is not None:
        keep(folder, RECORD, programs)
    README.write_text(replace(README.read_text(encoding="utf-8"), tables(RECORD, programs)), encoding="utf-8")


def keep(folder: Path, record: Path, programs: Sequence[str]) -> None:
    """Copy the files of a run on the CPU to the record; each takes the place of an earlier run's."""
    found = _files(folder, programs)
    if not found:
        raise SystemExit(f"python -m benchmarks table {folder}: the folder holds no results such as sft-small-cpu.json")
    for path in found:
        units = json.loads(path.read_text())["machine"]["bf16_units"]
        (record / units).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, record / units / path.name)


def replace(text: str, made: str) -> str:
    """Return a page with the tables between its two marks."""
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + made + _END + rest.partition(_END)[2]


def tables(record: Path, programs: Sequence[str]) -> str:
    """Return a line of origin and a table for each folder of the record."""
    kinds = [_files(folder, programs) for folder in sorted(record.glob("*"))]
    return "\n".join(_table([json.loads(path.read_text()) for path in paths]) for paths in kinds if paths)


def _files(folder: Path, programs: Sequence[str]) -> list[Path]:
    """Return the results of these programs in their order, without those of the tests' size."""
    sizes = [size for size in material.SIZES if size != "tiny"]
    paths = [folder / f"{program}-{size}-cpu.json" for program in programs for size in sizes]
    return [path for path in paths if path.is_file()]


def _table(results: list[dict[str, Any]]) -> str:
    lines = [_origin(results), "", f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for result in results for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _origin(results: list[dict[str, Any]]) -> str:
    """Return where the figures come from.

    Raises:
        SystemExit: they come from several machines.
    """
    machine, *others = (result["machine"] for result in results)
    for name in _ALIKE:
        if found := {other[name] for other in others} - {machine[name]}:
            both = f"{machine[name]} and {', '.join(found)}"
            raise SystemExit(f"python -m benchmarks table: {name} differs between files: {both}; run all of them again")
    rounds = sorted({len(row["seconds"]["ours"]) for result in results for row in result["rows"] if "seconds" in row})
    days = sorted({result["taken"][:10] for result in results})
    commits = sorted({re.sub("([0-9a-f]{9})[0-9a-f]*", r"\1", result["machine"]["commit"]) for result in results})
    medians = f"; medians of {' or '.join(map(str, rounds))} rounds [lowest to highest]" if rounds else ""
    return (
        f"{machine['cores']} cores, {machine['cpu']} (bf16 units: {machine['bf16_units']}), torch {machine['torch']}, "
        f"{machine['peers']}; {' and '.join(days)}, commit {' and '.join(commits)}{medians}."
    )


def _cells(row: dict[str, Any]) -> list[str]:
    sides = [
        f"{row[f'{side}, ms']} ms" if "ours, ms" in row else f"{row[f'{side}, MB']:.0f} MB" for side in ("ours", "peer")
    ]
    roofline = f"{row['of roofline']:.2f}" if "of roofline" in row else ""
    return [row["work"], row["peer"], *sides, f"{row['ratio']:.2f}", _aim(row), roofline]


def _aim(row: dict[str, Any]) -> str:
    """Return the ratio to reach, nothing where there is none, and whether it is missed.

    Rates are to be above it; where rows have none, their times or memory are to be below.
    """
    if not row["target"]:
        return ""
    missed = row["ratio"] < row["target"] if "ours, tokens/s" in row else row["ratio"] > row["target"]
    return f"{row['target']:g}{', missed' if missed else ''}"
