"""rlhf-example: align a small language model in two minutes on a laptop.

Usage:
    rlhf-example --create-dummy-data
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import run_command
from rlhf.cli.help import Help
from rlhf.cli.process import command_line, fast_imports
from rlhf.cli.terminal import stderr_console

from rlhf.errors import UserError
from rlhf.io.presets import load_config
from rlhf.io.printable_text import EMPTY, printable
from rlhf.io.user_log import log_user
from rlhf.ranges import ProcessCount, Section, Seed

if TYPE_CHECKING:
    from rlhf.demo.demo import DemoResult

_SHOWN = 4
"""Number of prompts that are shown with the completions of both models."""


@dataclass(frozen=True, kw_only=True)
class Example(Section):
    """Settings of rlhf-example."""

    create_dummy_data: bool = False
    """Write the example's JSON files to OUTPUT_DIR/data first. Otherwise they must exist there."""
    output_dir: Path = Path("outputs/example")
    """Output folder. If it holds an earlier run, a number is added to its name."""
    seed: Seed = 0
    """Seed of the data and of the training."""
    config: str = "demo"
    """YAML file with the training settings, or the name of a preset."""
    resume: bool = False
    """Continue the interrupted run in OUTPUT_DIR."""
    workers: ProcessCount | None = None
    """Number of Ray workers. If None, two on a machine with several cores, otherwise none. The result has the same bits
    for any number."""


_ABOUT = Help(
    prog="rlhf-example",
    description="Train SFT, reward model and PPO on an invented customer service, and compare the model before and "
    "after PPO. It takes about two minutes on a laptop.",
    usage=__doc__ or "",
    page="docs/getting_started.md",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_command(lambda: _example(parse_arguments(Example, command_line(argv), about=_ABOUT)))


def _example(example: Example) -> None:
    base = load_config(example.config)
    with fast_imports():  # here, because importing torch takes seconds
        from rlhf.cli.training import open_training

        from rlhf.data.demo_data import EmbeddedFiles, write_embedded
        from rlhf.demo.demo import check_example, run_example
        from rlhf.distributed.compute_context import available_cores

    output_dir = example.output_dir if example.resume else _free_name(example.output_dir)
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
        resume=example.resume,
        sft_data=files.demonstrations,
        preference_data=files.preferences,
        prompt_data=files.prompts,
    )
    check_example(config)
    if example.create_dummy_data and not files.demonstrations.is_file():
        write_embedded(data, seed=example.seed)
        log_user(f"wrote {', '.join(path.name for path in files)} to {data}")
    log_user(f"training {where}")
    with open_training() as training:
        result = run_example(config, files, *training)
    _show_result(result, output_dir)


def _show_result(result: "DemoResult", output_dir: Path) -> None:
    """Print the scores, some completions and the next commands."""
    from rich.table import Table

    before, after = result.before, result.after
    scores = Table(title=f"Gold score on {len(result.prompts)} held-out prompts (a judge that training never saw)")
    for heading in ("model", "mean gold score, 95% interval", "KL to SFT"):
        scores.add_column(heading)
    scores.add_row("SFT", f"{before.mean:+.2f} ± {before.interval:.2f}", "0")
    scores.add_row("PPO", f"{after.mean:+.2f} ± {after.interval:.2f}", f"{result.kl:.1f} nats per completion")
    scores.add_row("gain", f"[bold]{result.gain:+.2f} ± {result.gain_interval:.2f}[/]", "")
    completions = Table(title="The same prompts before and after", show_lines=True)
    for heading in ("prompt", "SFT", "PPO"):
        completions.add_column(heading)
    for row in range(min(_SHOWN, len(result.prompts))):
        cells = (result.prompts[row], before.texts[row].strip(), after.texts[row].strip())
        completions.add_row(*(printable(cell or EMPTY).replace("[", r"\[") for cell in cells))
    console = stderr_console()
    console.print(scores)
    console.print(completions)
    console.print(
        f"Written to {output_dir}: data/, logs/, report/, and the models sft/, reward/ and policy/. To go on:\n"
        f"  open     {output_dir / 'report' / 'report.html'}\n"
        f"  judge    rlhf-evaluate --model-dir {output_dir}\n"
        f"  try      rlhf-generate --model-dir {output_dir / 'policy'} --template 'Customer: {{prompt}}\\nAgent:'\n"
        f"  plot     rlhf-monitor --log-dir {output_dir / 'logs'} --plot-type all",
        markup=False,
        soft_wrap=True,
    )


def _free_name(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3, … that holds no run."""
    candidate, number = folder, 1
    while (candidate / "checkpoints").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
