"""python -m benchmarks allreduce|scaling|all [--size small|gpt2] [--output FOLDER]: the figures of README.md."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import allreduce, scaling


@dataclass(frozen=True)
class Benchmarks:
    """Measure, print a table, and write it as JSON."""

    which: tyro.conf.Positional[Literal["allreduce", "scaling", "all"]] = "all"
    """What to measure."""
    size: Literal["small", "gpt2"] = "small"
    """Of the model: 4 layers of 128, or GPT-2 with 124M parameters."""
    rounds: int = 9
    """Measured rounds."""
    output: Path = Path("outputs/benchmarks")
    """Folder for the JSON files."""


if __name__ == "__main__":
    asked = tyro.cli(Benchmarks, prog="python -m benchmarks")
    if asked.which in ("allreduce", "all"):
        allreduce.run(asked.output, rounds=asked.rounds)
    if asked.which in ("scaling", "all"):
        scaling.run(asked.output, size=asked.size, rounds=asked.rounds)
