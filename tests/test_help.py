"""--help of every program: complete, grouped, within 80 columns, and in whole phrases."""

import dataclasses
import importlib.metadata
import re
import shlex
from pathlib import Path

import pytest
from rlhf.cli.arguments import flag_types
from rlhf.cli.example import Example
from rlhf.cli.monitor import Monitor
from rlhf.cli.train import parse

from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.generate.generate_config import GenerateConfig
from rlhf.stages import STAGES, pipeline_type

TRAIN = {f"rlhf-train {name}": stage.config for name, stage in STAGES.items()} | {
    "rlhf-train pipeline": pipeline_type()
}
PROGRAMS = TRAIN | {
    "rlhf-evaluate": EvaluateConfig,
    "rlhf-generate": GenerateConfig,
    "rlhf-monitor": Monitor,
    "rlhf-example": Example,
}
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def shown(monkeypatch, capsys):
    """Command -> the lines of its help at 80 columns."""

    def show(command: str, *, columns: int = 80) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        name, *argv = command.split()
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        with pytest.raises(SystemExit) as caught:
            entry.load()([*argv, "--help"])
        assert not caught.value.code
        return capsys.readouterr().out.splitlines()

    return show


def flags_of(lines: list[str]) -> dict[str, str]:
    """The texts below the flags, by the line of the flag."""
    texts: dict[str, str] = {}
    for line in lines[: lines.index("examples:")]:
        if line.startswith("  -"):
            flag = line.strip()
            texts[flag] = ""
        elif line.startswith("      ") and texts:
            texts[flag] += line.strip() + " "
    return {flag: text.strip() for flag, text in texts.items()}


@pytest.mark.parametrize("columns", [50, 80, 200])
@pytest.mark.parametrize("command", ["rlhf-train", *PROGRAMS])
def test_help_fits_the_terminal(shown, command, columns):
    lines = shown(command, columns=columns)
    invocations = [line for line in lines if not line.startswith(("  --", "usage:"))]
    assert max(map(len, invocations)) <= min(columns, 100)
    assert max(map(len, lines)) <= max(columns, 80)


@pytest.mark.parametrize("command", PROGRAMS)
def test_help_has_every_flag_once_with_a_description(shown, command):
    texts = flags_of(shown(command))
    names = [re.match(r"--[\w.-]+", flag).group() for flag in texts if flag != "-h, --help"]
    unused = "--dpo." if command.endswith("pipeline") else "none"
    assert sorted(names) == sorted(flag for flag, _ in flag_types(PROGRAMS[command]) if not flag.startswith(unused))
    for flag, text in texts.items():
        description = re.sub(r" \(default: [^()]+\)$", "", text)
        assert re.match(r"[A-Z]", description), flag
        assert description.endswith("."), flag
        assert len(description.split()) >= 3, f"{flag}: {description}"
        assert not re.match(r"(Of|As|By|How|What|Whether|Where|Also) ", description), f"{flag}: {description}"
        assert "None" not in flag + text, flag
        assert "default: )" not in text


@pytest.mark.parametrize("command", PROGRAMS)
def test_help_ends_with_examples_and_the_page_of_the_documentation(shown, command):
    text = "\n".join(shown(command))
    _, example, page = re.fullmatch(
        r"(.*)\n\nexamples:\n(.*)\n\ndocumentation: (docs/\S+\.md) in the repository of rlhf", text, re.DOTALL
    ).groups()
    assert example.startswith(f"  {command} ")
    if DOCS.is_dir():
        assert (DOCS.parent / page).is_file()


@pytest.mark.parametrize("command", TRAIN)
def test_the_stages_flags_come_first_and_those_of_ray_last(shown, command):
    lines = shown(command)
    groups = [match.group(1) for line in lines if (match := re.match(r"(?:--)?(\w+)(?:\.\*)?:( |$)", line))]
    own = (
        [name for name in STAGES if STAGES[name].in_pipeline] if command.endswith("pipeline") else [command.split()[1]]
    )
    order = ["usage", "options", *own, "model", "tokenizer", "data", "checkpoint", "log", "computation", "dist"]
    assert groups == [*order, "examples", "documentation"]
    sections = [spec.name for spec in dataclasses.fields(TRAIN[command]) if dataclasses.is_dataclass(spec.type)]
    assert set(sections) - set(groups) == ({"dpo"} if command.endswith("pipeline") else set())


def test_what_is_set_most_leads_its_section(shown):
    flags = [flag.split()[0] for flag in flags_of(shown("rlhf-train ppo"))]
    ppo = [flag for flag in flags if flag.startswith("--ppo.")]
    assert ppo[:4] == ["--ppo.model-path", "--ppo.reward", "--ppo.num-iterations", "--ppo.batch-size"]
    assert flags[1:4] == ["--prompt-data", "--config", "--output-dir"]


def test_the_defaults_are_those_of_the_configuration_file(shown):
    texts = flags_of(shown("rlhf-train ppo --config demo"))
    assert texts["--ppo.num-iterations INT"] != flags_of(shown("rlhf-train ppo"))["--ppo.num-iterations INT"]


def test_every_example_is_a_command_line_of_the_program(shown):
    text = "\n".join(shown("rlhf-train"))
    examples = re.findall(r"^  (rlhf-train .*)", text.replace("\\\n", ""), re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        _, *argv = shlex.split(example)
        if "--help" not in argv:
            parse(argv)
