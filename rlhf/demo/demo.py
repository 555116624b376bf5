"""The demo: the whole pipeline on the embedded example, ending with a judgement that a person understands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from rlhf.config import PipelineRun
from rlhf.data.demo_data import EmbeddedFiles, gold_score
from rlhf.evaluate.comparison import Sampling
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.judges import Judge
from rlhf.evaluate.policy_evaluation import ScoredCompletions as Side
from rlhf.evaluate.policy_evaluation import compare
from rlhf.io.output import check_output, write_json
from rlhf.io.output_folder import check_output_folder
from rlhf.io.progress import console
from rlhf.io.terminal import printable
from rlhf.statistics import mean_interval
from rlhf.train.observers import Observer
from rlhf.train.pipeline import run_stages
from rlhf.train.signals import StopRequest
from rlhf.train.stage import STAGES

_SHOWN = 4
"""Prompts shown with both models' replies."""


class ScoredCompletions(NamedTuple):
    """One model's completions."""

    texts: list[str]
    scores: list[float]
    mean: float
    interval: float
    """Half-width of the mean's 95% confidence interval."""


class Comparison(NamedTuple):
    """A model before and after alignment, on the same prompts with the same randomness."""

    prompts: list[str]
    before: ScoredCompletions
    after: ScoredCompletions
    gain: float
    """Mean of the paired differences of the scores."""
    gain_interval: float
    """Half-width of its 95% confidence interval."""
    kl: float
    """Mean over completions of KL(after || before), nats per completion, exact over the vocabulary."""


def run_example(
    config: PipelineRun, files: EmbeddedFiles, observers: Sequence[Observer] = (), stop: StopRequest | None = None
) -> Comparison:
    """Run the pipeline on the example's files, then let the gold judge compare SFT and PPO on held-out prompts.

    Writes OUTPUT_DIR/report/comparison.json.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.train.loop.train`.
    """
    check_example(config)
    results = run_stages(config, observers=observers, stop=stop)
    comparison = _compare(config, results["sft"].model, results["ppo"].model, files.heldout_prompts)
    write_json(_comparison_file(config), _plain(comparison))
    return comparison


def check_example(config: PipelineRun) -> None:
    """Raise UserError if something in OUTPUT_DIR would be replaced that is not the example's."""
    for stage in STAGES.values():
        check_output_folder(config, stage)
    check_output(_comparison_file(config), "--output-dir")


def _comparison_file(config: PipelineRun) -> Path:
    return config.output_dir / "report" / "comparison.json"


def show_comparison(comparison: Comparison, output_dir: Path) -> None:
    """Print what the demo came to."""
    before, after = comparison.before, comparison.after
    figures = Table(title=f"Gold score on {len(comparison.prompts)} held-out prompts (a judge that training never saw)")
    for heading in ("model", "mean gold score, 95% interval", "KL to SFT"):
        figures.add_column(heading)
    figures.add_row("SFT", f"{before.mean:+.2f} ± {before.interval:.2f}", "0")
    figures.add_row("PPO", f"{after.mean:+.2f} ± {after.interval:.2f}", f"{comparison.kl:.1f} nats per reply")
    figures.add_row("gain", f"[bold]{comparison.gain:+.2f} ± {comparison.gain_interval:.2f}[/]", "")
    replies = Table(title="The same prompts before and after", show_lines=True)
    for heading in ("prompt", "SFT", "PPO"):
        replies.add_column(heading)
    for row in range(min(_SHOWN, len(comparison.prompts))):
        cells = (comparison.prompts[row], before.texts[row].strip(), after.texts[row].strip())
        replies.add_row(*(printable(cell).replace("[", r"\[") for cell in cells))
    console.print(figures)
    console.print(replies)
    console.print(
        f"Written to {output_dir}: data/, logs/, report/, and the models sft/, reward/ and policy/. To go on:\n"
        f"  open     {output_dir / 'report' / 'report.html'}\n"
        f"  judge    rlhf-evaluate --model-dir {output_dir}\n"
        f"  try      rlhf-generate --model-dir {output_dir / 'policy'} --template 'Customer: {{prompt}}\\nAgent:'\n"
        f"  plot     rlhf-monitor --log-dir {output_dir / 'logs'} --plot-type all",
        markup=False,
        soft_wrap=True,
    )


def _compare(config: PipelineRun, before: Path, after: Path, prompts: Path) -> Comparison:
    """Both models' completions of the prompts, and what the gold judge says of them."""
    settings = EvaluateConfig(seed=config.seed, cache_dir=config.cache_dir, device="cpu")
    sampling = Sampling(("sampled",), config.ppo.temperature, config.ppo.max_new_tokens, config.seed)
    gold = Judge("gold", gold_score, pairwise=False)
    (contest,) = compare(after, before, prompts, [gold], sampling, settings)
    policy, reference = contest.sides["policy"], contest.sides["against"]
    difference = torch.from_numpy(policy.scores["eval/judge/gold"] - reference.scores["eval/judge/gold"])
    texts = [record["prompt"] for record in contest.columns]
    kl = float(policy.answers.kl["exact"].mean())
    return Comparison(texts, _judged(reference), _judged(policy), *mean_interval(difference), kl)


def _judged(side: Side) -> ScoredCompletions:
    scores = side.scores["eval/judge/gold"]
    return ScoredCompletions(side.answers.texts, scores.tolist(), *mean_interval(torch.from_numpy(scores)))


def _plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    return comparison._asdict() | {"before": comparison.before._asdict(), "after": comparison.after._asdict()}
