"""python -m benchmarks WHAT [--size small|gpt2] [--device cpu|cuda] [--rounds N]: the figures of README.md."""

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.sides import SideError

COMPARISONS = ("startup", "generate", "sft", "reward", "dpo", "ppo", "rloo", "memory")
"""Programs that need the peers; each is a module with `run`."""


@dataclass(frozen=True)
class Benchmarks:
    """Measure, print a table, and write it as JSON."""

    which: tyro.conf.Positional[
        Literal[
            "all",
            "startup",
            "generate",
            "sft",
            "reward",
            "dpo",
            "ppo",
            "rloo",
            "memory",
            "phases",
            "allreduce",
            "scaling",
            "cost-model",
            "real-data",
            "learning",
            "table",
            "peers",
        ]
    ] = "all"
    """What to measure; `peers` makes the environment of those we are compared with."""
    size: Literal["tiny", "small", "gpt2", "gpt2-gpu", "smollm2"] = "small"
    """Of the model: 4 layers of 128; GPT-2 with 124M parameters, also with the work of a large GPU; or SmolLM2-135M.
    tiny shows that everything runs."""
    model: Path | None = None
    """Folder of a pre-trained model of that size; none takes random weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides compute."""
    rounds: int = 9
    """Measured rounds."""
    threads: int | None = None
    """CPU threads of each side; none takes all cores."""
    only: str = ""
    """Rows whose name contains this."""
    seeds: int = 3
    """Runs of each task of real-data, and of each side of learning."""
    method: Literal["all", "ppo", "rloo", "dpo"] = "all"
    """What learning compares."""
    data: Path = Path("../shared/data")
    """Folder of the real data."""
    flags: tuple[str, ...] = ()
    """Flags of rlhf-train for every run of real-data, each as one word: --sft.model-path=FOLDER."""
    peers: Path = Path(".venv-peers")
    """The peers' environment."""
    output: Path = Path("outputs/benchmarks")
    """Folder for the JSON files and the sides' logs."""
    against: Path | None = None
    """An earlier JSON file, or a folder of them, to compare this run with."""
    folder: tyro.conf.Positional[Path | None] = None
    """For `table`, which makes README.md's tables: a folder of results, which docs/results/benchmarks then keeps; none
    takes those that it has."""


def main(asked: Benchmarks) -> None:
    """Run what was asked for; each program is imported when its turn comes."""
    if asked.which == "peers":
        from benchmarks.peers.environment import make

        make(asked.peers)
        return
    if asked.folder is not None and asked.which != "table":
        raise SystemExit(f"python -m benchmarks {asked.which} takes no folder; --output says where results go")
    if asked.which == "table":
        from benchmarks import table

        table.run(asked.folder, COMPARISONS)
        return
    if asked.which == "real-data":
        from benchmarks import real_data

        real_data.run(asked.output, asked.data.absolute(), only=asked.only, seeds=asked.seeds, extra=asked.flags)
        return
    if asked.which == "learning":
        from benchmarks import learning
        from benchmarks.peers.environment import check

        check(asked.peers)
        methods = tuple(learning.SETTINGS) if asked.method == "all" else (asked.method,)
        learning.run(asked.output, asked.peers.absolute(), methods=methods, seeds=asked.seeds)
        return
    from benchmarks import history

    earlier = history.read(asked.against) if asked.against else {}
    written = _measure([name for name in (*COMPARISONS, "phases") if asked.which in (name, "all")], asked)
    if asked.which in ("allreduce", "all"):
        from benchmarks import allreduce

        written += allreduce.run(asked.output, rounds=asked.rounds)
    if asked.which in ("scaling", "all"):
        from benchmarks import scaling

        written += scaling.run(asked.output, size=asked.size, rounds=asked.rounds)
    if asked.which in ("cost-model", "all"):
        from benchmarks import cost_model

        written += cost_model.run(asked.output)
    history.report(written, earlier)


def _measure(names: list[str], asked: Benchmarks) -> list[Path]:
    """Run the programs of these names; return the JSON files that they have written."""
    if not names:
        return []
    import torch

    from benchmarks.bench import Bench
    from benchmarks.ours import make_material
    from benchmarks.peers.environment import check
    from rlhf.distributed.compute_context import available_cores

    if names != ["phases"]:
        check(asked.peers)
    with tempfile.TemporaryDirectory(prefix="rlhf-benchmarks-") as folder:
        bench = Bench(
            size=asked.size,
            device=asked.device,
            rounds=asked.rounds,
            threads=asked.threads or available_cores(),
            only=asked.only,
            peers=asked.peers.absolute(),
            output=asked.output,
            made=make_material(Path(folder), asked.size, asked.model),
        )
        torch.set_num_threads(bench.threads)  # of the roofline's measures
        return [path for name in names for path in importlib.import_module(f"benchmarks.{name}").run(bench)]


def command() -> None:
    """The command line; a side that fails is one message and exit code 1."""
    try:
        main(tyro.cli(Benchmarks, prog="python -m benchmarks"))
    except SideError as error:
        raise SystemExit(f"python -m benchmarks: {error}") from None


if __name__ == "__main__":
    command()
