"""rlhf-generate: complete prompts with one model, or with two side by side.

Usage:
    rlhf-generate --model-dir outputs/policy
    rlhf-generate --model-dir outputs/policy --against outputs/sft --prompt "Hello,"
    rlhf-generate --model-dir outputs/policy --prompt-file prompts.json --samples 4 --output completions.jsonl
"""

from collections.abc import Sequence

from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import check_inputs, run_command
from rlhf.cli.help import Help
from rlhf.cli.process import command_line, fast_imports

from rlhf.generate.generate_config import GenerateConfig

_ABOUT = Help(
    prog="rlhf-generate",
    description="Complete prompts given as flags, in a file, or typed in the terminal, with one model or with two side "
    "by side.",
    usage=__doc__ or "",
    page="docs/generating.md",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_command(lambda: _generate(parse(command_line(argv))))


def parse(argv: Sequence[str]) -> GenerateConfig:
    """Return the configuration of a command line. Prints the help and exits, or prints errors and exits with code 2."""
    return parse_arguments(GenerateConfig, argv, about=_ABOUT)


def _generate(config: GenerateConfig) -> None:
    folders = {"--model-dir": config.model_dir, "--against": config.against, "--reward-model": config.reward_model}
    check_inputs({"--prompt-file": config.prompt_file}, folders)
    with fast_imports():  # here, because importing torch takes seconds
        from rich.console import Console
        from rlhf.cli.generate_screen import run_generate

        from rlhf.execution.memory import keep_freed_memory

    keep_freed_memory()
    run_generate(config, Console(highlight=False))
