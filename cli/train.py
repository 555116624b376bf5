"""rlhf-train: supervised fine-tuning, reward model, PPO, or all three.

Usage:
    rlhf-train sft --sft-data demonstrations.json
    rlhf-train reward --preference-data preferences.json
    rlhf-train ppo --prompt-data prompts.json
    rlhf-train pipeline --config demo --output-dir outputs/demo
"""

import difflib
import functools
import operator
import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import base_config, check_inputs, describe, run_command
from rlhf.cli.help import Help, help_of_commands
from rlhf.cli.process import command_line, fast_imports
from rlhf.cli.terminal import stderr_console

import rlhf
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.io.presets import narrow
from rlhf.ranges import flat_fields
from rlhf.setting_rules import flag_of
from rlhf.stages import STAGES, pipeline_names, pipeline_type, stages_of

_DESCRIPTION = (
    "Train a language model from human feedback. Flags override the file of --config, which overrides the defaults."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_command(lambda: _train(command_line(argv)))


def parse(argv: Sequence[str]) -> RunConfig:
    """Return the configuration of a command line. Prints the help and exits, or prints errors and exits with code 2."""
    commands = _commands()
    position = next((position for position, word in enumerate(argv) if word in commands), 0)
    if position and not {"-h", "--help"} & set(argv):
        moved = shlex.join([argv[position], *argv[:position], *argv[position + 1 :]])
        raise UserError(f"the stage comes first: rlhf-train {moved}")
    if argv and argv[0] in commands:
        kind, text = commands[argv[0]]
        return parse_arguments(
            kind,
            argv[1:],
            about=_about(f"rlhf-train {argv[0]}", text),
            default=lambda arguments: narrow(base_config(arguments), kind),
        )
    if {"-h", "--help"} & set(argv):
        texts = {name: text for name, (_, text) in commands.items()}
        print(help_of_commands(_about("rlhf-train", _DESCRIPTION), texts))
        raise SystemExit(0)
    if argv and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], commands, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"rlhf-train {argv[0]}: no such command; {hint}There are {', '.join(commands)}")
    if "--version" in argv:
        print(f"rlhf-train {rlhf.__version__}")
        raise SystemExit(0)
    kinds = [Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (kind, text) in commands.items()]
    union: Any = functools.reduce(operator.or_, kinds)  # only for its errors
    config: RunConfig = tyro.cli(union, prog="rlhf-train", args=argv)
    return config


def _about(prog: str, description: str) -> Help:
    """Return the texts of the program, or of one of its commands."""
    name, usage = prog.partition(" ")[2], __doc__ or ""
    example = usage if f"{prog} " in usage else f"{prog} --output-dir outputs"  # a registered stage
    page = "docs/pipeline.md" if name == "pipeline" else "docs/reference/settings.md"
    if name in STAGES and isinstance(STAGES[name].program, str):  # a stage of rlhf itself
        page = f"docs/methods/{name}.md"
    return Help(prog=prog, description=description, usage=example, page=page)


def _commands() -> dict[str, tuple[type[RunConfig], str]]:
    """Return the configuration type and description of every stage and of the pipeline, by name."""
    stages: dict[str, tuple[type[RunConfig], str]] = {
        stage.name: (stage.config, stage.help) for stage in STAGES.values()
    }
    *titles, last = (STAGES[name].title for name in pipeline_names())
    return stages | {"pipeline": (pipeline_type(), f"{', '.join(titles)} and {last} in order.")}


def _train(argv: list[str]) -> None:
    config = parse(argv)
    _check_paths(config)
    with fast_imports():  # here, because importing torch takes seconds
        from rich.text import Text
        from rlhf.cli.training import open_training

        from rlhf.train.pipeline import run_stages

    console = stderr_console()
    console.print(Text.assemble((f"rlhf-train {argv[0]}", "bold"), f" → {config.output_dir}"), soft_wrap=True)
    console.print(describe(config), markup=False, soft_wrap=True)
    with open_training() as training:
        results = run_stages(config, observers=training.observers, stop=training.stop, base=base_config(argv))
    for stage, result in results.items():
        console.print(Text.assemble((stage, "bold"), f": wrote {result.model}"), soft_wrap=True)
    console.print(_next_commands(config, list(results)), markup=False, soft_wrap=True)


def _check_paths(config: RunConfig) -> None:
    """Raise UserError if data or a model that the configuration names is not there."""
    values = flat_fields(config)
    named = {name: content for stage in stages_of(config) for name, content in stage.files.items()}
    files, models = (
        {flag_of(name): values.get(name) for name, content in named.items() if content in kinds}
        for kinds in (("data", "validation"), ("model", "tokenizer"))
    )
    check_inputs(files, models)


def _next_commands(config: RunConfig, stages: list[str]) -> str:
    """Return what to do after training: one command a line."""
    folder = config.output_dir
    lines = [f"  open     {folder / 'report' / 'report.html'}", f"  judge    rlhf-evaluate --model-dir {folder}"]
    written = [STAGES[name].folder for name in ("ppo", "dpo", "sft") if name in stages]
    if written:
        lines.append(f"  try      rlhf-generate --model-dir {folder / written[0]}")
    lines.append(f"  plot     rlhf-monitor --log-dir {folder} --plot-type all")
    following = {"sft": "reward --preference-data PAIRS.json", "reward": "ppo --prompt-data PROMPTS.json"}
    if stages and stages[-1] in following:
        lines.append(f"  go on    rlhf-train {following[stages[-1]]} --output-dir {folder}")
    return "\n".join(["To go on:", *lines])
