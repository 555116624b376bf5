"""README, CONTRIBUTING and the sources of the documentation: code runs, commands parse, and what they name exists."""

import importlib
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from rlhf.cli.arguments import flag_types, parse_arguments

import rlhf.metrics
from rlhf.config import PipelineRun
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.generate.generate_config import GenerateConfig
from rlhf.io.presets import load_config
from rlhf.ranges import flat_fields
from rlhf.stages import STAGES, check_settings, stages_of

ROOT = Path(__file__).parents[1]
GENERATED = ("docs/reference/api", "docs/tutorials")
SOURCES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if not str(path.relative_to(ROOT)).startswith(GENERATED)),
]
"""With the text cells of the tutorials, below."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


def texts() -> dict[str, str]:
    pages = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    for script in sorted((ROOT / "examples").glob("*.py")):
        lines = [line[2:] for line in script.read_text().splitlines() if line.startswith("# ")]
        pages[str(script.relative_to(ROOT))] = "\n".join(lines)
    return pages


TEXTS = texts()
BLOCKS = [
    Block(page, language, text)
    for page, source in TEXTS.items()
    for language, text in re.findall(r"^ *```(\S+)[^\n]*\n(.*?)^ *```$", source, re.DOTALL | re.MULTILINE)
]
COMMANDS = [
    (block.page, shlex.split(line, comments=True))
    for block in BLOCKS
    if block.language in ("sh", "bash")
    for line in block.text.replace("\\\n", "").splitlines()
    if line.strip() and not line.startswith("#")
]
ELSEWHERE = {"pip", "python3", ".", "ray", "export", "hf"}
"""Commands that are no programs of this project."""


def of_kind(*languages):
    blocks = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", blocks, ids=lambda block: f"{block.page}: {block.text.splitlines()[0]}")


def commands_of(*programs):
    commands = [(page, words) for page, words in COMMANDS if words[0] in programs]
    assert commands
    return pytest.mark.parametrize(("page", "command"), commands, ids=lambda part: str(part)[:60])


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """A folder and process where code of a page may do as it likes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rlhf.metrics, "METRICS", dict(rlhf.metrics.METRICS))
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    logged = []
    run = types.SimpleNamespace(log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run, init=lambda **options: run))
    monkeypatch.setitem(sys.modules, "my_estimator", types.ModuleType("my_estimator"))
    return logged


@of_kind("python")
def test_code_runs(block, aside):
    threads = torch.get_num_threads()
    names, code = {"__name__": "page"}, None
    with torch.random.fork_rng():  # the snippet itself draws an example
        try:
            exec(compile(block.text, block.page, "exec"), names)
        except SystemExit as end:
            code = end.code
    assert not code
    assert torch.get_num_threads() == threads
    if "to_wandb" in names:
        names["to_wandb"]("ppo", 3, {"objective/kl": 1.0})
        assert aside == [{"ppo/objective/kl": 1.0, "ppo/step": 3}]


@of_kind("json")
def test_json_is_json(block):
    assert json.loads(block.text)


@of_kind("yaml")
def test_settings_load(block, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(block.text)
    config = flat_fields(load_config(str(path)))
    for section, values in yaml.safe_load(block.text).items():
        for name, value in (values if isinstance(values, dict) else {}).items():
            if isinstance(value, int | float):
                assert config[f"{section}.{name}"] == value


def test_blocks_are_of_kinds_that_are_checked():
    kinds = {"python", "sh", "bash", "json", "yaml", "text"}
    unknown = {block for block in BLOCKS if block.language not in kinds and not block.language.startswith("{")}
    assert not unknown
    assert sum(text.count("```python") for text in TEXTS.values()) == sum(b.language == "python" for b in BLOCKS)


@commands_of("rlhf-train")
def test_training_commands_parse(page, command, monkeypatch):
    from rlhf.cli.train import parse

    monkeypatch.chdir(ROOT)
    config = parse(command[1:])
    for stage in stages_of(config):
        check_settings(config, stage)


@commands_of("rlhf-evaluate", "rlhf-generate", "rlhf-monitor")
def test_other_commands_parse(page, command):
    program, *flags = command
    assert importlib.import_module(f"rlhf.cli.{program.removeprefix('rlhf-')}").parse(flags)


@commands_of("rlhf-example", "python", "make")
def test_the_rest_of_the_commands_parse(page, command):
    from rlhf.cli.example import _ABOUT, Example
    from rlhf.cli.train import parse

    if command[0] == "rlhf-example":
        assert parse_arguments(Example, command[1:], about=_ABOUT).create_dummy_data
    elif command[0] == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in command[1:])
    else:
        assert command[1] == "train.py"
        parse(command[2:])


def test_every_command_is_checked():
    programs = {"rlhf-train", "rlhf-evaluate", "rlhf-generate", "rlhf-monitor", "rlhf-example", "python", "make"}
    assert {words[0] for _, words in COMMANDS} - ELSEWHERE <= programs


@pytest.mark.parametrize("page", TEXTS)
def test_no_command_trains_what_another_has_trained_in_its_folder(page):
    """Which would be refused."""
    from rlhf.cli.train import parse

    done = set()
    for where, (program, *words) in COMMANDS:
        if where == page and program == "rlhf-train" and "--output-dir" in words and "--config" not in words:
            for one in ("sft", "reward", "ppo") if words[0] == "pipeline" else (words[0],):
                place = (one, parse(words).output_dir)
                assert place not in done
                done.add(place)


def known_flags() -> set[str]:
    from rlhf.cli.example import Example
    from rlhf.cli.monitor import Monitor

    stages = [stage.config for stage in STAGES.values()]
    kinds = (PipelineRun, *stages, EvaluateConfig, GenerateConfig, Monitor, Example)
    types = [flag for kind in kinds for flag in flag_types(kind)]
    switches = {flag for flag, hint in types if hint is bool}
    negated = {".no-".join(flag.rsplit(".", 1)) if "." in flag else f"--no-{flag[2:]}" for flag in switches}
    return {flag for flag, _ in types} | negated | {"--help"}


@pytest.mark.parametrize("page", TEXTS)
def test_flags_in_the_text_exist(page):
    known = known_flags()
    for code in re.findall(r"`([^`\n]+)`", TEXTS[page]):
        if not code.startswith(("pip ", "ray ", "RAY_", "python ", "tensorboard ", "ssh ")):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
                assert flag.rstrip(".").replace("_", "-") in known, f"{page}: {flag}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_in_the_text_exist(page):
    for path in re.findall(r"`((?:rlhf|cli|tests|docs|examples|benchmarks|configs)/[\w./]+)`", TEXTS[page]):
        assert (ROOT / path).exists(), f"{page}: {path}"
    if not page.startswith(("docs/", "examples/")):
        for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
            assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), f"{page}: {link}"


def test_defaults_in_the_text_are_the_defaults():
    defaults, checked = flat_fields(PipelineRun()), 0
    for text in TEXTS.values():
        for name, value in re.findall(r"\| \{confval\}`([\w.]+)` \| ([\d.]+) \|", text):
            assert defaults[name] == float(value), name
            checked += 1
    assert checked >= 7


def test_the_verdict_of_the_readme_is_that_of_the_results():
    demo = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())["comparison"]
    for row in ("before", "after"):
        assert f"| {demo[row]['mean']:+.2f} ± {demo[row]['interval']:.2f} |" in TEXTS["README.md"]
    assert f"| {demo['gain']:+.2f} ± {demo['gain_interval']:.2f} |" in TEXTS["README.md"]
    assert f"| {demo['kl']:.1f} nats per completion |" in TEXTS["README.md"]


def test_the_figures_of_speed_are_those_of_the_benchmarks():
    measured = (ROOT / "benchmarks" / "README.md").read_text()
    ratios = [float(ratio) for ratio in re.findall(r"\| (\d\.\d\d)(?= |;)", measured)]
    table = [line for line in TEXTS["docs/speed.md"].splitlines() if re.match(r"\| .*(transformers|TRL) ", line)]
    shown = [cell.strip() for line in table for cell in line.split("|")[3:-1] if cell.strip()]
    assert len(shown) >= 12
    (claim,) = re.findall(r"It is also fast: (.*?) on two CPU cores", TEXTS["README.md"])
    for text in (*shown, *re.findall(r"\d\.\d", claim)):
        assert any(abs(float(text) - ratio) < 0.051 for ratio in ratios), f"{text} was not measured"
    for figure in ("449k", "387k", "0.915", "6.42"):  # on an H200
        assert figure in measured


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rlhf.__version__


def prose(text: str) -> str:
    """The sentences of a page: no code, tables, headings, equations or links' targets."""
    text = re.sub(r"^ *(```|:::).*?^ *\1.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("#", "|", "!", "    "))]
    text = re.sub(r"\{\w+\}`[^`]*`|`[^`]*`|\$[^$]*\$", "X", "\n".join(lines))
    return re.sub(r"\]\([^)]*\)|https?://\S+", "", text)


@pytest.mark.parametrize("page", [page for page in TEXTS if not page.endswith(("changelog.md", "glossary.md"))])
def test_sentences_are_short(page):
    sentences = [s for s in re.split(r"[.:?!](?:\s|$)|\n\n|\n[-*\d]+\.? ", prose(TEXTS[page])) if len(s.split()) > 2]
    if sentences:
        assert sum(len(sentence.split()) for sentence in sentences) / len(sentences) < 25


AMERICAN = re.compile(
    r"\b(\w*(?:normaliz|optimiz|initializ|tokeniz(?!er)|recogniz)\w*|behavior|colors?|center\w*)\b", re.IGNORECASE
)


@pytest.mark.parametrize("page", TEXTS)
def test_spelling_is_british(page):
    assert AMERICAN.findall(prose(TEXTS[page])) == []


def test_the_checks_of_prose_see_it():
    assert AMERICAN.findall(prose("We normalize.\n\n```python\noptimizer\n```\nA tokenizer.")) == ["normalize"]
