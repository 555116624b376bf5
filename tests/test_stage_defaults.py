"""Defaults that follow from the model and the data, and a pipeline that does not build on sand."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import PipelineRun, PPOConfig, RewardConfig, SFTConfig
from rlhf.errors import UserError
from rlhf.io.model_folder import weights_digest
from rlhf.io.presets import load_config
from rlhf.kl import budget_kl_coef
from rlhf.train import loop, run
from rlhf.train.stage_defaults import (
    StartFacts,
    default_eos_penalty,
    default_rate,
    fit_completion,
    fit_context,
    fit_length,
    start_facts,
)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.sampled_from([1, 8, 32]))
def test_the_fitted_length_keeps_its_share_and_no_more_than_a_step_above(lengths, step):
    array = np.array(lengths)
    fitted = fit_length(array, step=step, least=1, most=10**6)
    assert (array <= fitted).mean() >= 0.95
    assert (array <= fitted - step).mean() < 0.95 or fitted == step
    assert fit_length(array, step=step, least=1, most=7) <= 7


def test_a_context_grows_with_the_records_and_never_shrinks():
    assert fit_context(np.full(100, 20), preset=128) == 128
    assert fit_context(np.full(100, 200), preset=128) == 224
    assert fit_context(np.full(100, 5000), preset=128) == 512
    assert fit_context(np.full(100, 5000), preset=1024) == 1024
    mostly_short = np.array([20] * 96 + [4000] * 4)
    assert fit_context(mostly_short, preset=64) == 64, "four records in a hundred do not decide"


def test_a_completion_fits_the_demonstrations_and_leaves_half_the_context_to_the_prompt():
    assert fit_completion(None, 128) == 32
    assert fit_completion(41, 128) == 48
    assert fit_completion(500, 128) == 64
    assert fit_completion(None, 8) == 4


@pytest.mark.parametrize(
    ("changes", "facts", "length", "penalty"),
    [
        ({}, StartFacts(False, 20, 1.0), 32, 1.0),
        ({}, StartFacts(False, 20, 0.2), 32, 0.0),
        ({}, StartFacts(False, 200, 1.0), 32, 0.0),
        ({}, StartFacts(True), 32, 0.0),
        ({"stop_at_eos": False}, StartFacts(False, 20, 1.0), 32, 0.0),
    ],
)
def test_missing_ends_cost_where_the_data_end(changes, facts, length, penalty):
    assert default_eos_penalty(PPOConfig(**changes), facts, length) == penalty


@pytest.mark.parametrize("settings", [SFTConfig(), RewardConfig(), PPOConfig()])
def test_a_pretrained_model_learns_at_a_lower_rate(settings):
    assert default_rate(settings, pretrained=True) <= default_rate(settings, pretrained=False) / 10
    assert settings.peak_learning_rate == default_rate(settings, pretrained=False)
    assert dataclasses.replace(settings, learning_rate=0.5).peak_learning_rate == 0.5


def test_a_folder_of_someone_elses_is_pretrained(tmp_path):
    assert start_facts(tmp_path).pretrained
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "sft", "pretrained": False, "ended": 0.5}))
    assert start_facts(tmp_path) == StartFacts(False, None, 0.5)
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "sft"}))
    assert not start_facts(tmp_path).pretrained, "older versions of rlhf had the rates of random weights"


def test_the_horizon_fits_the_run():
    assert PPOConfig(num_iterations=100).horizon == 5 * 64
    assert PPOConfig(num_iterations=3, kl_adaptive=True).horizon == 64
    assert PPOConfig(kl_horizon=777.0).horizon == 777.0


@given(kl=st.floats(-5, 500), coef=st.floats(0.2, 50), budget=st.floats(0.1, 100))
def test_a_budget_raises_the_coefficient_above_it_and_never_lowers_it_below_the_floor(kl, coef, budget):
    after = budget_kl_coef(coef, kl, budget=budget, floor=0.2)
    assert 0.2 <= after <= 1.5 * coef * (1 + 1e-9)
    if kl > budget:
        assert after >= coef
    if kl < budget:
        assert after <= coef or after == 0.2
    assert budget_kl_coef(0.2, kl, budget=math.inf, floor=0.2) == 0.2


def test_a_budget_steers_a_policy_whose_kl_answers_to_the_coefficient():
    """A policy that moves half of the way to exp(score / coefficient) an iteration, whose KL is 4 / coefficient."""
    coef, kl = 0.1, 0.0
    for _ in range(60):
        kl += 0.5 * (4.0 / coef - kl)
        coef = budget_kl_coef(coef, kl, budget=10.0, floor=0.1)
    assert kl == pytest.approx(10.0, rel=0.15)
    with pytest.raises(ValueError, match="budget"):
        budget_kl_coef(0.1, 1.0, budget=0.0, floor=0.1)


def test_what_is_chosen_by_rule_is_written_into_the_resolved_configuration(short_pipeline, tmp_path):
    ppo = dataclasses.replace(short_pipeline.ppo, max_new_tokens=None, num_iterations=2)
    run(dataclasses.replace(short_pipeline, output_dir=tmp_path, compile="off", ppo=ppo))
    config = load_config(str(tmp_path / "config.yaml"))
    assert (config.sft.learning_rate, config.reward.learning_rate, config.ppo.learning_rate) == (1e-3, 1e-3, 1e-4)
    manifest = json.loads((tmp_path / "sft" / "manifest.json").read_text())
    assert config.ppo.max_new_tokens == fit_completion(manifest["completion_tokens"], 64)
    assert config.ppo.missing_eos_penalty == 1.0
    assert manifest["ended"] == 1.0
    policy = json.loads((tmp_path / "policy" / "manifest.json").read_text())
    assert policy["pretrained"] is False
    assert policy["template"] == manifest["template"] == "say {prompt}"
    resumed = dataclasses.replace(short_pipeline, output_dir=tmp_path, compile="off", ppo=ppo, resume=True)
    run(resumed)
    assert load_config(str(tmp_path / "config.yaml")).ppo.learning_rate == 1e-4


def test_a_strict_pipeline_stops_where_it_would_build_on_sand(short_pipeline: PipelineRun, tmp_path):
    sft = dataclasses.replace(short_pipeline.sft, max_steps=1, learning_rate=0.0)
    config = dataclasses.replace(short_pipeline, output_dir=tmp_path, compile="off", strict=True, sft=sft)
    with pytest.raises(UserError, match=r"--strict: stopped after sft.*token frequencies alone.*--resume"):
        run(config)
    assert (tmp_path / "sft").is_dir()
    assert not (tmp_path / "reward").exists()
    events = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    (verdict,) = [event for event in events if event.get("event") == "verdict"]
    assert verdict["sound"] is False
    run(dataclasses.replace(config, strict=False, resume=True))
    assert (tmp_path / "policy").is_dir()


def test_a_stage_that_has_gone_wrong_is_stopped_and_goes_on_if_the_user_insists(short_pipeline, tmp_path, monkeypatch):
    """When it has gone wrong is tested in test_verdicts.py."""
    asked = []

    def fails_in_ppo(history, *, kl_budget, loss):
        asked.append((loss, kl_budget))
        return "it has gone wrong" if loss is None and len(history) == 2 else ""

    monkeypatch.setattr(loop, "find_failure", fails_in_ppo)
    config = dataclasses.replace(short_pipeline, output_dir=tmp_path, compile="off")
    with pytest.raises(UserError, match=r"ppo: stopped after iteration 2 of 4 and saved, because it has gone wrong"):
        run(config)
    assert set(asked) == {("loss/sft", math.inf), ("loss/reward", math.inf), (None, 10.0)}
    assert run(dataclasses.replace(config, resume=True, stop_early=False)).finished
    run(dataclasses.replace(short_pipeline, output_dir=tmp_path / "whole", compile="off", stop_early=False))
    assert weights_digest(tmp_path / "policy") == weights_digest(tmp_path / "whole" / "policy")
