"""rlhf-evaluate: perplexity, reward accuracy and calibration, win rate and KL, with 95% confidence intervals.

Usage:
    rlhf-evaluate --model-dir outputs
    rlhf-evaluate --model-dir outputs --eval-type policy --test-data prompts.json --judge my_rewards:brevity
    rlhf-evaluate --model-dir path/to/gpt2 --test-data demonstrations.json
"""

from collections.abc import Sequence

from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import base_config, check_inputs, run_command
from rlhf.cli.help import Help
from rlhf.cli.process import command_line, fast_imports

from rlhf.evaluate.evaluate_config import MODEL_DIR, EvaluateConfig
from rlhf.io.files import check_folder

_ABOUT = Help(
    prog="rlhf-evaluate",
    description="Evaluate models on data that they were not trained on. Every figure comes with its sample size and a "
    "95% confidence interval.",
    usage=__doc__ or "",
    page="docs/evaluation.md",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_command(lambda: _evaluate(command_line(argv)))


def parse(argv: Sequence[str]) -> EvaluateConfig:
    """Return the configuration of a command line. Prints the help and exits, or prints errors and exits with code 2."""
    return parse_arguments(
        EvaluateConfig,
        argv,
        about=_ABOUT,
        default=lambda arguments: EvaluateConfig(dist=base_config(arguments).dist),
    )


def _evaluate(argv: list[str]) -> None:
    config = parse(argv)
    check_folder(config.model_dir, MODEL_DIR)
    check_inputs(
        {"--test-data": config.test_data, "--train-data": config.train_data},
        {"--against": config.against, "--reward-model": config.reward_model},
    )
    with fast_imports():  # here, because importing torch takes seconds
        from rich.console import Console
        from rlhf.cli.evaluate_tables import show_report
        from rlhf.cli.terminal import spinner

        from rlhf.evaluate.evaluation import run_evaluation
        from rlhf.execution.memory import keep_freed_memory

    keep_freed_memory()
    show_report(run_evaluation(config, spinner), Console(highlight=False))
