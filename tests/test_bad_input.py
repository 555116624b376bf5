"""Whatever a user can give wrongly: exit code 2 within seconds, one message that says what to do, and nothing left."""

import contextlib
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import random
from rlhf.data.dataset import default_cache_dir
from rlhf.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rlhf.io.manifest import read_manifest
from rlhf.io.model_folder import (
    LanguageModel,
    RewardModel,
    RewardStatistics,
    save_language_model,
    save_reward_model,
)
from rlhf.io.tokenizer import Tokenizer
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config

SECONDS = 15  # within which a refusal must come
PROGRAMS = Path(sys.executable).parent
TINY = ["--model.preset", "tiny", "--model.n-layer", "1", "--tokenizer.vocab-size", "300"]
ONE_STEP = ["--sft.max-steps", "1", "--sft.batch-size", "4", "--reward.max-steps", "1", "--reward.batch-size", "4"]

GOOD = {
    "sft": [{"prompt": f"say {n}", "completion": f" the word {n}"} for n in range(8)],
    "pairs": [{"prompt": f"say {n}", "chosen": " yes", "rejected": f" no {n}"} for n in range(8)],
    "prompts": [{"prompt": f"say {n}"} for n in range(8)],
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Good files, not to be changed: {sft,pairs,prompts}.json, rewards.py, lm/, rm/, and a foreign/ reward model."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, records in GOOD.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "rewards.py").write_text(
        "def zero(prompts, completions):\n    return [0.0] * len(prompts)\n"
        "def nan(prompts, completions):\n    return [float('nan')] * len(prompts)\n"
        "def fails(prompts, completions):\n    raise RuntimeError('no luck')\n"
        "def short(prompts, completions):\n    return [1.0]\n"
        "def column(prompts, completions, answer):\n    return [0.0] * len(prompts)\n"
    )
    words = Tokenizer.train(["say the word yes no 0 1 2 3 4 5 6 7"] * 2, 280)
    foreign = Tokenizer.train(["entirely different words"] * 2, 280)
    for name, tokenizer in (("lm", words), ("rm", words), ("foreign", foreign)):
        config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        params = gpt2.init(config, key=random.key(0))
        if name == "lm":
            save_language_model(folder / name, LanguageModel(params, config, tokenizer), facts={})
        else:
            params = {"trunk": params, "head": {"weight": torch.ones(1, 16)}}
            model = RewardModel(params, config, tokenizer, RewardStatistics(0.0, 1.0, 0))
            save_reward_model(folder / name, model, facts={})
    return folder


@pytest.fixture(scope="module")
def finished(shelf, tmp_path_factory) -> Path:
    """The output folder of a finished SFT run, not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        assert main(["sft", *sft_flags(shelf), "--output-dir", str(folder)]) == 0
    torch.set_num_threads(1)
    return folder


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch) -> Iterator[None]:
    """Each test works in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    torch.set_num_threads(1)


def sft_flags(shelf: Path) -> list[str]:
    return ["--sft-data", str(shelf / "sft.json"), *TINY, *ONE_STEP[:4], "--threads", "1", "--log.no-tensorboard"]


def main(argv: list[str]) -> int:
    """The program rlhf-train in this process; its exit code."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="rlhf-train")
    try:
        return entry.load()(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else -1


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def plain(text: str) -> str:
    """Without the boxes and line breaks that tyro puts around its messages."""
    return " ".join(text.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())


def assert_one_message(err: str, out: str, pieces: tuple[str, ...]) -> None:
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    boxes = err.count("╭─")
    assert len(lines) + boxes == 1, err
    for piece in pieces:
        assert piece in plain(lines[0] if lines else err), err


@pytest.fixture
def refused(capfd, tmp_path) -> Callable[..., str]:
    """Run rlhf-train in this process and expect it to refuse; returns the message."""

    def run(*argv: str | Path, pieces: tuple[str, ...] = (), output: str | None = None) -> str:
        folder = tmp_path / (output or "out")
        before = contents(folder) if folder.exists() else None
        argv = (*map(str, argv), "--output-dir", str(folder))
        begun = time.monotonic()
        code = main(list(argv))
        out, err = capfd.readouterr()
        assert code == 2, err
        assert time.monotonic() - begun < SECONDS
        assert_one_message(err, out, pieces)
        assert (contents(folder) if folder.exists() else None) == before, "something was left in the output folder"
        assert not (tmp_path / "outputs").exists()
        return err

    return run


def written(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path.absolute()


FLAGS = {"sft": ("--sft-data",), "reward": ("--preference-data",), "ppo": ("--prompt-data",)}
WELL = {
    "sft": '{"prompt": "p", "completion": "c"}',
    "reward": '{"prompt": "p", "chosen": "c", "rejected": "r"}',
    "ppo": '{"prompt": "p"}',
}


def stage_flags(stage: str, shelf: Path) -> list[str]:
    """What a stage needs besides its data."""
    return {
        "sft": TINY,
        "reward": ["--reward.model-path", str(shelf / "lm")],
        "ppo": ["--ppo.model-path", str(shelf / "lm"), "--ppo.reward", str(shelf / "rm"), "--ppo.max-new-tokens", "8"],
    }[stage]


BAD_FILES: dict[str, tuple[Callable[[str], str | bytes], tuple[str, ...]]] = {
    "empty": (lambda good: "", ("is empty", "needs a JSON list")),
    "empty list": (lambda good: "[]", ("list is empty", "at least one record")),
    "cut off": (lambda good: f"[{good},\n{good[:-1]}", ("line 2, column", "record 2", "cut off")),
    "no list": (lambda good: "prompt;completion", ("the table has no row below its column names",)),
    "no object": (lambda good: f'[{good}, "x"]', ("record 2 (line 1)", "a string", "expected an object")),
    "misspelt": (
        lambda good: good.replace("prompt", "promt"),
        ("record 1", "no key 'prompt'", "'promt' looks like a misspelling"),
    ),
    "type": (lambda good: good.replace('"p"', "3"), ("record 1", "'prompt' must be a text, got int")),
    "null": (lambda good: f"[{good}, {good.replace(chr(34) + 'p' + chr(34), 'null')}]", ("record 2", "is null")),
    "duplicate key": (lambda good: good.replace("{", '{"prompt": "q", '), ("record 1", "'prompt' twice", "keep one")),
    "NaN": (lambda good: good.replace("}", ', "n": NaN}'), ("record 1", "NaN", "null or a number")),
    "Latin-1": (lambda good: good.replace("p", "ü", 1).encode("latin-1"), ("byte 0xfc is not UTF-8", "save")),
    "UTF-16": (lambda good: good.encode("utf-16"), ("UTF-16", "iconv")),
    "surrogate": (lambda good: good.replace('"p"', '"\\ud800"'), ("lone surrogate \\ud800", "remove it")),
    "text behind": (lambda good: f"[{good}] {good}", ("text follows the closing ']'", "remove it")),
}


@pytest.mark.parametrize("stage", FLAGS)
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_data_file_is_refused_in_every_stage(refused, shelf, stage, bad):
    make, pieces = BAD_FILES[bad]
    path = written("bad.json", make(WELL[stage]))
    refused(stage, *FLAGS[stage], path, *stage_flags(stage, shelf), pieces=(str(path), *pieces))


def test_a_file_of_another_kind_is_refused_with_its_flag(refused, shelf):
    data, pairs, prompts = (shelf / f"{name}.json" for name in GOOD)
    refused("sft", "--sft-data", pairs, *TINY, pieces=("looks like preference pairs", "--preference-data"))
    flags = stage_flags("reward", shelf)
    refused("reward", "--preference-data", data, *flags, pieces=("looks like demonstrations", "--sft-data"))
    refused("sft", "--sft-data", prompts, *TINY, pieces=("no key 'completion'", "found 'prompt'"))


@pytest.mark.parametrize(
    ("stage", "key", "value", "piece"),
    [
        ("sft", "completion", "", "'completion' is empty"),
        ("sft", "completion", " \n", "'completion' is only white space"),
        ("reward", "chosen", "\t", "'chosen' is only white space"),
        ("reward", "rejected", "", "'rejected' is empty"),
        ("reward", "margin", "1", "'margin' must be a number"),
    ],
)
def test_an_answer_without_content_is_refused(refused, shelf, stage, key, value, piece):
    path = written("bad.json", json.dumps([json.loads(WELL[stage]), json.loads(WELL[stage]) | {key: value}]))
    refused(stage, *FLAGS[stage], path, *stage_flags(stage, shelf), pieces=(f"{path}: record 2 (line 1): {piece}",))


@pytest.mark.parametrize("stage", FLAGS)
def test_a_missing_data_file_is_refused(refused, shelf, stage):
    refused(stage, *FLAGS[stage], "missing.json", *stage_flags(stage, shelf), pieces=("missing.json: no such file",))


@pytest.mark.parametrize(
    ("stage", "flag"), [("sft", "--sft-val-data"), ("reward", "--preference-val-data")], ids=["sft", "reward"]
)
def test_a_missing_validation_file_is_refused(refused, shelf, stage, flag):
    good = shelf / {"sft": "sft.json", "reward": "pairs.json"}[stage]
    flags = [*FLAGS[stage], good, flag, "missing.json", *stage_flags(stage, shelf)]
    refused(stage, *flags, pieces=("missing.json: no such file", flag))


def test_pairs_without_a_difference_are_refused_when_nothing_else_is_left(refused, shelf):
    path = written("ties.json", json.dumps([{"prompt": "p", "chosen": "c", "rejected": "c"}] * 3))
    flags = stage_flags("reward", shelf)
    refused("reward", "--preference-data", path, *flags, pieces=("in every pair the chosen text equals",))


def long_pair(number: int, ends: tuple[str, str]) -> dict[str, str]:
    """Two texts that differ in their ends alone, behind any context."""
    return {"prompt": f"say {number}", "chosen": " yes" * 90 + ends[0], "rejected": " yes" * 90 + ends[1]}


def test_pairs_that_truncation_makes_equal_are_dropped_and_refused_when_nothing_else_is_left(
    refused, shelf, tmp_path, capfd
):
    equal = [long_pair(number, (" good", " bad")) for number in range(3)]
    path, flags = written("equal.json", json.dumps(equal)), stage_flags("reward", shelf)
    pieces = ("equal.json: after truncation to", "nothing is left to learn from")
    refused("reward", "--preference-data", path, *flags, pieces=pieces)
    some = written("some.json", json.dumps(equal + GOOD["pairs"]))
    argv = ["reward", "--preference-data", some, "--preference-val-data", shelf / "pairs.json", *flags]
    assert main([*map(str, argv), "--output-dir", str(tmp_path / "out")]) == 0
    err = " ".join(capfd.readouterr().err.split())
    assert "dropped 3 pairs whose chosen text equals the rejected one after truncation to" in err
    assert "8 preference pairs, 8 held out" in err
    assert "8 of 8 held-out records are also training records" in err


def test_what_cannot_be_compiled_is_refused_when_it_is_asked_for(refused, shelf, monkeypatch):
    flags = ["sft", "--sft-data", shelf / "sft.json", *TINY, *ONE_STEP[:4], "--compile", "on"]
    refused(*flags, "--sft.dropout", "0.1", pieces=("--compile on: dropout", "--sft.dropout 0", "--compile off"))
    refused(*flags, "--sft.gradient-checkpointing", pieces=("--sft.gradient-checkpointing computes", "--compile off"))
    monkeypatch.setattr("rlhf.train.compile_policy.has_compiler", lambda: False)
    refused(*flags, "--device", "cpu", pieces=("--compile on: no C++ compiler", "install g++", "--compile off"))


COMMAND_LINES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no stage": ([], ("sft", "reward", "ppo", "pipeline")),
    "unknown stage": (["stf"], ("sft",)),
    "unknown flag": (["sft", "--lerning-rate", "3"], ("--lerning-rate", "--sft.learning-rate")),
    "unknown dotted flag": (["sft", "--sft.lerning-rate", "3"], ("--sft.lerning-rate", "--sft.learning-rate")),
    "another stage's flag": (["sft", "--ppo.clip-eps", "0.1"], ("--ppo.clip-eps",)),
    "no value": (["sft", "--seed"], ("--seed",)),
    "a text for a number": (["sft", "--sft.batch-size", "many"], ("--sft.batch-size", "many")),
    "out of range": (["sft", "--sft.batch-size", "0"], ("batch_size must be at least 1, got 0",)),
    "out of an open range": (["ppo", "--ppo.clip-eps", "1"], ("clip_eps must be in (0, 1), got 1",)),
    "not a number": (["ppo", "--ppo.kl-coef", "nan"], ("kl_coef must be at least 0, got nan",)),
    "no such choice": (["sft", "--model.preset", "huge"], ("--model.preset", "huge")),
    "contradiction": (
        ["ppo", "--ppo.min-new-tokens", "99", "--ppo.max-new-tokens", "9"],
        ("min_new_tokens must be at most max_new_tokens",),
    ),
    "seed below 0": (["sft", "--seed", "-1"], ("seed must be in [0,",)),
    "seed beyond 64 bits": (["sft", "--seed", str(2**64)], ("seed must be in [0,",)),
    "no preset": (["sft", "--config", "nowhere"], ("--config nowhere: no such file", "demo")),
    "no value of --config": (["sft", "--config"], ("--config",)),
}


@pytest.mark.parametrize("wrong", COMMAND_LINES)
def test_a_wrong_command_line_is_refused_with_the_flag(capfd, tmp_path, wrong):
    argv, pieces = COMMAND_LINES[wrong]
    assert main(argv) == 2
    out, err = capfd.readouterr()
    assert_one_message(err, out, pieces)
    assert list(tmp_path.iterdir()) == []


YAML = {
    "unknown key": ("sft:\n  lerning_rate: 1", ("line 2", "sft.lerning_rate", "did you mean sft.learning_rate?")),
    "type": ("seed: x", ("line 1", "seed must be a whole number, got 'x'")),
    "range": ("sft: {batch_size: 0}", ("sft.batch_size must be at least 1, got 0",)),
    "duplicate": ("seed: 1\nseed: 2", ("line 2", "seed is set twice")),
    "null": ("ppo: {batch_size: }", ("ppo.batch_size must be a whole number, got None",)),
    "no mapping": ("[1]", ("must be a mapping",)),
    "syntax": ("a: b: c", ("line 1", "not valid YAML")),
    "a tag": ("seed: !!python/name:os.system", ("line 1", "seed")),
}


@pytest.mark.parametrize("wrong", YAML)
def test_a_wrong_configuration_file_is_refused_with_its_line(refused, wrong):
    text, pieces = YAML[wrong]
    written("mine.yaml", text)
    refused("pipeline", "--config", "mine.yaml", pieces=("mine.yaml: ", *pieces))


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


MODEL_DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no such folder",)),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], ("config.json: no such file",)),
    "bit flipped": (_flip, ("model.safetensors", "sha256")),
    "cut off": (_cut, ("model.safetensors", "cut off")),
}


@pytest.mark.parametrize("damage", MODEL_DAMAGES)
@pytest.mark.parametrize("place", ["sft", "reward", "ppo", "ppo's reward"])
def test_a_damaged_model_folder_is_refused(refused, shelf, place, damage):
    for name in ("lm", "rm"):
        shutil.copytree(shelf / name, name)
    spoil, pieces = MODEL_DAMAGES[damage]
    spoil(Path("rm" if place == "ppo's reward" else "lm").absolute())
    if place == "sft":
        argv = ["sft", "--sft-data", shelf / "sft.json", "--sft.model-path", "lm"]
    elif place == "reward":
        argv = ["reward", "--preference-data", shelf / "pairs.json", "--reward.model-path", "lm"]
    else:
        argv = ["ppo", "--prompt-data", shelf / "prompts.json", "--ppo.model-path", "lm", "--ppo.reward", "rm"]
        argv += ["--ppo.max-new-tokens", "8"]
    refused(*argv, pieces=pieces)


def test_a_stage_without_the_model_before_it_says_what_to_run(refused, shelf):
    refused(
        "reward",
        "--preference-data",
        shelf / "pairs.json",
        pieces=("run `rlhf-train sft` first", "--reward.model-path"),
    )
    refused("ppo", "--prompt-data", shelf / "prompts.json", pieces=("run `rlhf-train sft` first", "--ppo.model-path"))
    flags = ["--prompt-data", shelf / "prompts.json", "--ppo.model-path", shelf / "lm"]
    refused("ppo", *flags, pieces=("run `rlhf-train reward` first", "--ppo.reward"))


def ppo_flags(shelf: Path, **changes: Any) -> list[str]:
    """A PPO run of one small iteration on the shelf's files."""
    settings = {
        "prompt-data": shelf / "prompts.json",
        "ppo.model-path": shelf / "lm",
        "ppo.reward": shelf / "rm",
        "ppo.max-new-tokens": 8,
        "ppo.num-iterations": 1,
        "ppo.batch-size": 4,
        "ppo.minibatch-size": 4,
        "ppo.num-epochs": 1,
        "threads": 1,
    } | changes
    return [*(text for name, value in settings.items() for text in (f"--{name}", str(value))), "--log.no-tensorboard"]


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"ppo.reward": "{shelf}/foreign"}, ("vocabulary", "is not the policy's", "train it from the same SFT model")),
        ({"ppo.reward": "{shelf}/lm"}, ("holds a GPT2LMHeadModel, expected a GPT2ForSequenceClassification",)),
        ({"ppo.model-path": "{shelf}/rm"}, ("holds a GPT2ForSequenceClassification, expected a GPT2LMHeadModel",)),
        ({"ppo.max-new-tokens": "32"}, ("ppo.max_new_tokens is 32", "context of 32", "lower it")),
        ({"ppo.reward": "no_such_module:f"}, ("--ppo.reward no_such_module:f", "cannot be imported")),
        ({"ppo.reward": "{shelf}/rewards.py:missing"}, ("has no function 'missing'",)),
        ({"ppo.reward": "x*"}, ("--ppo.reward x*", "there is no such folder")),
        ({"model.n-layer": "7"}, ("has n_layer 1, but --model.n-layer (or the configuration file's) is 7", "drop it")),
        ({"device": "cuda"}, ("--device cuda", "use --device cpu")),
    ],
    ids=["vocabulary", "no reward model", "no policy", "context", "module", "function", "source", "shape", "GPU"],
)
def test_what_does_not_fit_together_is_refused_before_ppo(refused, shelf, monkeypatch, changes, pieces):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes = {name: value.format(shelf=shelf) for name, value in changes.items()}
    refused("ppo", *ppo_flags(shelf, **changes), pieces=pieces)


def test_an_impossible_shape_is_refused_and_leaves_nothing(refused, shelf):
    shape = ["--model.n-embd", "30", "--model.n-head", "4"]
    refused("sft", "--sft-data", shelf / "sft.json", *shape, pieces=("model.n_embd must be a multiple of n_head (4)",))
    refused("sft", *shape, pieces=("model.n_embd must be a multiple of n_head (4)",))  # nor the embedded example


def test_a_missing_model_leaves_no_embedded_example_behind(refused):
    refused("sft", "--sft.model-path", "missing", pieces=("missing: no such folder",))
    refused("sft", "--tokenizer.path", "missing", pieces=("missing: no such folder",))


def test_settings_without_effect_are_refused(refused, shelf):
    start = ["sft", "--sft-data", shelf / "sft.json", "--sft.model-path", shelf / "lm"]
    refused(*start, "--tokenizer.path", shelf / "foreign", pieces=("another vocabulary than --tokenizer.path", "drop"))
    for stage, kind in (("sft", "sft"), ("reward", "preference"), ("pipeline", "preference")):
        refused(stage, f"--{kind}-val-data", shelf / "sft.json", pieces=(f"add --{kind}-data FILE",))
    margins = ["reward", "--reward.model-path", shelf / "lm", "--reward.use-margin"]
    refused(*margins, pieces=("the embedded example: no pair has a 'margin'",))
    refused(*margins, "--preference-data", shelf / "pairs.json", pieces=("pairs.json: no pair has a 'margin'",))


def test_parameters_that_an_update_spoils_are_not_saved(shelf, capfd):
    """The gradient is finite, and what the decay leaves of the parameters is not."""
    flags = ["--sft-data", str(shelf / "sft.json"), *TINY, "--threads", "1", "--log.no-tensorboard"]
    spoilt = ["--sft.learning-rate", "3e38", "--sft.weight-decay", "100", "--sft.warmup-fraction", "0"]
    assert main(["sft", *flags, *spoilt, "--sft.max-steps", "3", "--checkpoint.every", "1", "--output-dir", "out"]) == 3
    assert "sft, step 1: " in (message := capfd.readouterr().err)
    assert "is not finite after the last update, though its gradient was" in message
    assert list(Path("out/checkpoints").glob("*/step-*")) == []
    assert json.loads(Path("out/logs/metrics.jsonl").read_text().splitlines()[-1])["event"] == "nonfinite"


def test_a_tokenizer_that_the_start_model_has_too_is_fine(shelf):
    same = ["--sft.model-path", str(shelf / "lm"), "--tokenizer.path", str(shelf / "rm")]
    flags = ["--sft-data", str(shelf / "sft.json"), *ONE_STEP[:4], "--threads", "1", "--log.no-tensorboard"]
    assert main(["sft", *flags, *same, "--output-dir", "out"]) == 0


PIPELINE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "bad prompts": (["--prompt-data", "bad.json"], ("bad.json: record 1", "no key 'prompt'")),
    "missing prompts": (["--prompt-data", "missing.json"], ("missing.json: no such file",)),
    "bad pairs": (["--preference-data", "bad.json"], ("bad.json: record 1", "no key 'prompt'")),
    "only ties": (["--preference-data", "ties.json"], ("in every pair the chosen text equals",)),
    "only pairs that truncation makes equal": (
        ["--preference-data", "equal.json", "--reward.model-path", "{shelf}/lm"],
        ("equal.json: after truncation to 32 tokens",),
    ),
    "bad validation pairs": (["--preference-val-data", "bad.json"], ("bad.json: record 1",)),
    "bad validation data": (["--sft-val-data", "bad.json"], ("bad.json: record 1",)),
    "a reward that cannot be imported": (["--ppo.reward", "nowhere:f"], ("nowhere cannot be imported",)),
    "a reward folder that is none": (["--ppo.reward", "empty"], ("empty", "config.json")),
    "a reward that is a language model": (
        ["--ppo.reward", "{shelf}/lm"],
        ("expected a GPT2ForSequenceClassification",),
    ),
    "no room for a prompt": (["--ppo.max-new-tokens", "64"], ("ppo.max_new_tokens is 64", "context of 64")),
    "no model for the reward": (["--reward.model-path", "missing"], ("missing: no such folder",)),
    "no model for PPO": (["--ppo.model-path", "missing"], ("missing: no such folder",)),
    "all weights 0": (["--ppo.reward", "0*{shelf}/rewards.py:zero"], ("every weight is 0",)),
    "a reward that cannot be called": (["--ppo.reward", "builtins:len"], ("reward len:", "prompts, completions")),
    "a column that the prompts lack": (
        ["--ppo.reward", "{shelf}/rewards.py:column"],
        ("reward column: missing a required argument: 'answer'", "columns of its file that it accepts (item)"),
    ),
    "no language model for the reward": (["--reward.model-path", "{shelf}/rm"], ("expected a GPT2LMHeadModel",)),
    "no language model for PPO": (["--ppo.model-path", "{shelf}/rm"], ("expected a GPT2LMHeadModel",)),
    "no weights for SFT": (["--sft.model-path", "unweighted"], ("model.safetensors: no such file",)),
    "no weights for the reward": (["--reward.model-path", "unweighted"], ("model.safetensors: no such file",)),
    "no weights for PPO": (["--ppo.model-path", "unweighted"], ("model.safetensors: no such file",)),
    "another vocabulary": (
        ["--sft.model-path", "{shelf}/lm", "--ppo.reward", "{shelf}/foreign"],
        ("foreign: the reward model's vocabulary",),
    ),
    "another vocabulary, once trained": (
        ["--sft.model-path", "{shelf}/lm", "--ppo.model-path", "foreign_lm"],
        ("out/reward: the reward model's vocabulary",),
    ),
    "another shape": (
        ["--ppo.model-path", "{shelf}/lm", "--model.n-embd", "64"],
        ("but --model.n-embd (or the configuration file's) is 64",),
    ),
    "SFT that cannot be compiled": (["--config", "dropout.yaml"], ("--compile on: dropout's code",)),
    "a reward model that cannot be compiled": (
        ["--config", "reward.yaml"],
        ("--compile on: compiled code would keep what --reward.gradient-checkpointing computes",),
    ),
    "PPO that cannot be compiled": (
        ["--config", "ppo.yaml"],
        ("--compile on: compiled code would keep what --ppo.gradient-checkpointing computes",),
    ),
    "no margins": (["--config", "margin.yaml"], ("pairs.json: no pair has a 'margin'",)),
    "no earlier stage": (["--start-at", "ppo"], ("run `rlhf-train sft` first",)),
}


@pytest.mark.parametrize("wrong", PIPELINE)
def test_the_pipeline_refuses_before_anything_is_trained(refused, shelf, wrong):
    changes, pieces = PIPELINE[wrong]
    written("bad.json", '[{"promt": "x"}]')
    written("ties.json", json.dumps([{"prompt": "p", "chosen": "c", "rejected": "c"}] * 3))
    written("equal.json", json.dumps([long_pair(number, (" good", " bad")) for number in range(3)]))
    written("prompts.json", '[{"prompt": "x", "item": 1}]')
    written("dropout.yaml", "{compile: 'on', sft: {dropout: 0.1}}")
    for stage in ("reward", "ppo"):
        written(f"{stage}.yaml", f"{{compile: 'on', {stage}: {{gradient_checkpointing: true}}}}")
    written("margin.yaml", "reward: {use_margin: true}")
    Path("empty").mkdir()
    shutil.copytree(shelf / "lm", "unweighted", ignore=shutil.ignore_patterns("*.safetensors", "manifest*"))
    shutil.copytree(shelf / "lm", "foreign_lm")
    shutil.copy(shelf / "foreign" / "tokenizer.json", "foreign_lm")
    flags = {"--sft-data": shelf / "sft.json", "--preference-data": shelf / "pairs.json"}
    flags |= {"--prompt-data": "prompts.json", "--ppo.max-new-tokens": "8"}
    flags |= dict(zip(changes[::2], (value.format(shelf=shelf) for value in changes[1::2]), strict=True))
    argv = [text for pair in flags.items() for text in pair]
    shape = [] if any(name.endswith(".model-path") for name in flags) else TINY
    refused("pipeline", *argv, *shape, *ONE_STEP, "--threads", "1", "--log.no-tensorboard", pieces=pieces)


@pytest.mark.parametrize(
    ("argv", "piece"),
    [
        (["reward", "--reward.use-margin"], "the embedded example: no pair has a 'margin'"),
        (["reward", "--compile", "on", "--reward.gradient-checkpointing"], "--reward.gradient-checkpointing computes"),
        (["ppo", "--compile", "on", "--ppo.gradient-checkpointing"], "--ppo.gradient-checkpointing computes"),
        (["ppo", "--ppo.reward", "0*{shelf}/rewards.py:zero"], "every weight is 0"),
        (["ppo", "--ppo.reward", "{shelf}/rewards.py:column"], "columns of its file that it accepts (item)"),
    ],
)
def test_a_stage_refuses_before_the_stages_that_it_needs_are_trained(refused, shelf, argv, piece):
    refused(*(text.format(shelf=shelf) for text in argv), pieces=(piece,))


def test_the_pipeline_refuses_an_output_folder_with_checkpoints_of_a_later_stage(refused, shelf, tmp_path):
    state = Checkpoint(4, {"w": torch.ones(3)}, {})
    save_checkpoint(tmp_path / "out" / "checkpoints" / "ppo", state, keep=1)
    flags = ["--preference-data", shelf / "pairs.json", "--prompt-data", shelf / "prompts.json"]
    pieces = ("holds checkpoints of another ppo run (step 4)", "--resume")
    refused("pipeline", *sft_flags(shelf), *ONE_STEP[4:], *flags, pieces=pieces)


HOLD = """
import sys
from pathlib import Path
from rlhf.io.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def a_live_run(folder: Path) -> Iterator[None]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder.parent)
    try:
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_output_folder_of_a_live_run_is_refused(refused, shelf, tmp_path, stage):
    data = shelf / {"sft": "sft.json", "reward": "pairs.json", "ppo": "prompts.json"}[stage]
    with a_live_run(tmp_path / "out"):
        refused(stage, *FLAGS[stage], data, *stage_flags(stage, shelf), pieces=("out: in use by a live run",))


def test_an_output_folder_that_cannot_be_one_is_refused(refused, shelf, capfd):
    written("out", "a file")
    assert main(["sft", *sft_flags(shelf), "--output-dir", "out"]) == 2
    assert "out: cannot be written" in capfd.readouterr().err
    assert Path("out").read_text() == "a file"
    refused("sft", *sft_flags(shelf), output="out/below", pieces=("out/below: cannot be written", "--output-dir"))


def test_the_cache_that_cannot_be_written_is_refused_with_its_flag(refused, shelf):
    written("file", "")
    refused("sft", *sft_flags(shelf), "--cache-dir", "file", pieces=("file", "cannot be written", "--cache-dir"))


@pytest.fixture
def continued(finished, tmp_path) -> Path:
    """A copy of the finished run at out/."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_another_runs_checkpoints_are_refused_without_resume(refused, shelf, continued):
    refused("sft", *sft_flags(shelf), pieces=("out: holds checkpoints of another sft run (step 1)", "--resume"))


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        (["--sft.learning-rate", "0.5"], "sft.learning_rate was 0.001, is 0.5"),
        (["--seed", "9"], "seed was 0, is 9"),
        (["--model.n-layer", "2"], "model.n_layer was 1, is 2"),
        (["--sft.batch-size", "8"], "sft.batch_size was 4, is 8"),
        (["--sft-data", "other.json"], "sft.json other.json: the data have changed"),
    ],
)
def test_resuming_with_another_setting_is_refused_with_both_values(refused, shelf, continued, changes, piece):
    written("other.json", json.dumps(GOOD["sft"][:-1]))
    refused("sft", *sft_flags(shelf), *changes, "--resume", pieces=("the run has changed", piece, "Undo the change"))


def test_resuming_with_what_does_not_matter_is_fine(shelf, continued, capfd):
    flags = ["--checkpoint.keep", "1", "--log.every", "3", "--cache-dir", "elsewhere", "--resume"]
    assert main(["sft", *sft_flags(shelf), *flags, "--output-dir", str(continued)]) == 0
    assert "continuing after step 1" in capfd.readouterr().err


def test_resuming_from_a_checkpoint_of_another_shape_is_refused(refused, shelf, continued):
    root = continued / "checkpoints" / "sft"
    saved = load_checkpoint(root)
    name = max(saved.tensors, key=lambda key: saved.tensors[key].numel())
    changed = saved.tensors | {name: saved.tensors[name].flatten()[:-7].clone()}
    save_checkpoint(root, saved._replace(tensors=changed), keep=1)
    refused("sft", *sft_flags(shelf), "--resume", pieces=("checkpoints/sft: the checkpoint has another shape",))


@pytest.mark.parametrize("size", [100, -1])
def test_resuming_from_a_damaged_checkpoint_is_refused_by_the_file(refused, shelf, continued, size):
    path = continued / "checkpoints" / "sft" / "step-000001" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused("sft", *sft_flags(shelf), "--resume", pieces=(str(path), "cut off or altered"))


def test_no_space_for_the_checkpoint_is_refused(shelf, tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main(["sft", *sft_flags(shelf), "--output-dir", "out"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capfd.readouterr()
    assert code == 2
    assert_one_message(err, out, ("no space left to write it", "free some"))
    left = [name for name in contents(tmp_path / "out") if Path(name).name != ".rlhf.json"]  # records of what is ours
    assert not any(name.endswith(".safetensors") or "/." in f"/{name}" for name in left)


def test_what_is_cut_or_dropped_is_counted(shelf, capfd, tmp_path):
    long = {"prompt": "word " * 100, "completion": "c"}
    data = written("sft.json", json.dumps([*GOOD["sft"], long, long]))
    flags = ["--sft-data", str(data), *sft_flags(shelf)[2:], "--model.n-positions", "64"]
    assert main(["sft", *flags, "--output-dir", "a"]) == 0
    assert "8 of 10 demonstrations are whole within 64 tokens, the other 2 lose their end" in capfd.readouterr().err
    tie = {"prompt": "p", "chosen": "c", "rejected": "c"}
    data = written("pairs.json", json.dumps([tie, *GOOD["pairs"], tie, tie]))
    flags = ["--preference-data", str(data), "--reward.model-path", str(shelf / "lm"), *ONE_STEP[4:], "--threads", "1"]
    assert main(["reward", *flags, "--log.no-tensorboard", "--output-dir", "b"]) == 0
    assert "dropped 3 pairs whose chosen text equals the rejected one" in capfd.readouterr().err
    data = written("prompts.json", json.dumps([{"prompt": "word " * 100}, *GOOD["prompts"]]))
    assert main(["ppo", *ppo_flags(shelf, **{"prompt-data": data}), "--output-dir", "c"]) == 0
    assert "8 of 9 prompts are whole within 24 tokens, the other 1 lose their beginning" in capfd.readouterr().err
    for name, note in (("a", "8 of 10 demonstrations"), ("b", "dropped 3 pairs"), ("c", "8 of 9 prompts")):
        first = json.loads((tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines()[0])
        assert any(note in text for text in first["notes"])


@pytest.mark.parametrize(
    ("function", "piece"),
    [
        ("fails", "reward fails: raised RuntimeError: no luck"),
        ("short", "reward short: expected a list of 4 numbers, got 1"),
    ],
)
def test_a_reward_function_that_fails_ends_the_run_with_one_message(shelf, capfd, function, piece):
    flags = ppo_flags(shelf, **{"ppo.reward": f"{shelf}/rewards.py:{function}"})
    assert main(["ppo", *flags, "--output-dir", "out"]) == 2
    out, err = capfd.readouterr()
    assert_one_message(err, out, (piece,))
    assert not Path("out/policy").exists()


def test_a_reward_that_is_not_finite_stops_the_run_with_its_state_saved(shelf, capfd):
    flags = ppo_flags(shelf, **{"ppo.reward": f"{shelf}/rewards.py:nan"})
    assert main(["ppo", *flags, "--output-dir", "out"]) == 3
    out, err = capfd.readouterr()
    assert_one_message(err, out, ("ppo iteration 1: reward nan is nan for the completion", "the update was refused"))
    assert load_checkpoint(Path("out/checkpoints/ppo")).step == 0
    (folder,) = Path("out/nonfinite").iterdir()
    assert read_manifest(folder)["stage"] == "ppo"
    assert not Path("out/policy").exists()


# -- the installed programs, in processes of their own --


def program(*argv: str | bytes | Path, timeout: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run an installed program in the working directory."""
    command = [PROGRAMS / argv[0], *argv[1:]]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)


OUTSIDE: dict[str, tuple[list, tuple[str, ...]]] = {
    "flag": (["sft", "--sft.lerning-rate", "1"], ("--sft.learning-rate",)),
    "YAML": (["sft", "--config", "bad.yaml"], ("bad.yaml: line 1: unknown key sead; did you mean seed?",)),
    "data": (["sft", "--sft-data", "bad.json"], ("bad.json: line 1, column 13", "record 1", "cut off")),
    "name that is no UTF-8": (["sft", "--sft-data", b"\xff.json"], ("'\\udcff.json' is not UTF-8 text", "rename")),
    "pipeline": (["pipeline", "--sft-data", "{shelf}/sft.json", "--prompt-data", "bad.json"], ("bad.json",)),
    # without data files the stages before are trained first: the rest of the command line must be checked before that
    "PPO as typed, with a wrong reward": (["ppo", "--ppo.reward", "nowhere:f"], ("nowhere cannot be imported",)),
    "PPO as typed, with no room": (["ppo", "--ppo.max-new-tokens", "128"], ("no room for a prompt",)),
    "PPO as typed, no room beside the shortest": (["ppo", "--ppo.min-new-tokens", "128"], ("min_new_tokens is 128",)),
}


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_the_installed_program_refuses(shelf, tmp_path, wrong):
    argv, pieces = OUTSIDE[wrong]
    written("bad.json", '[{"prompt": "x')
    written("bad.yaml", "sead: 1")
    argv = [text.format(shelf=shelf) if isinstance(text, str) else text for text in argv]
    done = program("rlhf-train", *argv, "--output-dir", "out")
    assert done.returncode == 2, done.stderr
    assert_one_message(done.stderr, done.stdout, pieces)
    assert not (tmp_path / "out").exists()


def test_the_installed_program_refuses_the_folder_of_a_live_run(shelf, tmp_path):
    with a_live_run(tmp_path / "out"):
        done = program("rlhf-train", "sft", *sft_flags(shelf), "--output-dir", "out")
    assert done.returncode == 2
    assert_one_message(done.stderr, done.stdout, ("out: in use by a live run",))


@pytest.mark.parametrize("flags", [["--sft-data", "[" * 5000], ["--config", "x" * 5000]], ids=["data", "config"])
def test_a_path_that_is_too_long_is_refused(refused, flags):
    refused("sft", *flags, pieces=("File name too long",))


@pytest.mark.parametrize("name", ["run[/x]", "run[lr=1e-3]"])
def test_a_folder_with_brackets_is_told_as_it_is(shelf, capfd, name):
    assert main(["sft", *sft_flags(shelf), "--output-dir", name]) == 0
    assert f"rlhf-train sft → {name}\n" in (err := capfd.readouterr().err)
    assert f"sft: wrote {name}" in err


def test_the_example_refuses_a_seed_below_0_before_it_writes(tmp_path):
    done = program("rlhf-example", "--seed", "-1", "--create-dummy-data", "--output-dir", "out")
    assert done.returncode == 2
    assert_one_message(done.stderr, done.stdout, ("seed must be in [0,",))
    assert not (tmp_path / "out").exists()


def test_the_example_without_its_data_is_refused(tmp_path):
    done = program("rlhf-example", "--output-dir", "out")
    assert done.returncode == 2
    assert_one_message(done.stderr, done.stdout, ("demonstrations.json: no such file; add --create-dummy-data",))
    assert not (tmp_path / "out").exists()


HELPS = [
    ["rlhf-train"],
    *(["rlhf-train", stage] for stage in ("sft", "reward", "ppo", "pipeline")),
    ["rlhf-evaluate"],
    ["rlhf-generate"],
    ["rlhf-example"],
]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_comes_at_once(command):
    best = float("inf")
    for _ in range(3):
        begun = time.monotonic()
        done = program(*command, "--help")
        best = min(best, time.monotonic() - begun)
        assert done.returncode == 0
        assert "usage: " + " ".join(command) in done.stdout
        if best < 1:
            break
    assert best < 2  # 0.3 s here; generous, for machines that are busy


IMPORTS = """
import contextlib, importlib.metadata, io, json, sys
heavy = {}
for name, *argv in json.loads(sys.argv[1]):
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        entry.load()([*argv, "--help"])
    roots = {module.partition(".")[0] for module in sys.modules}
    heavy[" ".join([name, *argv])] = sorted(roots & {"torch", "ray", "transformers", "numpy", "tokenizers"})
print(json.dumps(heavy))
"""


def test_help_imports_nothing_heavy(tmp_path):
    command = [sys.executable, "-c", IMPORTS, json.dumps(HELPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == {" ".join(command): [] for command in HELPS}


def test_tests_do_not_touch_the_users_cache():
    """A guard of this file itself: what it runs is tokenised below the test's own folder."""
    assert str(Path.cwd()) in str(default_cache_dir())


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(monkeypatch, given):
    from rlhf.cli.command import run_command

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_command(lambda: None) == 0
    found = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert found == (given or {"GOMP_SPINCOUNT": "10000"})
