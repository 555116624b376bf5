"""The demo: the whole pipeline on the embedded example, ending with a judgement that a person understands."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf.config import PipelineRun
from rlhf.data.embedded import EmbeddedFiles, gold_score
from rlhf.io.files import write_json
from rlhf.io.progress import console
from rlhf.stages.compare import Comparison, compare
from rlhf.stages.pipeline import run_pipeline

_SHOWN = 4
"""Prompts shown with both models' replies."""


def run_example(config: PipelineRun, files: EmbeddedFiles) -> Comparison:
    """Run the pipeline on the example's files, then let the gold judge compare SFT and PPO on held-out prompts.

    Writes OUTPUT_DIR/report/comparison.json.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.stages.run`.
    """
    results = run_pipeline(config)
    prompts = json.loads(files.heldout_prompts.read_text(encoding="utf-8"))
    comparison = compare(
        results["sft"].model,
        results["ppo"].model,
        prompts,
        gold_score,
        seed=config.seed,
        max_new_tokens=config.ppo.max_new_tokens,
        temperature=config.ppo.temperature,
    )
    folder = config.output_dir / "report"
    folder.mkdir(exist_ok=True)
    write_json(folder / "comparison.json", _plain(comparison))
    return comparison


def show_comparison(comparison: Comparison, output_dir: Path) -> None:
    """Print what the demo came to."""
    before, after = comparison.before, comparison.after
    figures = Table(title=f"Gold score on {len(comparison.prompts)} held-out prompts (a judge that training never saw)")
    for heading in ("model", "mean gold score, 95% interval", "KL from SFT"):
        figures.add_column(heading)
    figures.add_row("SFT", f"{before.mean:+.2f} ± {before.interval:.2f}", "0")
    figures.add_row("PPO", f"{after.mean:+.2f} ± {after.interval:.2f}", f"{comparison.kl:.1f} nats per reply")
    figures.add_row("gain", f"[bold]{comparison.gain:+.2f} ± {comparison.gain_interval:.2f}[/]", "")
    replies = Table(title="The same prompts before and after", show_lines=True)
    for heading in ("prompt", "SFT", "PPO"):
        replies.add_column(heading)
    for row in range(min(_SHOWN, len(comparison.prompts))):
        cells = (comparison.prompts[row], before.texts[row].strip(), after.texts[row].strip())
        replies.add_row(*(cell.replace("[", r"\[") for cell in cells))
    console.print(figures)
    console.print(replies)
    console.print(
        f"Written to {output_dir}: models in sft/, reward/ and policy/ (transformers loads them); metrics.jsonl,\n"
        "samples.jsonl and TensorBoard files in logs/; all replies in report/comparison.json; the data in data/.\n"
        f"See the run in a browser: {output_dir / 'report' / 'report.html'}",
        markup=False,
    )


def _plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    return comparison._asdict() | {"before": comparison.before._asdict(), "after": comparison.after._asdict()}
