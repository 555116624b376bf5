"""A finished run goes on to a larger number of steps, to the bits of a run that was as long from the start."""

import dataclasses

import pytest

from rlhf.config import PipelineRun, PPOConfig, PPORun, SFTConfig, SFTRun
from rlhf.errors import UserError
from rlhf.io.model_folder import weights_digest
from rlhf.io.presets import narrow
from rlhf.train import run

CONSTANT = {"schedule": "constant", "warmup_fraction": 0.0}


def brevity(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]


def sft(pipeline: PipelineRun, folder, steps: int, **changes) -> SFTRun:
    settings = dataclasses.replace(pipeline.sft, max_steps=steps, **(CONSTANT | changes))
    return dataclasses.replace(narrow(pipeline, SFTRun), output_dir=folder, compile="off", sft=settings)


def resumed(config):
    return dataclasses.replace(config, resume=True)


def test_a_finished_sft_is_extended_to_the_same_bits(short_pipeline, tmp_path):
    run(sft(short_pipeline, tmp_path / "parts", 2))
    first = weights_digest(tmp_path / "parts" / "sft")
    run(resumed(sft(short_pipeline, tmp_path / "parts", 5)))
    run(sft(short_pipeline, tmp_path / "whole", 5))
    assert weights_digest(tmp_path / "parts" / "sft") == weights_digest(tmp_path / "whole" / "sft") != first


def test_a_finished_ppo_is_extended_to_the_same_bits(short_pipeline, tmp_path):
    run(sft(short_pipeline, tmp_path / "start", 2))

    def ppo(folder, iterations: int) -> PPORun:
        settings = PPOConfig(
            num_iterations=iterations, batch_size=4, minibatch_size=4, num_epochs=1, max_new_tokens=6,
            model_path=tmp_path / "start" / "sft", reward=(f"{__file__}:brevity",), **CONSTANT,
        )  # fmt: skip
        return dataclasses.replace(narrow(short_pipeline, PPORun), output_dir=folder, compile="off", ppo=settings)

    run(ppo(tmp_path / "parts", 2))
    run(resumed(ppo(tmp_path / "parts", 4)))
    run(ppo(tmp_path / "whole", 4))
    assert weights_digest(tmp_path / "parts" / "policy") == weights_digest(tmp_path / "whole" / "policy")


@pytest.mark.parametrize("changes", [{"schedule": "linear"}, {"warmup_fraction": 0.5}])
def test_a_run_whose_rates_follow_from_its_length_is_not_extended(short_pipeline, tmp_path, changes):
    run(sft(short_pipeline, tmp_path, 2, **changes))
    with pytest.raises(UserError, match=r"max_steps was 2, is 5, and the learning rates follow .*schedule constant"):
        run(resumed(sft(short_pipeline, tmp_path, 5, **changes)))


def test_a_run_is_not_shortened(short_pipeline, tmp_path):
    run(sft(short_pipeline, tmp_path, 2))
    with pytest.raises(UserError, match="max_steps was 2, is 1"):
        run(resumed(sft(short_pipeline, tmp_path, 1)))


def test_the_default_schedule_is_not_extended():
    assert SFTConfig().schedule != "constant", "or the README's sentence on extending a run is out of date"
