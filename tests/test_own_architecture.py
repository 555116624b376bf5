"""A throw-away architecture of one file through everything: training, Ray, resume, evaluation, the log."""

import dataclasses
import os
from collections.abc import Iterator

import own_architecture
import pytest
import torch
from own_architecture import BagShape

import rlhf
from rlhf import random
from rlhf.config import (
    DistConfig,
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TokenizerConfig,
)
from rlhf.data.demo_data import write_embedded
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.models import architecture
from rlhf.models.decoding import generate_completions
from rlhf.models.forward import forward
from rlhf.ops import token_log_probs

SHAPE = BagShape(vocab_size=40)
STAGES = {"sft": "sft", "reward": "reward", "ppo": "policy"}


architecture._REGISTERED.pop("gated_bag")  # other tests say which architectures there are


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    architecture.register(own_architecture.ARCHITECTURE)
    yield
    architecture._REGISTERED.pop("gated_bag")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineRun:
    folder = tmp_path_factory.mktemp("bag")
    files = write_embedded(folder / "data", size=60)
    return PipelineRun(
        output_dir=folder / "whole",
        cache_dir=folder / "cache",
        threads=1,
        sft_data=files.demonstrations,
        preference_data=files.preferences,
        prompt_data=files.prompts,
        model=ModelConfig(family="gated_bag", preset="tiny"),
        tokenizer=TokenizerConfig(vocab_size=300),
        sft=SFTConfig(max_steps=6, batch_size=8, eval_every=3, dropout=0.1),
        reward=RewardConfig(max_steps=4, batch_size=8),
        ppo=PPOConfig(
            num_iterations=3, batch_size=8, minibatch_size=4, num_epochs=2, max_new_tokens=6, critic="separate",
            micro_batch_size=2, learning_rate=1e-3,
        ),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config) -> PipelineRun:
    rlhf.train.run(config)
    return config


def weights(config) -> dict[str, bytes]:
    return {stage: (config.output_dir / folder / "model.safetensors").read_bytes() for stage, folder in STAGES.items()}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_no_logit(padding):
    params = own_architecture.init(SHAPE, key=random.key(1))
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    mask = mask if padding == "right" else mask.flip(1)
    logits = forward(params, tokens, config=SHAPE, attention_mask=mask)
    for row in range(2):
        alone = forward(params, tokens[row, mask[row]][None], config=SHAPE)[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, atol=1e-5, rtol=1e-5)


def test_cached_decoding_gives_the_log_probs_of_the_full_forward():
    params = own_architecture.init(SHAPE, key=random.key(1))
    tokens, lengths = torch.arange(18).view(3, 6), torch.tensor([6, 1, 4])
    keys = random.split(random.key(2), 3)
    out = generate_completions(
        params, tokens, lengths, keys, config=SHAPE, max_new_tokens=9, stop_tokens=[3], max_concurrent=2
    )
    for row, length in enumerate(lengths):
        count = int(out.mask[row].sum())
        sequence = torch.cat([tokens[row, :length], out.tokens[row, :count]])
        logits = forward(params, sequence[None], config=SHAPE)[0, length - 1 : -1]
        expected = token_log_probs(logits, out.tokens[row, :count])
        torch.testing.assert_close(out.log_probs[row, :count], expected, atol=1e-5, rtol=1e-5)


def test_it_is_trained_logged_and_loaded(whole):
    model = rlhf.load_model(whole.output_dir / "policy")
    assert (type(model.config), model.config.model_type) == (BagShape, "gated_bag")
    run = rlhf.load_run(whole.output_dir)
    assert list(run.metrics) == list(STAGES)
    assert run.metrics["ppo"]["val/ratio_first"].values == pytest.approx([1.0] * 3, abs=1e-5)
    assert all(torch.isfinite(torch.as_tensor(series.values)).all() for series in run.metrics["sft"].values())


def test_two_workers_give_the_same_bits(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(own_architecture.__file__))
    parallel = dataclasses.replace(whole, output_dir=tmp_path / "run", dist=DistConfig(num_workers=2))
    rlhf.train.run(parallel)
    assert weights(parallel) == weights(whole)


def test_resuming_gives_the_bits_of_the_run_that_never_stopped(whole, tmp_path):
    stopped = dataclasses.replace(whole, output_dir=tmp_path / "run")
    rlhf.train.run(stopped, callback=lambda stage, step, metrics: (stage, step) == ("ppo", 1))
    assert not (stopped.output_dir / "policy").exists()
    rlhf.train.run(dataclasses.replace(stopped, resume=True))
    assert weights(stopped) == weights(whole)


def test_it_is_evaluated(whole, tmp_path):
    report = run_evaluation(EvaluateConfig(model_dir=whole.output_dir, output=tmp_path / "report", threads=1))
    assert [evaluation.kind for evaluation in report.evaluations] == ["sft", "reward", "policy", "policy"]
