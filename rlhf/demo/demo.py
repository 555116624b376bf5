"""The demo: the whole pipeline on the embedded example, and a judge's comparison of the model before and after PPO."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.config import PipelineRun
from rlhf.data.demo_data import EmbeddedFiles, gold_score
from rlhf.evaluate.comparison import Sampling
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.judges import Judge
from rlhf.evaluate.policy_evaluation import ScoredCompletions, compare_folders
from rlhf.io.output import check_output, write_json
from rlhf.io.output_folder import check_output_folder
from rlhf.io.presets import load_config
from rlhf.stages import STAGES
from rlhf.statistics import mean_interval
from rlhf.train.observers import Observer
from rlhf.train.pipeline import run_stages
from rlhf.train.signals import StopRequest


class GoldScores(NamedTuple):
    """One model's completions and the gold judge's scores of them."""

    texts: list[str]
    scores: list[float]
    mean: float
    interval: float
    """Half-width of the mean's 95% confidence interval."""


class DemoResult(NamedTuple):
    """A model before and after alignment, on the same prompts with the same randomness."""

    prompts: list[str]
    before: GoldScores
    after: GoldScores
    gain: float
    """Mean of the paired differences of the scores."""
    gain_interval: float
    """Half-width of the 95% confidence interval of `gain`."""
    kl: float
    """Mean over completions of KL(after || before), nats per completion, exact over the vocabulary."""


def run_example(
    config: PipelineRun, files: EmbeddedFiles, observers: Sequence[Observer] = (), stop: StopRequest | None = None
) -> DemoResult:
    """Run the pipeline on the example's files, then let the gold judge compare SFT and PPO on held-out prompts.

    The scores are also written to OUTPUT_DIR/report/comparison.json.

    Args:
        config: configuration of the pipeline.
        files: files of the example, from `write_embedded`.
        observers: observers of the training.
        stop: request to stop the run.

    Raises:
        UserError, NonFiniteError, Interrupted: the reasons are those of `rlhf.train.loop.train`.
    """
    check_example(config)
    results = run_stages(config, observers=observers, stop=stop)
    result = _compare(config, results["sft"].model, results["ppo"].model, files.heldout_prompts)
    write_json(_comparison_file(config), _plain(result))
    return result


def check_example(config: PipelineRun) -> None:
    """Raise UserError if something in OUTPUT_DIR would be replaced that is not the example's."""
    for stage in STAGES.values():
        check_output_folder(config, stage)
    check_output(_comparison_file(config), "--output-dir")


def _comparison_file(config: PipelineRun) -> Path:
    return config.output_dir / "report" / "comparison.json"


def _compare(config: PipelineRun, before: Path, after: Path, prompts: Path) -> DemoResult:
    """Complete the prompts with both models, and score the completions with the gold judge."""
    settings = EvaluateConfig(seed=config.seed, cache_dir=config.cache_dir, device="cpu")
    ppo = load_config(str(config.output_dir / "config.yaml")).ppo  # with the lengths that PPO chose
    sampling = Sampling(("sampled",), ppo.temperature, ppo.completion_tokens, config.seed)
    gold = Judge("gold", gold_score, pairwise=False)
    (comparison,) = compare_folders(after, before, prompts, [gold], sampling, settings)
    policy, reference = comparison.sides["policy"], comparison.sides["against"]
    difference = torch.from_numpy(policy.scores["eval/judge/gold"] - reference.scores["eval/judge/gold"])
    texts = [record["prompt"] for record in comparison.columns]
    kl = float(policy.completions.kl["exact"].mean())
    return DemoResult(texts, _gold_scores(reference), _gold_scores(policy), *mean_interval(difference), kl)


def _gold_scores(side: ScoredCompletions) -> GoldScores:
    scores = side.scores["eval/judge/gold"]
    return GoldScores(side.completions.texts, scores.tolist(), *mean_interval(torch.from_numpy(scores)))


def _plain(result: DemoResult) -> dict[str, Any]:
    """Return the result as JSON values."""
    return result._asdict() | {"before": result.before._asdict(), "after": result.after._asdict()}
