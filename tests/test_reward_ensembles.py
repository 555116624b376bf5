"""Reward models as an ensemble in PPO: what the policy is trained on, and what is refused."""

import dataclasses
import shutil

import pytest
import scipy.stats
import test_stages
import torch
from laws import assert_close, assert_same_bits, floats
from test_stages import copy_run, interrupt_after, metrics_of, weights_of

from rlhf.config import PipelineRun, PPOConfig, RewardConfig, RewardRun
from rlhf.errors import Interrupted, UserError
from rlhf.io.model_folder import RewardModel, RewardStatistics, load_reward_model, save_reward_model
from rlhf.io.output_folder import read_provenance
from rlhf.io.reward_sources import RewardSource, expand_sources
from rlhf.stages import STAGES, check_settings
from rlhf.train.ppo import run_ppo
from rlhf.train.ppo_rewards import score_sources
from rlhf.train.reward import run_reward
from rlhf.train.signals import stop_on_signal
from rlhf.tree import tree_map

base = test_stages.base  # the fixture

MODELS = [RewardModel({}, None, None, RewardStatistics(mean, std, 9)) for mean, std in ((1.0, 2.0), (-3.0, 0.5))]
SCORES = floats(1, 5, 2, dtype=torch.float32)
NORMAL = torch.stack([(SCORES[:, n] - m.statistics.mean) / m.statistics.std for n, m in enumerate(MODELS)], dim=1)


def sources(weights=(1.0, 1.0), function=0.0):
    found = [
        RewardSource(str(n), weight, model, None) for n, (weight, model) in enumerate(zip(weights, MODELS, strict=True))
    ]
    lengths = RewardSource(
        "length", function, None, lambda completions, **columns: [float(len(c)) for c in completions]
    )
    return [*found, lengths] if function else found


def total(given, **settings):
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    raw, reward, metrics = score_sources(
        PPOConfig(**settings), given, SCORES, texts, texts, [{"prompt": text} for text in texts]
    )
    assert not metrics
    return raw, reward


@pytest.mark.parametrize("how", ["mean", "min", "uncertainty"])
def test_members_are_normalised_by_their_own_statistics_and_then_combined(how):
    expected = {
        "mean": NORMAL.mean(1),
        "min": NORMAL.amin(1),
        "uncertainty": NORMAL.mean(1) - 0.7 * NORMAL.var(1, correction=0),
    }[how]
    raw, found = total(sources((2.0, 2.0), function=0.5), combine=how, uncertainty_coef=0.7)
    assert_close(found, 2.0 * expected + 0.5 * torch.arange(1, 6), 1e-5)
    assert_close(raw["reward/disagreement"], (NORMAL[:, 0] - NORMAL[:, 1]).abs() / 2, 1e-5)
    assert_same_bits(raw["reward/0"], SCORES[:, 0].contiguous())


def test_the_default_is_the_weighted_sum():
    raw, found = total(sources((2.0, 0.5)))
    assert_close(found, 2.0 * NORMAL[:, 0] + 0.5 * NORMAL[:, 1], 1e-6)
    assert "reward/disagreement" not in raw


def test_a_gold_model_is_no_member_and_judges_the_disagreement():
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    gold = RewardSource("mark", 0.0, None, lambda completions, **columns: [3.0, -1.0, 2.0, 0.0, 9.0])
    columns = [{"prompt": text} for text in texts]
    settings = PPOConfig(combine="min")
    given = [gold, *sources()]
    raw, found, metrics = score_sources(settings, given, SCORES, texts, texts, columns)
    assert_close(found, NORMAL.amin(1), 1e-6)
    assert set(raw) == {"reward/0", "reward/1", "gold/mark", "reward/disagreement"}
    (proxy, marks) = (scipy.stats.zscore(scores.double().numpy()) for scores in (found, raw["gold/mark"]))
    expected = scipy.stats.spearmanr(raw["reward/disagreement"].numpy(), abs(proxy - marks)).statistic
    assert metrics == pytest.approx({"reward/disagreement_error/mark": expected}, abs=1e-12)
    settings = PPOConfig(combine="mean")
    raw, found, _ = score_sources(settings, sources((1.0, 0.0)), SCORES, texts, texts, columns)
    assert_close(found, NORMAL[:, 0], 1e-6)
    assert set(raw) == {"reward/0", "gold/1", "reward/disagreement"}


@pytest.fixture(scope="module")
def members(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    model = load_reward_model(base.output_dir / "reward")
    for number in range(3):
        other = tree_map(lambda leaf, n=number: leaf + 0.01 * n, model.params)
        save_reward_model(folder / "reward" / str(number), model._replace(params=other), facts={})
    return folder / "reward"


def ensemble_run(base, folder, reward, **settings):
    return copy_run(base, folder, "ppo", ppo=dataclasses.replace(base.ppo, num_iterations=2, reward=reward, **settings))


def test_a_pattern_names_all_members_and_the_ways_to_combine_them_differ(base, members, tmp_path):
    seen = set()
    for how in ("sum", "mean", "min", "uncertainty"):
        run = ensemble_run(base, tmp_path / how, (f"{members}/*",), combine=how)
        run_ppo(run)
        seen.add(weights_of(run, "ppo"))
        for line in metrics_of(run, "ppo"):
            assert {"reward/0", "reward/1", "reward/2"} <= line.keys()
            assert ("reward/disagreement" in line) == (how != "sum")
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (("{members}/0",), r"^--ppo.combine min: combines reward models, of which there is 1; name two or more$"),
        (("2*{members}/0", "{members}/1"), r"^--ppo.combine min: the members 0, 1 have different weights; drop them$"),
        (("{members}/x*",), r"x\*: there is no such folder"),
    ],
)
def test_what_is_no_ensemble_is_refused(base, members, tmp_path, reward, message):
    with pytest.raises(UserError, match=message):
        run_ppo(ensemble_run(base, tmp_path, tuple(s.format(members=members) for s in reward), combine="min"))


def test_patterns_expand_in_the_order_of_numbers_and_keep_their_weight(tmp_path):
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    folders = [f"{tmp_path}/{name}" for name in ("0", "2", "10")]
    assert expand_sources([f"{tmp_path}/*", f"0.5*{tmp_path}/1*", "module:function"]) == [
        *folders, f"0.5*{folders[2]}", "module:function",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "10")


def reward_run(base, folder, **changes) -> RewardRun:
    fields = {spec.name: getattr(base, spec.name) for spec in dataclasses.fields(RewardRun)}
    settings = dataclasses.replace(base.reward, members=2)
    run = RewardRun(**fields | {"output_dir": folder / "run", "reward": settings} | changes)
    if not run.resume:
        shutil.copytree(base.output_dir / "sft", run.output_dir / "sft")
    return run


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    run = reward_run(base, tmp_path_factory.mktemp("trained"))
    run_reward(run)
    return run


def weights_of_member(run, number) -> bytes:
    return (run.output_dir / "reward" / str(number) / "model.safetensors").read_bytes()


def test_members_are_reward_models_that_differ_and_are_measured_on_the_same_records(base, trained):
    models = [load_reward_model(trained.output_dir / "reward" / str(number)) for number in range(2)]
    assert models[0].statistics != models[1].statistics
    assert weights_of_member(trained, 0) != weights_of_member(trained, 1)
    lines = [metrics_of(trained, f"reward/{number}") for number in range(2)]
    assert len(lines[0]) == len(lines[1]) > 1
    assert lines[0][0]["loss/reward"] != lines[1][0]["loss/reward"], "heads and records differ"
    assert lines[0][-1]["eval/reward/pairs"] == lines[1][-1]["eval/reward/pairs"]


def test_members_resume_to_the_bits_of_the_run_that_never_stopped(base, trained, tmp_path, caplog):
    run = reward_run(base, tmp_path)
    interrupt_after(run, "reward/1", 2)
    with stop_on_signal() as stop, pytest.raises(Interrupted, match="continue with --resume"):
        run_reward(run, stop=stop)
    assert weights_of_member(run, 0) == weights_of_member(trained, 0)
    caplog.set_level("INFO", "rlhf")
    run_reward(dataclasses.replace(run, resume=True))
    assert "nothing to resume" not in caplog.text
    assert weights_of_member(run, 1) == weights_of_member(trained, 1)
    assert {"reward/0", "reward/1"} <= read_provenance(run.output_dir / "config.yaml").keys()


def test_a_longer_ensemble_is_refused_where_a_longer_model_is(base, trained, tmp_path):
    run = dataclasses.replace(trained, output_dir=tmp_path / "run", resume=True)
    shutil.copytree(trained.output_dir, run.output_dir)
    longer = dataclasses.replace(run, reward=dataclasses.replace(run.reward, epochs=9))
    remedy = "only a run with --reward.schedule constant --reward.warmup-fraction 0 is extended"
    with pytest.raises(UserError, match=remedy):
        run_reward(longer)


def test_what_was_trained_is_an_ensemble_for_ppo_and_not_for_the_pipeline(base, trained, tmp_path):
    run = ensemble_run(base, tmp_path, (f"{trained.output_dir / 'reward'}/*",), combine="uncertainty")
    run_ppo(run)
    assert metrics_of(run, "ppo")[0]["reward/disagreement"] > 0
    with pytest.raises(UserError, match=r"^--reward.members 2: is not for the pipeline"):
        check_settings(PipelineRun(reward=RewardConfig(members=2)), STAGES["reward"])
