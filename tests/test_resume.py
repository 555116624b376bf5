"""Resuming goes by what files are and what settings say, not by how paths are spelled or which version wrote them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from rlhf.cli.command import base_config

from rlhf.config import (
    DistConfig,
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    PPORun,
    RewardConfig,
    RewardRun,
    SFTConfig,
    SFTRun,
    TokenizerConfig,
)
from rlhf.errors import UserError
from rlhf.io.model_folder import weights_digest
from rlhf.io.paths import absolute_paths, places, relocate
from rlhf.io.presets import load_config
from rlhf.io.reward_identity import code_digest, diff_sources, identify_sources, upgrade_sources
from rlhf.io.tokenizer import Tokenizer
from rlhf.stages import STAGES
from rlhf.train.ppo import run_ppo
from rlhf.train.resume import diff_settings, digests_of, settings_of
from rlhf.train.sft import run_sft

TEXTS = [["red green blue"], ["red green blue yellow"]]
CODE = (
    "from siblings import SIGN\ndef longer(completions, **_):\n    return [SIGN * len(text) for text in completions]\n"
)


def write_model(folder: Path, version: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(f"weights {version}")


def write_tokenizer(folder: Path, version: int) -> None:
    folder.mkdir(exist_ok=True)
    Tokenizer.train(TEXTS[version] * 9, 262).save(folder)


def write_records(path: Path, version: int) -> None:
    path.write_text(json.dumps([{"prompt": "a", "completion": str(version)}]))


def write_function(folder: Path, version: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(CODE)
    (folder / "siblings.py").write_text(f"SIGN = {1 - 2 * version}\n")


def data(path: Path) -> dict:
    return {"data": digests_of(path, TOKENIZER)["data"]}


def validation(path: Path) -> dict:
    return {"validation": digests_of(path, TOKENIZER, path)["validation"]}


def tokenizer(folder: Path) -> dict:
    return {"tokenizer": digests_of(Path(__file__), Tokenizer.load(folder))["tokenizer"]}


def model(folder: Path) -> dict:
    return {"model": weights_digest(folder)}


TOKENIZER = Tokenizer.train(TEXTS[0], 262)
FILES = {
    "sft_data": ("sft", lambda path: SFTRun(sft_data=path), write_records, data),
    "preference_data": ("reward", lambda path: RewardRun(preference_data=path), write_records, data),
    "prompt_data": ("ppo", lambda path: PPORun(prompt_data=path), write_records, data),
    "sft_val_data": ("sft", lambda path: SFTRun(sft_val_data=path), write_records, validation),
    "preference_val_data": ("reward", lambda path: RewardRun(preference_val_data=path), write_records, validation),
    "tokenizer.path": ("sft", lambda path: SFTRun(tokenizer=TokenizerConfig(path=path)), write_tokenizer, tokenizer),
    "sft.model_path": ("sft", lambda path: SFTRun(sft=SFTConfig(model_path=path)), write_model, model),
    "reward.model_path": ("reward", lambda path: RewardRun(reward=RewardConfig(model_path=path)), write_model, model),
    "ppo.model_path": ("ppo", lambda path: PPORun(ppo=PPOConfig(model_path=path)), write_model, model),
    "ppo.reward": (
        "ppo", lambda path: PPORun(ppo=PPOConfig(reward=(f"0.5*{path}",))), write_model,
        lambda path: {"sources": identify_sources([f"0.5*{path}"])},
    ),
}  # fmt: skip


def spell(path: Path, how: str) -> str:
    """Another path to the same content."""
    if how == "link":
        Path("link").symlink_to(path)
        return "link"
    if how == "moved":
        shutil.move(path, "moved")
        return "moved"
    return {"same": f"{path}", "dot": f"./{path}", "slash": f"{path}/", "up": f"../{Path.cwd().name}/{path}"}.get(
        how, str(path.absolute())
    )


@pytest.mark.parametrize("how", ["same", "dot", "slash", "up", "absolute", "link", "moved", "changed"])
@pytest.mark.parametrize("setting", FILES)
def test_the_content_of_a_file_decides_and_not_its_path(setting, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage, make_config, write, identify = FILES[setting]
    path = Path("thing")
    write(path, 0)
    before = json.loads(json.dumps(identify(path) | settings_of(make_config(path), STAGES[stage])))
    if how == "changed":
        write(path, 1)
    elif how == "slash" and path.is_file():
        pytest.skip("a file has no trailing slash")
    again = spell(path, how)
    again = again if setting == "ppo.reward" else Path(again)
    config = make_config(again)
    now = identify(again) | settings_of(config, STAGES[stage])
    changes, notes = diff_settings(config, STAGES[stage], before, now)
    assert not notes
    assert len(changes) == (how == "changed")
    assert how != "changed" or ("changed" in changes[0] and f"{setting} " in changes[0])


OLDER = {
    "sft": {"sft.model_path": "start", "tokenizer.path": None, "sft_val_data": "val.json"},
    "ppo": {"ppo.model_path": "start", "model": "x", "ppo.reward": ["2*rm", "a.py:f"], "reward": ["y"]},
}


@pytest.mark.parametrize(
    ("stage", "changed", "expected"),
    [
        ("sft", {}, None),
        ("sft", {"sft": SFTConfig(model_path=Path("./start/"))}, None),
        ("sft", {"sft": SFTConfig(model_path=Path("other"))}, "sft.model_path was start, is other"),
        ("sft", {"sft_val_data": None}, "sft_val_data was val.json, is None"),
        ("sft", {"tokenizer": TokenizerConfig(path=Path("t"))}, "tokenizer.path was None, is t"),
        ("sft", {"dist": DistConfig(reduce="ring")}, None),  # of which they say nothing
        ("ppo", {}, None),
        ("ppo", {"ppo": PPOConfig(reward=("2*./rm/", "a.py:f"))}, None),
        ("ppo", {"ppo": PPOConfig(reward=("1*rm", "a.py:f"))}, "ppo.reward was 2*rm a.py:f, is 1*rm a.py:f"),
        ("ppo", {"ppo": PPOConfig(reward=("2*rm", "a.py:g"))}, "ppo.reward was 2*rm a.py:f, is 2*rm a.py:g"),
    ],
)
def test_checkpoints_with_paths_instead_of_digests_resume_from_the_same_places(
    stage, changed, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("rm").mkdir()
    Path("rm/model.safetensors").write_text("w")
    Path("a.py").write_text("")
    starts = {"sft": SFTConfig(model_path=Path("start")), "ppo": PPOConfig(reward=("2*rm", "a.py:f"))}
    config = PipelineRun(sft_val_data=Path("val.json"), **{stage: starts[stage]})
    older = settings_of(config, STAGES[stage]) | OLDER[stage] | {"data": "d"}
    older.pop("dist.reduce")
    older["reward"] = [weights_digest(Path("rm"))]
    if stage == "sft":
        older.pop("reward")
    config = dataclasses.replace(config, **changed)
    contents = {"data": "d", "model": "x", "tokenizer": "t", "validation": "v"}
    if stage == "ppo":
        contents |= {"validation": None, "sources": identify_sources(config.ppo.reward)}
    changes, notes = diff_settings(config, STAGES[stage], older, contents | settings_of(config, STAGES[stage]))
    assert (changes, notes) == ([expected] if expected else [], [])


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_setting_that_a_newer_version_added_had_its_default(stage):
    config = PipelineRun()
    now = settings_of(config, STAGES[stage])
    assert len(now) > 20
    for name in now:
        before = {key: value for key, value in now.items() if key != name}
        if name == "ppo.kl_budget":  # without which older versions went on
            assert diff_settings(config, STAGES[stage], before, now).changes == ["ppo.kl_budget was inf, is 10.0"]
            continue
        assert diff_settings(config, STAGES[stage], before, now).changes == []
        if name != "dist.reduce":
            other = diff_settings(config, STAGES[stage], before, now | {name: "other"}).changes
            assert other == [f"{name} was {now[name]}, is other"]
    (change,) = diff_settings(config, STAGES[stage], now | {"ppo.fancy": 3}, now).changes
    assert change == "ppo.fancy was 3, and this version of rlhf has no such setting"


def test_how_gradients_are_summed_may_not_change_but_all_else_of_dist_may():
    free = DistConfig(num_workers=3, num_servers=1, backend="gloo", timeout_s=7.0, on_failure="shrink")
    stage = STAGES["sft"]
    before, config = settings_of(SFTRun(), stage), SFTRun(dist=free)
    assert diff_settings(config, stage, before, settings_of(config, stage)) == ([], [])
    config = SFTRun(dist=DistConfig(reduce="ring"))
    assert diff_settings(config, stage, before, settings_of(config, stage)).changes == ["dist.reduce was tree, is ring"]


@pytest.mark.parametrize("how", ["dot", "moved", "changed", "sibling"])
@pytest.mark.parametrize("weight", [1, 0])
def test_the_code_of_a_function_is_told_where_it_has_changed(how, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("code")
    write_function(folder, 0)
    before = identify_sources([f"{weight}*{folder}/rewards.py:longer"])
    if how == "changed":
        (folder / "rewards.py").write_text(CODE.replace("len(text)", "-len(text)"))
    elif how == "sibling":
        write_function(folder, 1)
    now = identify_sources([f"{weight}*{spell(folder, how)}/rewards.py:longer"])
    changes, notes = diff_sources(before, now)
    assert changes == []
    assert len(notes) == (how in ("changed", "sibling"))
    if notes:
        assert ("the code of the function has changed" if weight else "the gold sources have changed") in notes[0]


def test_gold_sources_come_and_go_with_a_note(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_function(Path("code"), 0)
    first, second = identify_sources(["code/rewards.py:longer", "0*code/rewards.py:shorter"])
    for before, now in (([first], [first, second]), ([first, second], [first])):
        changes, (note,) = diff_sources(before, now)
        assert changes == []
        assert "gold sources have changed" in note
    assert diff_sources([first], [first | {"weight": 2.0}])[0]


def test_the_code_of_a_module_by_name_and_of_a_built_in(tmp_path, monkeypatch):
    write_function(tmp_path, 0)
    (tmp_path / "scores_of_test_resume.py").write_text("import rewards\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = code_digest("scores_of_test_resume:f")
    write_function(tmp_path, 1)
    assert first not in ("", code_digest("scores_of_test_resume:f"))
    assert code_digest("sys:exit") == ""


def test_sources_of_an_older_checkpoint_without_names_are_the_runs_reward_model():
    (source,) = upgrade_sources([], ["x"], [])
    assert (source["weight"], source["model"], source["function"]) == (1.0, "x", None)


def test_the_paths_of_a_configuration_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    config = PipelineRun(
        output_dir=Path("out"), sft_data=Path("d/x.json"), log=LogConfig(sink="s.py:f"),
        tokenizer=TokenizerConfig(path=Path("t")),
        ppo=PPOConfig(model_path=Path("m"), reward=("rm", "0.5*r.py:f", "0*package.module:f", "-1e-3*a:b")),
    )  # fmt: skip
    absolute = absolute_paths(config)
    assert absolute == absolute_paths(absolute)
    assert (absolute.output_dir, absolute.sft_data) == (tmp_path / "out", tmp_path / "d/x.json")
    assert (absolute.tokenizer.path, absolute.ppo.model_path) == (tmp_path / "t", tmp_path / "m")
    assert absolute.log.sink == f"{tmp_path}/s.py:f"
    assert absolute.ppo.reward == (
        f"{tmp_path}/rm", f"0.5*{tmp_path}/r.py:f", "0*package.module:f", f"-1e-3*{tmp_path}/a:b"
    )  # fmt: skip
    assert absolute.preference_data is None


def test_where_a_file_of_a_run_that_has_moved_may_be(tmp_path):
    old = Path("/old/project")
    assert places(old / "d.json", old / "out", tmp_path / "out") == [old / "d.json", tmp_path / "d.json"]
    assert places(Path("d.json"), Path("out"), tmp_path / "out") == [tmp_path / "d.json", Path("d.json")]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with data, a start model, a reward function and finished runs of SFT (out/) and PPO (out/)."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "sft.json").write_text(json.dumps([{"prompt": f"p{n}", "completion": f" c{n}"} for n in range(12)]))
    (folder / "val.json").write_text(json.dumps([{"prompt": f"v{n}", "completion": f" w{n}"} for n in range(3)]))
    (folder / "prompts.json").write_text(json.dumps([{"prompt": f"p{n}"} for n in range(6)]))
    write_function(folder, 0)
    (folder / "rewards.py").write_text(CODE.replace("from siblings import SIGN", "SIGN = 1"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_sft(dataclasses.replace(config(), output_dir=Path("first"), sft_val_data=None, sft=SFTConfig(max_steps=1)))
        shutil.copytree("first/sft", "start")
        run_sft(config())
        run_ppo(config())
    finally:
        os.chdir(before)
    return folder


def config(**changes) -> PipelineRun:
    values = {
        "output_dir": Path("out"), "threads": 1, "cache_dir": Path("cache"), "log": LogConfig(tensorboard=False),
        "model": ModelConfig(preset="tiny", n_layer=1, n_embd=16, n_head=2, n_positions=32),
        "tokenizer": TokenizerConfig(vocab_size=1024), "sft_data": Path("sft.json"), "sft_val_data": Path("val.json"),
        "prompt_data": Path("prompts.json"), "sft": SFTConfig(model_path=Path("start"), max_steps=2, batch_size=4),
        "ppo": PPOConfig(
            model_path=Path("start"), reward=("rewards.py:longer",), num_iterations=1, batch_size=4, minibatch_size=4,
            max_new_tokens=4, num_epochs=2,
        ),
    }  # fmt: skip
    return PipelineRun(**values | changes)


@pytest.fixture
def copied(project, tmp_path, monkeypatch) -> Path:
    """A copy of the project, which is the working directory."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_a_run_resumes_after_everything_was_moved(copied):
    Path("start").rename("begun")
    Path("val.json").rename("v.json")
    Path("rewards.py").rename("scores.py")
    Path("out").rename("kept")
    settings = config(output_dir=Path("kept"), resume=True, sft_val_data=Path("./v.json"))
    moved = Path("./begun/")
    weights = Path("kept/sft/model.safetensors").read_bytes()
    run_sft(dataclasses.replace(settings, sft=dataclasses.replace(settings.sft, model_path=moved)))
    assert Path("kept/sft/model.safetensors").read_bytes() == weights
    ppo = dataclasses.replace(settings.ppo, model_path=moved.absolute(), reward=("./scores.py:longer",))
    run_ppo(dataclasses.replace(settings, ppo=ppo))


def test_a_run_resumes_by_its_config_from_another_working_directory(copied, monkeypatch, tmp_path):
    Path("out").rename("elsewhere")
    monkeypatch.chdir(tmp_path)
    settings = load_config("project/elsewhere/config.yaml")
    run_ppo(dataclasses.replace(settings, output_dir=Path("project/elsewhere"), resume=True))
    assert load_config("project/elsewhere/config.yaml").output_dir == copied / "elsewhere"


def test_the_paths_of_a_run_move_with_it(copied, monkeypatch, tmp_path):
    """The original is still where config.yaml says, and is then taken; where it is gone, what lies beside the run."""
    settings = load_config("out/config.yaml")
    assert relocate(settings, Path("out")) == settings
    recorded = absolute_paths(config(output_dir=Path("/gone/out"), log=LogConfig(sink="/gone/rewards.py:f")))
    moved = {
        "sft_data": Path("/gone/sft.json"), "prompt_data": Path("/gone/absent.json"),
        "ppo": PPOConfig(reward=("0.5*/gone/out/sft", "/gone/rewards.py:longer", "module:f")),
    }  # fmt: skip
    found = relocate(dataclasses.replace(recorded, **moved), Path("out"))
    assert (found.output_dir, found.sft_data) == (copied / "out", copied / "sft.json")
    assert found.prompt_data == Path("/gone/absent.json")
    assert found.ppo.reward == (f"0.5*{copied}/out/sft", f"{copied}/rewards.py:longer", "module:f")
    assert found.log.sink == f"{copied}/rewards.py:f"
    monkeypatch.chdir(tmp_path)
    assert base_config(["--config", "project/out/config.yaml"]).output_dir == settings.output_dir


@pytest.mark.parametrize("folder", [".", "start"])
def test_only_the_folder_of_a_run_is_where_its_paths_moved_to(copied, folder):
    """A configuration elsewhere, such as one for a run that is yet to begin, is taken as it is written."""
    settings = config(output_dir=Path("/gone/out"), sft_data=Path("/gone/sft.json"))
    assert relocate(settings, Path(folder)) == settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("start", "sft.model_path start: the weights that the stage starts from have changed"),
        ("val.json", "sft_val_data val.json: the validation file has changed"),
        ("sft.json", "sft_data sft.json: the data have changed"),
    ],
)
def test_changed_content_is_refused_by_name(copied, name, expected):
    if name == "start":
        shutil.rmtree("start")
        shutil.copytree("out/sft", "start")
    else:
        Path(name).write_text(json.dumps(json.loads(Path(name).read_text())[::-1]))
    with pytest.raises(UserError, match=f"cannot be continued, because the run has changed: {expected}"):
        run_sft(config(resume=True))


def test_a_changed_reward_function_is_told(copied, caplog):
    caplog.set_level("INFO", "rlhf")
    Path("rewards.py").write_text(Path("rewards.py").read_text() + "# mended\n")
    run_ppo(config(resume=True))
    assert "WARNING: --ppo.reward rewards.py:longer: the code of the function has changed" in caplog.text


def test_resuming_a_ring_with_another_number_of_workers_is_told(copied, caplog):
    caplog.set_level("INFO", "rlhf")
    settings = config(dist=DistConfig(reduce="ring"), output_dir=Path("ring"))
    run_sft(settings)
    manifest = next(Path("ring/checkpoints/sft").iterdir()) / "manifest.json"
    text = json.loads(manifest.read_text())
    text["facts"]["workers"] = 2
    manifest.write_text(json.dumps(text))
    run_sft(dataclasses.replace(settings, resume=True))
    assert "made with 2 workers and continues with 0" in caplog.text
