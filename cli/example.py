"""rlhf-example: see a language model being aligned, in two minutes on a laptop.

Usage:
    rlhf-example --create-dummy-data
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import run_command
from rlhf.cli.process import command_line

from rlhf.errors import UserError
from rlhf.io.presets import load_config
from rlhf.ranges import ProcessCount, Section, Seed


@dataclass(frozen=True, kw_only=True)
class Example(Section):
    """Train SFT, reward model and PPO on a made-up customer service, and judge the result."""

    create_dummy_data: bool = False
    """Write the example's JSON files to OUTPUT_DIR/data first; otherwise they must be there."""
    output_dir: Path = Path("outputs/example")
    """Folder for everything; if it holds an earlier run, a number is put behind its name."""
    seed: Seed = 0
    """Of data and training."""
    config: str = "demo"
    """YAML file or preset with the training's settings."""
    workers: ProcessCount | None = None
    """Ray workers; none is two where there are two cores. The result is the same to the bit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_command(lambda: _example(parse_arguments(Example, command_line(argv), prog="rlhf-example")))


def _example(example: Example) -> None:
    base = load_config(example.config)
    from rlhf.cli.training import open_training

    from rlhf.data.demo_data import EmbeddedFiles, write_embedded  # from here on it may take a second
    from rlhf.demo.demo import check_example, run_example, show_comparison
    from rlhf.distributed.compute_context import available_cores
    from rlhf.io.progress import console

    output_dir = _free_name(example.output_dir)
    data = output_dir / "data"
    files = EmbeddedFiles(*(data / f"{name}.json" for name in EmbeddedFiles._fields))
    if not example.create_dummy_data and not files.demonstrations.is_file():
        raise UserError(f"{files.demonstrations}: no such file; add --create-dummy-data")
    workers = example.workers if example.workers is not None else 2 * (available_cores() > 1)
    dist = dataclasses.replace(base.dist, num_workers=workers)
    where = f"on {workers} Ray workers with one core each" if workers else "in one process"
    config = dataclasses.replace(
        base,
        dist=dist,
        threads=1,
        output_dir=output_dir,
        seed=example.seed,
        sft_data=files.demonstrations,
        preference_data=files.preferences,
        prompt_data=files.prompts,
    )
    check_example(config)
    if example.create_dummy_data:
        write_embedded(data, seed=example.seed)
        console.print(f"wrote {', '.join(path.name for path in files)} to {data}", markup=False, soft_wrap=True)
    console.print(f"training {where}", markup=False)
    with open_training() as training:
        comparison = run_example(config, files, *training)
    show_comparison(comparison, output_dir)


def _free_name(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that holds no run."""
    candidate, number = folder, 1
    while (candidate / "checkpoints").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
