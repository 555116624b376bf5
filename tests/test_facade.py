"""The library from Python: runs leave the process as it is, callbacks stop them, and what they leave behind is read."""

import contextlib
import dataclasses
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import rlhf
from rlhf.config import (
    PipelineRun,
    PPORun,
    SFTConfig,
    SFTRun,
)
from rlhf.errors import UserError
from rlhf.io.model_folder import load_language_model
from rlhf.io.presets import narrow
from rlhf.tree import named_leaves


def sft_run(short_pipeline: PipelineRun, folder: Path, **changes) -> SFTRun:
    return dataclasses.replace(narrow(short_pipeline, SFTRun), output_dir=folder, **changes)


def stop_after(count: int, seen: list):
    """A callback that stops the run after so many steps."""

    def callback(stage, step, metrics):
        seen.append((stage, step, metrics))
        return len(seen) == count

    return callback


def test_a_callback_gets_every_step_and_its_metrics(short_pipeline, tmp_path):
    seen: list = []
    result = rlhf.train.run(sft_run(short_pipeline, tmp_path / "run"), callback=lambda *step: seen.append(step))
    assert [(stage, step) for stage, step, _ in seen] == [("sft", step) for step in range(1, 6)]
    logged = rlhf.load_run(tmp_path / "run").metrics["sft"]
    assert [metrics["loss/sft"] for *_, metrics in seen] == logged["loss/sft"].values.tolist()
    evaluated = {name: value for name, value in result.metrics.items() if not name.startswith("eval/baseline/")}
    assert (result.model, result.finished) == (tmp_path / "run" / "sft", True)
    assert evaluated == {name: seen[-1][2][name] for name in evaluated}
    assert "held-out demonstrations" in result.verdict.text


@pytest.mark.parametrize("stops_by", ["result", "exception"])
def test_a_stopped_run_resumes_to_the_bits_of_the_run_that_never_stopped(short_pipeline, tmp_path, stops_by):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    rlhf.train.run(sft_run(short_pipeline, whole))
    seen: list = []
    if stops_by == "result":
        result = rlhf.train.run(sft_run(short_pipeline, stopped), callback=stop_after(3, seen))
        assert (result.finished, result.model) == (False, stopped / "sft")
        assert result.metrics == seen[-1][2]
    else:
        error = ValueError("enough")

        def callback(stage, step, metrics):
            if stop_after(3, seen)(stage, step, metrics):
                raise error

        with pytest.raises(ValueError, match="enough") as caught:
            rlhf.train.run(sft_run(short_pipeline, stopped), callback=callback)
        assert caught.value is error
    assert len(seen) == 3
    assert [path.name for path in (stopped / "checkpoints" / "sft").iterdir()] == ["step-000003"]
    assert [event["event"] for event in rlhf.load_run(stopped).events] == ["start", "interrupted"]
    assert not (stopped / "sft").exists()
    assert rlhf.train.run(sft_run(short_pipeline, stopped, resume=True)).finished
    assert (whole / "sft/model.safetensors").read_bytes() == (stopped / "sft/model.safetensors").read_bytes()
    first, second = (rlhf.load_run(folder).metrics["sft"] for folder in (whole, stopped))
    assert first.keys() == second.keys()
    for name in first:
        if not name.startswith(("time", "timing_s/", "perf/")):
            assert np.array_equal(first[name].values, second[name].values), name


def test_a_callback_stops_the_whole_pipeline(short_pipeline, tmp_path):
    seen: list = []
    config = dataclasses.replace(short_pipeline, output_dir=tmp_path / "run")
    result = rlhf.train.run(config, callback=stop_after(7, seen))
    assert [(stage, step) for stage, step, _ in seen[-2:]] == [("reward", 1), ("reward", 2)]
    assert (result.finished, result.model) == (False, tmp_path / "run" / "reward")
    assert (tmp_path / "run" / "sft").is_dir()
    assert not (tmp_path / "run" / "policy").exists()
    result = rlhf.train.run(dataclasses.replace(config, resume=True))
    assert result.finished
    assert result.model == tmp_path / "run" / "policy"


def test_a_callback_that_stops_the_last_step_leaves_a_finished_stage_and_starts_no_other(short_pipeline, tmp_path):
    config = dataclasses.replace(short_pipeline, output_dir=tmp_path / "run")
    result = rlhf.train.run(config, callback=lambda stage, step, metrics: step == 5)
    assert result.finished
    assert (tmp_path / "run" / "sft").is_dir()
    assert not (tmp_path / "run" / "checkpoints" / "reward").exists()


def test_a_run_leaves_signal_handlers_streams_allocator_and_threads_as_they_are(
    short_pipeline, tmp_path, monkeypatch, capfd
):
    def glibc(name):
        assert name != "mallopt", "the allocator's policy is changed"

    monkeypatch.setattr("rlhf.execution.memory._glibc", glibc)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handler(number, frame):
        raise AssertionError("no signal is sent")

    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, handler))
        threads = torch.get_num_threads()
        seen = []
        rlhf.train.run(
            sft_run(short_pipeline, tmp_path / "run"),
            callback=lambda *step: seen.append(list(map(signal.getsignal, numbers))),
        )
        assert seen == [[handler] * 3] * 5
        assert [signal.getsignal(number) for number in numbers] == [handler] * 3
        assert torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "run" / "report").exists()


def test_a_run_in_a_thread_gives_the_same_bits(short_pipeline, tmp_path):
    rlhf.train.run(sft_run(short_pipeline, tmp_path / "main"))
    thread = threading.Thread(target=rlhf.train.run, args=[sft_run(short_pipeline, tmp_path / "thread")])
    thread.start()
    thread.join()
    one, other = ((tmp_path / name / "sft/model.safetensors").read_bytes() for name in ("main", "thread"))
    assert one == other


def test_messages_are_those_of_a_logger(short_pipeline, tmp_path, caplog):
    caplog.set_level("INFO", "rlhf")
    rlhf.train.run(sft_run(short_pipeline, tmp_path / "run"))
    lines = [(record.name, record.stage, record.message) for record in caplog.records]
    assert ("rlhf", "sft", "22 demonstrations, 2 held out") in lines


def test_paths_may_be_texts(short_pipeline, tmp_path):
    folder = str(tmp_path / "run")
    result = rlhf.train.run(sft_run(short_pipeline, folder, sft_data=str(short_pipeline.sft_data)))
    model = rlhf.load_model(f"{folder}/sft")
    assert result.model == Path(folder) / "sft"
    assert model.config.n_embd == 16
    assert model.tokenizer.vocab_size == model.config.vocab_size
    leaves, expected = named_leaves(model.params), named_leaves(load_language_model(result.model).params)
    assert all(torch.equal(leaf, expected[name]) for name, leaf in leaves.items())
    assert SFTConfig(model_path="~/x").model_path == Path.home() / "x"


def test_a_stage_of_no_configuration_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"RunConfig is not the configuration of a stage; expected SFTRun, RewardRun"):
        rlhf.train.run(rlhf.config.RunConfig(output_dir=tmp_path))


def test_models_and_logs_of_a_whole_run_are_read(short_pipeline, tmp_path):
    config = dataclasses.replace(short_pipeline, output_dir=tmp_path / "run")
    rlhf.train.run(config)
    reward = rlhf.load_model(str(config.output_dir / "reward"))
    assert reward.params["head"]["weight"].shape == (1, 16)
    assert reward.statistics.completions > 0
    data = rlhf.load_run(str(config.output_dir))
    assert list(data.metrics) == ["sft", "reward", "ppo"]
    kl = data.metrics["ppo"]["objective/kl"]
    assert kl.steps.tolist() == [1, 2, 3, 4]
    assert kl.values.dtype == np.float64
    assert kl.values[0] == pytest.approx(0.0, abs=1e-4)
    events = [event["event"] for event in data.events]
    assert events == ["start", "end", "verdict"] * 2 + ["start", "end"], "four iterations are too few for a verdict"
    assert len(data.samples) == 4 * 4
    assert {"prompt", "completion", "score"} <= data.samples[0].keys()
    with pytest.raises(UserError, match="not a run's folder"):
        rlhf.load_run(tmp_path)


def test_a_bare_stage_takes_settings_of_earlier_ones_from_its_base(short_pipeline, tmp_path, monkeypatch):
    """On the embedded example, here on our own records."""
    monkeypatch.setattr("rlhf.train.stage_inputs.write_embedded", lambda folder: _files(short_pipeline))
    config = dataclasses.replace(
        narrow(short_pipeline, PPORun), output_dir=tmp_path / "run", prompt_data=None, resume=False
    )
    base = dataclasses.replace(short_pipeline, sft_data=None, preference_data=None)
    seen: list = []
    result = rlhf.train.run(config, base=base, callback=stop_after(10**6, seen))
    assert result.model == tmp_path / "run" / "policy"
    assert [stage for stage, *_ in seen] == ["sft"] * 5 + ["reward"] * 4 + ["ppo"] * 4


def _files(short_pipeline: PipelineRun):
    from rlhf.data.demo_data import EmbeddedFiles

    names = dict.fromkeys(EmbeddedFiles._fields, short_pipeline.prompt_data)
    return EmbeddedFiles(
        **names | {"demonstrations": short_pipeline.sft_data, "preferences": short_pipeline.preference_data}
    )
