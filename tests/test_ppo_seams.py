"""PPO's settings in combination: what the log says was used, where the critic starts, and that gold changes no bit."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_stages
import torch
from test_stages import copy_run, metrics_of, weights_of

from rlhf.config import CheckpointConfig, PipelineRun, PPOConfig
from rlhf.errors import UserError
from rlhf.io.checkpoint import load_checkpoint
from rlhf.io.model_folder import RewardModel, RewardStatistics, load_reward_model, save_reward_model
from rlhf.io.reward_sources import RewardSource
from rlhf.train.ppo import run_ppo
from rlhf.train.ppo_program import critic_source, learning_rate, start_models, updates_per_iteration
from rlhf.tree import tree_map

base = test_stages.base  # the fixture

CRITICS = ("separate", "shared")
SOURCES = {
    "model": ("{run}/reward",),
    "function": ("{judge}:score",),
    "mix": ("0.5*{run}/reward", "2*{judge}:score"),
}
GOLD = {"gold model": "0*{gold}", "gold function": "0*{judge}:gold"}


@pytest.fixture(scope="module")
def extras(base, tmp_path_factory) -> dict[str, Path]:
    """A reward function's file, and a reward model of other weights than the run's own."""
    folder = tmp_path_factory.mktemp("extras")
    judge = folder / "judge.py"
    judge.write_text(
        "def score(completions, **kwargs):\n    return [len(text) / 10 for text in completions]\n"
        "def gold(completions, **kwargs):\n    return [-float(len(text)) for text in completions]\n"
    )
    model = load_reward_model(base.output_dir / "reward")
    other = tree_map(lambda leaf: leaf + 0.1, model.params)
    save_reward_model(folder / "gold", model._replace(params=other), facts={})
    return {"judge": judge, "gold": folder / "gold"}


def ppo_run(base: PipelineRun, folder: Path, extras: dict[str, Path], specs: tuple[str, ...], **changes) -> PipelineRun:
    run = folder / "run"
    reward = tuple(spec.format(run=run, **extras) for spec in specs)
    precision = changes.pop("precision", "fp32")
    settings = dataclasses.replace(base.ppo, reward=reward, **changes)
    return copy_run(
        base, folder, "ppo", ppo=settings, precision=precision, checkpoint=CheckpointConfig(every=2, keep=9)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_only_logged_changes_no_bit_and_resuming_neither(
    base, extras, tmp_path, source, critic, warmup, precision
):
    options = {
        "critic": critic, "critic_warmup": warmup, "precision": precision, "num_iterations": 3, "num_epochs": 1,
        "warmup_fraction": 0.5, "kl_adaptive": True, "ref_ema": 0.9, "max_new_tokens": 4,
    }  # fmt: skip
    plain = ppo_run(base, tmp_path / "plain", extras, SOURCES[source], **options)
    watched = ppo_run(base, tmp_path / "watched", extras, (*SOURCES[source], *GOLD.values()), **options)
    run_ppo(plain)
    run_ppo(watched)
    assert weights_of(plain, "ppo") == weights_of(watched, "ppo")
    lines = metrics_of(watched, "ppo")
    gold = [{name: line.pop(name) for name in list(line) if name.startswith("gold/")} for line in lines]
    assert lines == metrics_of(plain, "ppo")
    assert all(len(scores) == len(GOLD) for scores in gold)
    whole = weights_of(watched, "ppo")
    shutil.rmtree(watched.output_dir / "policy")
    shutil.rmtree(watched.output_dir / "checkpoints" / "ppo" / "step-000003")
    run_ppo(dataclasses.replace(watched, resume=True))
    assert weights_of(watched, "ppo") == whole


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_critic_warms_up_at_the_full_rate_and_the_log_has_the_rate_used(base, extras, tmp_path, schedule):
    options = {"critic_warmup": 2, "num_iterations": 4, "warmup_fraction": 0.5, "schedule": schedule}
    run = ppo_run(base, tmp_path, extras, SOURCES["model"], adam_eps=1e-30, max_grad_norm=float("inf"), **options)
    run_ppo(run)
    settings, lines = run.ppo, metrics_of(run, "ppo")
    assert [line["lr"] for line in lines] == [learning_rate(settings, step, 0) for step in range(4)]
    assert lines[0]["lr"] == lines[1]["lr"] == settings.learning_rate
    assert 0 < lines[2]["lr"] < settings.learning_rate
    # Adam's first update moves each element by the learning rate: here the critic's, with the first minibatch alone
    single = ppo_run(
        base, tmp_path / "single", extras, SOURCES["model"], adam_eps=1e-30, num_epochs=1, minibatch_size=8,
        critic_warmup=1, num_iterations=2, warmup_fraction=0.5, schedule=schedule,
    )  # fmt: skip
    single = dataclasses.replace(single, checkpoint=CheckpointConfig(every=1, keep=9))
    run_ppo(single)
    root = single.output_dir / "checkpoints" / "ppo"
    shutil.rmtree(root / "step-000002")
    warmed = load_checkpoint(root).tensors["params.critic.head.weight"]
    source = load_reward_model(single.output_dir / "reward")
    started = source.params["head"]["weight"] / source.statistics.std
    moved = (warmed - started).abs()
    assert float(moved.median()) == pytest.approx(settings.learning_rate, rel=1e-2)


@pytest.mark.parametrize(("schedule", "final"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1e-3)])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_reach_their_end_whatever_target_kl_passes_over(schedule, final, warmup):
    rates: dict[str, Any] = {"schedule": schedule, "learning_rate": 1e-3, "warmup_fraction": 0.0}
    settings = PPOConfig(num_iterations=10, critic_warmup=warmup, target_kl=0.1, **rates)
    last = learning_rate(settings, 9, updates_per_iteration(settings) - 1)
    assert last == pytest.approx(final, abs=1e-3 / ((10 - warmup) * updates_per_iteration(settings)) + 1e-9)
    first = learning_rate(settings, warmup, 0)
    assert first == pytest.approx(1e-3)


def test_an_update_beyond_target_kl_is_not_applied(base, extras, tmp_path):
    """The run equals one whose iterations end after the minibatches that were within the target."""
    shared = {"num_epochs": 1, "num_iterations": 1, "schedule": "constant"}
    stopped = ppo_run(base, tmp_path / "stopped", extras, SOURCES["model"], target_kl=1e-12, minibatch_size=4, **shared)
    free = ppo_run(base, tmp_path / "free", extras, SOURCES["model"], minibatch_size=4, **shared)
    run_ppo(stopped)
    run_ppo(free)
    (line,) = metrics_of(stopped, "ppo")
    assert line["policy/updates"] == 1
    assert metrics_of(free, "ppo")[0]["policy/updates"] == 2
    state = load_checkpoint(stopped.output_dir / "checkpoints" / "ppo")
    assert int(state.tensors["optimizer.step"]) == state.facts["version"] == 1
    assert weights_of(stopped, "ppo") != weights_of(free, "ppo")


def test_the_coefficient_stays_put_while_the_policy_cannot_move(base, extras, tmp_path):
    options = {"kl_adaptive": True, "critic_warmup": 3, "num_iterations": 5, "kl_horizon": 8.0}
    run = ppo_run(base, tmp_path, extras, SOURCES["model"], **options)
    run_ppo(run)
    coefficients = [line["objective/kl_coef"] for line in metrics_of(run, "ppo")]
    assert coefficients[:4] == [run.ppo.kl_coef] * 4
    assert coefficients[4] != run.ppo.kl_coef


def reward_source(base, weight: float, name: str) -> RewardSource:
    model = load_reward_model(base.output_dir / "reward")
    return RewardSource(name, weight, model._replace(statistics=RewardStatistics(0.5, 2.0, 10)), None)


def test_the_critic_starts_from_the_first_optimised_model_and_its_weight(base):
    policy = load_reward_model(base.output_dir / "reward")
    gold, first, second = (reward_source(base, weight, name) for weight, name in ((0, "g"), (-0.5, "a"), (2, "b")))
    assert critic_source([gold, first, second]) is first
    assert critic_source([gold]) is None
    head = start_models(PPOConfig(critic="separate"), policy, [gold, first, second]).params["critic"]["head"]
    hidden = torch.ones(policy.config.n_embd)
    score = hidden @ first.model.params["head"]["weight"][0]
    value = hidden @ head["weight"][0] + head["bias"][0]
    torch.testing.assert_close(value, -0.5 * (score - 0.5) / 2.0)


def test_a_gold_model_that_reads_less_is_refused_by_name(base, extras, tmp_path):
    model = load_reward_model(base.output_dir / "reward")
    short = dataclasses.replace(model.config, n_positions=16)
    trunk = model.params["trunk"] | {"wpe": tree_map(lambda leaf: leaf[:16], model.params["trunk"]["wpe"])}
    save_reward_model(
        tmp_path / "short",
        RewardModel(model.params | {"trunk": trunk}, short, model.tokenizer, model.statistics),
        facts={},
    )
    run = ppo_run(base, tmp_path, extras, ("{run}/reward", f"0*{tmp_path / 'short'}"))
    with pytest.raises(UserError, match=r"the gold model short reads 16 tokens, .* would change the training"):
        run_ppo(run)
    assert not list((run.output_dir).glob("checkpoints/ppo/*"))
