"""The table of stages: what its records say is true, and a stage of one file goes through the whole system."""

import dataclasses
import json
import os
import re
from typing import get_args, get_type_hints

import pytest
import torch
import toy_stage
from rlhf.cli.train import main, parse
from safetensors.torch import load_file

import rlhf
from rlhf.config import DistConfig, LogConfig, PipelineRun
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS
from rlhf.errors import UserError
from rlhf.io.presets import load_config, narrow
from rlhf.monitor.log import read_logs
from rlhf.monitor.report import write_report
from rlhf.ranges import flat_fields
from rlhf.stages import STAGES, StageProgram, load_program, pipeline_names, pipeline_type, register, stages_of
from rlhf.train.observers import Observer

TEXT = b"the quick brown fox jumps over the lazy dog " * 8


@pytest.fixture
def toy(monkeypatch):
    """The toy stage in the table."""
    before = dict(STAGES)
    register(toy_stage.STAGE)
    yield toy_stage.STAGE
    STAGES.clear()
    STAGES.update(before)


@pytest.fixture
def config(tmp_path) -> toy_stage.BytesRun:
    (tmp_path / "text.txt").write_bytes(TEXT)
    return toy_stage.BytesRun(
        output_dir=tmp_path / "run",
        cache_dir=tmp_path,
        threads=1,
        text=tmp_path / "text.txt",
        bytes=toy_stage.BytesConfig(learning_rate=0.1),
        log=LogConfig(tensorboard=False),
    )


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_what_a_record_says_exists(stage):
    settings = flat_fields(stage.config())
    named = {stage.data, *stage.files, *stage.sources.values()}
    assert named <= settings.keys()
    kinds = {"data", "validation", "tokenizer", "template", "model", "sources", "estimator", "loss"}
    assert set(stage.files.values()) <= kinds
    assert stage.schema in {schema.name for schema in (DEMONSTRATIONS, PREFERENCES, PROMPTS)}
    assert isinstance(load_program(stage), StageProgram)
    assert all(any(name.startswith(prefix) for name in settings) for prefix in stage.own_settings)
    earlier = list(STAGES)[: list(STAGES).index(stage.name)]
    assert set(stage.sources) <= set(earlier)
    assert stages_of(stage.config()) == [stage]


def test_the_pipeline_has_the_stages_of_the_table():
    assert get_args(get_type_hints(PipelineRun)["start_at"]) == pipeline_names() == ("sft", "reward", "ppo")
    assert pipeline_type() is PipelineRun
    assert [stage.name for stage in stages_of(PipelineRun(start_at="reward"))] == ["reward", "ppo"]


def test_a_name_or_folder_is_taken_once(toy):
    for changes in ({}, {"name": "other"}, {"folder": "other"}):
        with pytest.raises(ValueError, match="is taken by another stage"):
            register(dataclasses.replace(toy, **changes))
    with pytest.raises(ValueError, match="BytesRun has no section 'other'"):
        register(dataclasses.replace(toy, name="other", folder="other"))


def test_a_stage_of_ones_own_runs_from_the_command_line(toy, config, capfd):
    argv = ["bytes", "--output-dir", config.output_dir, "--text", config.text, "--cache-dir", config.cache_dir]
    argv = [*map(str, argv), "--threads", "1", "--log.no-tensorboard", "--bytes.steps", "1", "--bytes.schedule"]
    assert main([*argv, "linear"]) == 0
    err = " ".join(capfd.readouterr().err.split())
    for text in ("bytes: --bytes.schedule linear: has no effect on one step", "bytes pass 1/1 loss/bytes 5.545"):
        assert text in err
    assert f"bytes: wrote {config.output_dir}/frequencies" in err
    assert (config.output_dir / "report" / "report.html").is_file()
    written = load_config(str(config.output_dir / "config.yaml"))
    assert narrow(written, toy_stage.BytesRun).bytes == toy_stage.BytesConfig(steps=1, schedule="linear")
    assert main([*argv, "linear"]) == 2
    assert "holds checkpoints of another bytes run (step 1)" in capfd.readouterr().err
    assert main([*argv, "linear", "--seed", "1", "--resume"]) == 2
    assert "seed was 0, is 1" in capfd.readouterr().err


def test_a_stage_of_ones_own_is_in_the_help(toy, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "Frequencies of bytes in a text." in out
    assert "SFT, reward model, PPO and frequencies in order." in " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    assert isinstance(parse(["pipeline", "--bytes.steps", "3", "--start-at", "bytes"]), PipelineRun)


def test_a_stage_of_ones_own_resumes_to_the_same_bits(toy, config, tmp_path):
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    result = rlhf.train.run(whole)
    assert result.metrics == {"read": 6 * 32}
    assert not rlhf.train.run(config, callback=lambda stage, step, metrics: step == 3).finished
    with pytest.raises(UserError, match=r"bytes\.batch_size was 32, is 16"):
        rlhf.train.run(dataclasses.replace(config, resume=True, bytes=toy_stage.BytesConfig(batch_size=16)))
    assert rlhf.train.run(dataclasses.replace(config, resume=True)).metrics == {"read": 6 * 32}
    one, other = ((run.output_dir / "frequencies/model.safetensors").read_bytes() for run in (whole, config))
    assert one == other
    frequencies = load_file(result.model / "model.safetensors")["logits"]
    assert frequencies[ord("o")] > frequencies[ord("q")] > frequencies[ord("Q")]


def test_a_stage_of_ones_own_is_monitored(toy, config):
    rlhf.train.run(config)
    (reader,) = read_logs([config.output_dir])
    assert reader.progress("bytes")[:4] == (6, 6, "pass", "ended")
    losses = reader.series("bytes", "loss/bytes").values
    assert losses[-1] < losses[0]
    write_report([config.output_dir], config.output_dir / "report" / "report.html")
    assert '"loss/bytes"' in (config.output_dir / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_stage_of_ones_own_has_the_same_bits_on_workers(toy, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(toy_stage.__file__))
    remote = dataclasses.replace(config, output_dir=tmp_path / "remote", dist=DistConfig(num_workers=2))
    rlhf.train.run(config)
    rlhf.train.run(remote)
    one, other = ((run.output_dir / "frequencies/model.safetensors").read_bytes() for run in (config, remote))
    assert one == other


def test_the_pipeline_runs_it_and_its_check_gets_what_earlier_stages_will_leave(toy, config, short_pipeline, tmp_path):
    received = []

    def check(given, models):
        received.append({name: model.config.n_embd for name, model in models.items()})
        return toy_stage.check_bytes(given, models)

    STAGES["bytes"] = dataclasses.replace(toy, program=StageProgram(check, toy_stage.run_bytes))
    settings = {spec.name: getattr(short_pipeline, spec.name) for spec in dataclasses.fields(short_pipeline)}
    whole = pipeline_type()(**settings | {"output_dir": tmp_path / "run", "text": config.text, "bytes": config.bytes})

    class Order(Observer):
        stages: list[str] = []  # noqa: RUF012 (of the class, which the test reads)

        def on_start(self, start):
            self.stages.append(start.stage.name)

    with pytest.raises(UserError, match="--text None: no such file"):
        rlhf.train.run(dataclasses.replace(whole, text=None), observers=[Order()])
    assert Order.stages == [], "refused before anything was trained"
    result = rlhf.train.run(whole, observers=[Order()])
    assert Order.stages == ["sft", "reward", "ppo", "bytes"]
    assert received[-1] == {"sft": 16, "reward": 16, "ppo": 16}
    assert result.model == tmp_path / "run" / "frequencies"
    states = [event["event"] for event in rlhf.load_run(tmp_path / "run").events]
    assert [state for state in states if state != "verdict"] == ["start", "end"] * 4
    alone = dataclasses.replace(config, output_dir=tmp_path / "alone")
    rlhf.train.run(alone)
    one, other = (
        load_file(folder / "frequencies" / "model.safetensors")["logits"]
        for folder in (tmp_path / "run", tmp_path / "alone")
    )
    assert torch.equal(one, other)
    assert json.loads((result.model / "manifest.json").read_text())["stage"] == "bytes"
