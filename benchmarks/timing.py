"""Paired timings: every variant once per round, in turn, so that whatever else the machine does hits all alike."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.environment import pinned
from rlhf.io.provenance import code_commit

console = Console() if sys.stdout.isatty() else Console(width=200)


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each round by variant; the order is turned round in every other round, `before` is not timed."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        names = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in names:
            before()
            begun = time.perf_counter()
            variants[name]()
            if number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes, in seconds."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "low": low, "high": high, "min": min(times), "max": max(times)}


def spread(times: list[float]) -> str:
    """Median and extremes, in milliseconds."""
    median, low, high = (_digits(1e3 * summary(times)[name]) for name in ("median", "min", "max"))
    return f"{median} [{low} to {high}]"


def _digits(value: float) -> str:
    """Four of them, without an exponent."""
    return f"{float(f'{value:.4g}'):.12g}"


def ratio(times: list[float], reference: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def loopback_bytes() -> int:
    """Bytes that processes of this machine have sent each other through connections."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def machine() -> dict[str, str]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in facts.get("flags", "").split()]
    return {
        "cpu": facts.get("model name", platform.processor()),
        "bf16_units": units[0] if units else "none",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "ray", "numpy")},
        "peers": pinned(),
        "commit": code_commit(Path(__file__).parent) or "unknown",
    }


def report(name: str, rows: list[dict[str, Any]], output: Path) -> Path:
    """Print a table and write it as JSON; return the JSON file's path."""
    show(name, rows)
    return write(name, rows, output)


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a table; cells that hold lists or more are left out."""
    headings = [heading for heading, cell in rows[0].items() if not isinstance(cell, list | dict)]
    table = Table(*headings, title=name)
    for row in rows:
        cells = (row[heading] for heading in headings)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


def write(name: str, rows: list[dict[str, Any]], output: Path) -> Path:
    """Write rows as JSON, with the machine and the date; return its path."""
    output.mkdir(parents=True, exist_ok=True)
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"taken": taken, "machine": machine(), "rows": rows}
    path = output / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
