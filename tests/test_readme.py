"""The README's snippets run, and its commands parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[0])
def test_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():  # the snippet itself draws an example
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("rlhf-train")])
def test_commands_parse(command):
    from rlhf.cli.train import parse

    assert parse(shlex.split(command)[1:]).output_dir.parts[0] == "outputs"


def test_no_command_trains_what_another_has_trained_in_its_folder():
    """Which would be refused."""
    from rlhf.cli.train import parse

    done = set()
    for _, stage, *flags in (shlex.split(command) for command in COMMANDS if "--output-dir" in command):
        for one in ("sft", "reward", "ppo") if stage == "pipeline" else (stage,):
            place = (one, parse([stage, *flags]).output_dir)
            assert place not in done
            done.add(place)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("rlhf-evaluate", "rlhf-generate"))])
def test_commands_of_evaluation_parse(command):
    program, *flags = shlex.split(command)
    parse = importlib.import_module(f"rlhf.cli.{program.removeprefix('rlhf-')}").parse
    assert parse(flags).model_dir.parts[0] in ("outputs", "path")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("rlhf-monitor")])
def test_monitor_commands_parse(command):
    from rlhf.cli.monitor import parse

    assert parse(shlex.split(command)[1:]).log_dir[0] == Path("outputs/mine/logs")


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", "\n".join(COMMANDS)):
        assert f"\n{target}:" in makefile
