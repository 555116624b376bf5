"""YAML to configuration and back; whatever is wrong in a file is refused with its line, key and nearest spelling."""

import dataclasses
import math
import re
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import PipelineRun, PPOConfig, PPORun, RewardRun, SFTConfig, SFTRun
from rlhf.errors import UserError
from rlhf.io.presets import dump_config, load_config, load_dist_config, narrow, parse_config
from rlhf.ranges import flat_fields

SHIPPED = sorted(entry.name for entry in resources.files("rlhf.configs").iterdir() if entry.name.endswith(".yaml"))


def test_presets_are_shipped():
    assert {"model_config.yaml", "distributed.yaml", "demo.yaml", "gpt2.yaml", "gpt2-xl.yaml"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_preset_loads_by_name_and_by_path(name, monkeypatch, tmp_path):
    text = (resources.files("rlhf.configs") / name).read_text(encoding="utf-8")
    expected = parse_config(text, source=name)
    monkeypatch.chdir(tmp_path)  # no file of that name here: as from an installed wheel
    for spelling in (name.removesuffix(".yaml"), name, f"configs/{name}"):
        assert load_config(spelling) == expected
    path = tmp_path / "copy.yml"
    path.write_text(text, encoding="utf-8")
    assert load_config(str(path)) == expected
    for kind in (SFTRun, RewardRun, PPORun):
        assert isinstance(narrow(expected, kind), kind)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_the_presets_of_gpt2_are_of_that_size(name):
    assert load_config(name).model.preset == name


def test_a_file_goes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("seed: 99")
    assert load_config("demo.yaml").seed == 99
    assert load_config("demo").seed != 99


@pytest.mark.parametrize("name", ["nowhere", "nowhere.yaml", "elsewhere/demo.yaml", "/demo.yaml", "", "a/b/demo"])
def test_a_file_that_is_not_there_is_refused_with_the_presets(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^--config {re.escape(name)}: no such file; presets .*: .*demo, .*gpt2"):
        load_config(name)


def test_a_folder_and_an_empty_file_are_refused(tmp_path):
    for text in ("", "\n \n"):
        (tmp_path / "empty.yaml").write_text(text)
        with pytest.raises(UserError, match=r"^--config .*empty\.yaml: the file is empty"):
            load_config(str(tmp_path / "empty.yaml"))
    with pytest.raises(UserError, match=r"^--config .*: is a folder, expected a YAML file"):
        load_config(str(tmp_path))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: cannot be read as UTF-8 text"):
        load_config(str(path))


def test_an_error_in_a_file_names_the_file_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("\nsead: 1")
    with pytest.raises(UserError, match=r"^mine\.yaml: line 2: unknown key sead; did you mean seed\?"):
        load_config("mine.yaml")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "\n\n"])
def test_an_empty_file_is_all_defaults(text):
    assert parse_config(text, source="x") == PipelineRun()


def test_every_kind_of_value_is_read():
    read = parse_config(
        """
        output_dir: some/folder
        seed: 18446744073709551615
        resume: true
        threads: null
        device: cpu
        sft-data: data.json
        sft: {learning-rate: 1e-3, max_grad_norm: inf, epochs: 2, weight_decay: 0, model_path: ~}
        reward:
          learning_rate: .5
          max_steps: 7
        ppo:
          reward: ["0.5*a:b", folder]
          reward_clip: .inf
          dual_clip: 3
        """,
        source="x",
    )
    assert read == PipelineRun(
        output_dir=Path("some/folder"),
        seed=2**64 - 1,
        resume=True,
        device="cpu",
        sft_data=Path("data.json"),
        sft=SFTConfig(learning_rate=1e-3, max_grad_norm=math.inf, epochs=2.0, weight_decay=0.0),
        reward=dataclasses.replace(PipelineRun().reward, learning_rate=0.5, max_steps=7),
        ppo=PPOConfig(reward=("0.5*a:b", "folder"), reward_clip=math.inf, dual_clip=3.0),
    )
    assert isinstance(read.sft.epochs, float)
    assert isinstance(read.ppo.reward, tuple)
    assert isinstance(read.sft_data, Path)


@pytest.mark.parametrize("written", ["on", "off", "auto", "'on'", '"off"', "!!str on"])
def test_a_choice_is_read_as_it_is_written(written):
    """YAML takes a bare on or off for a boolean."""
    assert parse_config(f"compile: {written}", source="x").compile == written.split()[-1].strip("'\"")


@pytest.mark.parametrize(("written", "expected"), [("on", True), ("no", False)])
def test_a_flag_may_still_be_written_as_a_word(written, expected):
    assert parse_config(f"log: {{tensorboard: {written}}}", source="x").log.tensorboard is expected


def test_merge_keys_are_read_and_what_is_set_beside_them_counts():
    text = """
    sft: &common {epochs: 3, batch-size: 4, learning_rate: 1e-2}
    reward: {<<: *common, epochs: 2}
    ppo: {<<: [{batch_size: 8, minibatch_size: 8}, {batch_size: 9}]}
    """
    read = parse_config(text, source="x")
    assert (read.reward.epochs, read.reward.batch_size, read.reward.learning_rate) == (2.0, 4, 1e-2)
    assert read.ppo.batch_size == 8  # the first of several


def test_one_source_of_reward_needs_no_list():
    assert parse_config("ppo: {reward: folder}", source="x").ppo.reward == ("folder",)


@pytest.mark.parametrize("kind", [PipelineRun, SFTRun, RewardRun, PPORun])
def test_the_defaults_survive_a_round_trip(kind):
    assert narrow(parse_config(dump_config(kind()), source="x"), kind) == kind()


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PATHS = TEXTS.filter(lambda text: "\0" not in text).map(Path)
FLOATS = {"min_value": 1.2e-38, "max_value": 3.4e38}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    output_dir=PATHS,
    sft_data=st.none() | PATHS,
    config=st.none() | TEXTS,
    resume=st.booleans(),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    rate=st.floats(**FLOATS),
    clip=st.just(math.inf) | st.floats(**FLOATS),
    max_steps=st.none() | st.integers(1, 2**31 - 1),
    reward=st.lists(TEXTS, max_size=3),
)
def test_any_configuration_survives_a_round_trip(
    seed, output_dir, sft_data, config, resume, device, rate, clip, max_steps, reward
):
    made = PipelineRun(
        config=config,
        seed=seed,
        output_dir=output_dir,
        sft_data=sft_data,
        resume=resume,
        device=device,
        sft=SFTConfig(learning_rate=rate, max_grad_norm=clip, max_steps=max_steps),
        ppo=PPOConfig(reward=tuple(reward), reward_clip=clip),
    )
    again = parse_config(dump_config(made), source="x")
    assert again == made
    assert {name: type(value) for name, value in flat_fields(again).items()} == {
        name: type(value) for name, value in flat_fields(made).items()
    }


NASTY = ["\x85", "a\u2028b", "\u2029", "\ufeff", " ", " a ", "\n", "a\n\nb\n", "\t", "\x00", "\x7f", "\udcff", "é𝄞"]
NASTY += [
    "~",
    "null",
    "yes",
    "1e3",
    "0x10",
    "1:30",
    "2020-01-02",
    "- a",
    "a: b",
    "# a",
    "{a}",
    "[a",
    "'",
    '"',
    "!x",
    "&a",
    "*a",
    "%",
]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_any_text_survives_a_round_trip(text):
    made = PipelineRun(config=text, output_dir=Path(text.replace("\0", "")), ppo=PPOConfig(reward=(text, f"x{text}x")))
    dumped = dump_config(made).encode().decode()
    assert parse_config(dumped, source="x") == made


REFUSED = {
    "unknown key": ("seed: 1\nsead: 2", "line 2: unknown key sead; did you mean seed?"),
    "unknown key below": (
        "sft:\n  lerning_rate: 1",
        "line 2: unknown key sft.lerning_rate; did you mean sft.learning_rate?",
    ),
    "key of a section above": (
        "learning_rate: 1",
        "unknown key learning_rate; it is a key of ppo or dpo or reward or sft",
    ),
    "section in the key": ("sft.batch-size: 8", "unknown key sft.batch-size; it is a key of sft: write `sft: {batch_"),
    "no section in the key": ("lft.batch_size: 8", "unknown key lft.batch_size; "),
    "nothing near": ("ppo: {xyzzy: 1}", "line 1: unknown key ppo.xyzzy; known here: learning_rate"),
    "key is a number": ("1: 2", "line 1: unknown key 1; known here"),
    "key is a list": ("? [seed]\n: 1", "line 1: unknown key"),
    "merge of no mapping": ("seed: 1\n<<: 3", "line 2: << takes a mapping such as *common"),
    "unknown key in a merge": ("sft: {<<: {sead: 1}}", "line 1: unknown key sft.sead"),
    "merge of itself": ("&a\n<<: *a", "nested too deeply"),
    "infinite whole number": ("sft: {learning_rate: 1" + "0" * 400 + "}", "learning_rate must be a number"),
    "too small for float32": ("sft: {adam_eps: 1e-50}", "sft.adam_eps must be between 1.2e-38 and 3.4e+38"),
    "too many": ("sft: {batch_size: 100000000}", "sft.batch_size must be at most 1048576, got 100000000"),
    "duplicate key": ("seed: 1\nseed: 1", "line 2: seed is set twice; keep one"),
    "duplicate key, dashed": ("sft-data: a\nsft_data: b", "line 2: sft_data is set twice; keep one"),
    "duplicate key below": ("sft:\n  epochs: 1\n  epochs: 2", "line 3: sft.epochs is set twice"),
    "text for a number": ("sft: {epochs: many}", "line 1: sft.epochs must be a number, got 'many'"),
    "text for a whole number": ("seed: '1'", "line 1: seed must be a whole number, got '1'"),
    "fraction for a whole number": ("sft: {batch_size: 2.5}", "sft.batch_size must be a whole number, got 2.5"),
    "whole float": ("log: {every: 1.0}", "log.every must be a whole number, got 1.0"),
    "true for a whole number": ("seed: true", "seed must be a whole number, got True"),
    "true for a number": ("sft: {learning_rate: on}", "sft.learning_rate must be a number or null, got True"),
    "number for a flag": ("resume: 1", "resume must be true or false, got 1"),
    "text for a flag": ("resume: 'yes'", "resume must be true or false, got 'yes'"),
    "null for a number": ("sft:\n  batch_size:", "line 2: sft.batch_size must be a whole number, got None"),
    "null for a path": ("output_dir: null", "output_dir must be a path, got None"),
    "empty path": ("output_dir: ''", "output_dir must be a path, got ''"),
    "path with a null character": (
        'sft_data: "a\\0b"',
        r"sft_data must be a path or a list of paths or null, got 'a\x00b'",
    ),
    "number for a path": ("sft_data: 17", "sft_data must be a path or a list of paths or null, got 17"),
    "date for a path": ("sft_data: 2020-01-02", "sft_data must be a path or a list of paths or null"),
    "list for a number": ("seed: [1]", "seed must be a whole number, got [1]"),
    "mapping for a number": ("seed: {a: 1}", "seed must be a whole number, got {'a': 1}"),
    "none of the choices": ("model: {preset: huge}", "model.preset must be one of tiny, small, gpt2"),
    "list for a choice": ("device: [cpu]", "device must be one of auto, cpu, cuda"),
    "number in a list of texts": ("ppo: {reward: [a, 1]}", "ppo.reward must be a list of texts"),
    "null for a section": ("sft: null", "line 1: sft must be a mapping of keys to values"),
    "empty section": ("seed: 1\nsft:", "line 2: sft must be a mapping of keys to values"),
    "list for a section": ("sft: [1]", "line 1: sft must be a mapping of keys to values"),
    "text for a section": ("model: gpt2", "line 1: model must be a mapping of keys to values"),
    "list": ("- seed", "line 1: the file must be a mapping of keys to values"),
    "text": ("seed", "line 1: the file must be a mapping of keys to values"),
    "JSON list": ("[{}]", "line 1: the file must be a mapping of keys to values"),
    "out of range": ("seed: 1\nsft:\n  batch_size: 0", "sft.batch_size must be at least 1, got 0"),
    "NaN": ("sft: {epochs: nan}", "sft.epochs must be above 0, got nan"),
    "infinite": ("sft: {epochs: .inf}", "sft.epochs must be finite and above 0, got inf"),
    "seed too large": ("seed: 18446744073709551616", "seed must be in [0, 18446744073709551615]"),
    "seed negative": ("seed: -1", "seed must be in [0, 18446744073709551615], got -1"),
    "contradiction": (
        "ppo: {min_new_tokens: 40, max_new_tokens: 32}",
        "ppo.min_new_tokens must be at most max_new_tokens = 32, got 40",
    ),
    "colons": ("a: b: c", "line 1: not valid YAML (mapping values are not allowed here)"),
    "tab": ("sft:\n\tepochs: 1", "line 2: not valid YAML"),
    "open bracket": ("seed: 1\nppo: {reward: [a", "not valid YAML"),
    "open quote": ("seed: 1\nconfig: 'x", "not valid YAML"),
    "unknown alias": ("seed: 1\nsft: *x", "line 2: not valid YAML (found undefined alias 'x')"),
    "two documents": ("---\nseed: 1\n---\nseed: 2", "line 3: not valid YAML"),
    "control character": ("seed: \x01", "not valid YAML"),
    "unknown tag": ("\nseed: !foo 3", "line 2: "),
    "no such date": ("output_dir: 2020-13-45", "line 1: "),
    "unhashable key in a value": ("\nppo: {reward: {[a]: b}}", "line 2: "),
    "nested too deeply": ("[" * 5000, "not readable as YAML: its lists or mappings are nested too deeply"),
    "nested too deeply below": ("seed: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "boolean for a choice": ("device: off", "device must be one of auto, cpu, cuda, got 'off'"),
    "endless number": ("seed: " + "9" * 5000, "line 1: "),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_wrong_is_refused_with_its_place(wrong):
    text, piece = REFUSED[wrong]
    with pytest.raises(UserError) as caught:
        parse_config(text, source="file.yaml")
    assert str(caught.value).startswith("file.yaml: ")
    assert piece in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir [pwned]", "!!python/name:os.system", "!!python/object/new:os.mkdir [pwned]"],
)
@pytest.mark.parametrize("key", ["seed", "output_dir", "sft"])
def test_no_code_in_a_file_is_ever_run(key, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^file\.yaml: line 1: "):
        parse_config(f"{key}: {value}", source="file.yaml")
    assert list(tmp_path.iterdir()) == []


def test_narrow_keeps_what_a_stage_has():
    whole = PipelineRun(seed=5, sft=SFTConfig(epochs=9.0), prompt_data=Path("p"))
    assert narrow(whole, SFTRun) == SFTRun(seed=5, sft=SFTConfig(epochs=9.0))
    assert narrow(whole, PPORun) == PPORun(seed=5, prompt_data=Path("p"))


def test_dump_config_is_readable_text():
    text = dump_config(PipelineRun(output_dir=Path("é/x"), ppo=PPOConfig(reward=("a:b",))))
    assert "output_dir: é/x" in text
    assert "clip_eps: 0.2" in text
    assert "!!" not in text
    assert text.index("seed:") < text.index("model:") < text.index("start_at:")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--config", "demo", "pipeline"], "pipeline --config demo"),
        (["--output-dir", "a b", "sft", "--resume"], "sft --output-dir 'a b' --resume"),
        (["--config=nowhere", "ppo"], "ppo --config=nowhere"),
    ],
)
def test_a_stage_that_does_not_come_first_is_told(given, meant):
    from rlhf.cli.train import parse

    with pytest.raises(UserError, match=f"^the stage comes first: rlhf-train {meant}$"):
        parse(given)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    """In YAML, and in flags where no shell replaces it; a name that begins with ~ and is nobody's stays."""
    from rlhf.cli.monitor import parse as parse_monitor
    from rlhf.cli.train import parse

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("output_dir: ~/run\ntokenizer: {path: ~/words}\ncache_dir: ~nobody-here/x\n")
    config = parse(["sft", "--config=~/mine.yaml", "--sft-data=~/a.json"])
    assert (config.output_dir, config.sft_data) == (tmp_path / "run", tmp_path / "a.json")
    assert (config.tokenizer.path, config.cache_dir) == (tmp_path / "words", Path("~nobody-here/x"))
    assert parse_monitor(["--log-dir", "~/a", "b~"]).log_dir == (tmp_path / "a", Path("b~"))


def test_dist_config_is_read_after_config_and_before_flags(tmp_path):
    from rlhf.cli.train import parse

    path = tmp_path / "cluster.yaml"
    path.write_text("dist: {num_workers: 3, timeout_s: 5}\n")
    config = parse(["sft", "--config", "demo", "--dist-config", str(path), "--dist.timeout-s", "7"])
    assert (config.dist.num_workers, config.dist.timeout_s) == (3, 7.0)
    assert config.sft == load_config("demo").sft
    assert parse(["ppo", f"--dist_config={path}"]).dist.num_workers == 3
    assert load_dist_config("distributed").num_workers == 2


def test_dist_config_refuses_other_settings(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("seed: 3\ndist: {num_workers: 3}\n")
    with pytest.raises(UserError, match=r"--dist-config .*: has settings outside of dist"):
        load_dist_config(str(path))
    with pytest.raises(UserError, match=r"--dist-config nowhere.yaml: no such file"):
        load_dist_config("nowhere.yaml")
