"""rlhf-train: supervised fine-tuning, reward model, PPO, or all three.

Usage:
    rlhf-train sft --sft-data demonstrations.json
    rlhf-train reward --preference-data preferences.json
    rlhf-train ppo --prompt-data prompts.json
    rlhf-train pipeline --config demo --output-dir outputs/demo
"""

import functools
import operator
import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import base_config, describe, run_command
from rlhf.cli.process import command_line

from rlhf.config import PipelineRun, PPORun, RewardRun, SFTRun
from rlhf.errors import UserError
from rlhf.io.presets import narrow

AnyRun = SFTRun | RewardRun | PPORun | PipelineRun

_STAGES: dict[str, tuple[type[AnyRun], str]] = {
    "sft": (SFTRun, "Supervised fine-tuning on demonstrations."),
    "reward": (RewardRun, "Reward model on preference pairs, from the SFT model."),
    "ppo": (PPORun, "PPO with a KL penalty, from the SFT model, against the reward model or any function."),
    "pipeline": (PipelineRun, "SFT, reward model and PPO in order."),
}


_DESCRIPTION = """Train a GPT-2-style language model from human feedback.

Flags go on top of --config, which goes on top of the defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return run_command(lambda: _train(command_line(argv)))


def parse(argv: Sequence[str]) -> AnyRun:
    """The configuration of a command line; prints help or errors and exits (code 2) as tyro does."""
    place = next((place for place, word in enumerate(argv) if word in _STAGES), 0)
    if place and not {"-h", "--help"} & set(argv):
        moved = shlex.join([argv[place], *argv[:place], *argv[place + 1 :]])
        raise UserError(f"the stage comes first: rlhf-train {moved}")
    if argv and argv[0] in _STAGES:
        kind, text = _STAGES[argv[0]]
        return parse_arguments(
            kind,
            argv[1:],
            prog=f"rlhf-train {argv[0]}",
            description=text,
            default=lambda arguments: narrow(base_config(arguments), kind),
        )
    kinds = [Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (kind, text) in _STAGES.items()]
    union: Any = functools.reduce(operator.or_, kinds)  # only for its help and its errors
    return tyro.cli(union, prog="rlhf-train", description=_DESCRIPTION, args=argv)


def _train(argv: list[str]) -> None:
    config = parse(argv)
    from rich.text import Text  # from here on it may take a second

    from rlhf.io.progress import console
    from rlhf.train import pipeline, sft

    console.print(Text.assemble((f"rlhf-train {argv[0]}", "bold"), f" → {config.output_dir}"), soft_wrap=True)
    console.print(describe(config), markup=False, soft_wrap=True)
    if isinstance(config, PipelineRun):
        results = pipeline.run_pipeline(config)
    elif isinstance(config, PPORun):
        results = {"ppo": pipeline.run_ppo_alone(config, base_config(argv))}
    elif isinstance(config, RewardRun):
        results = {"reward": pipeline.run_reward_alone(config, base_config(argv))}
    else:
        results = {"sft": sft.run_sft(config)}
    for stage, result in results.items():
        console.print(Text.assemble((stage, "bold"), f": wrote {result.model}"), soft_wrap=True)
