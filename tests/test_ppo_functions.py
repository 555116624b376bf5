"""Estimators and losses by name and of the user's own, through the stage PPO, in this process and on workers."""

import dataclasses
import shutil

import pytest
import test_stages
from test_stages import copy_run, metrics_of, weights_of

from rlhf.config import CheckpointConfig, DistConfig, PPOConfig
from rlhf.errors import UserError
from rlhf.io.output_folder import write_config
from rlhf.io.presets import load_config
from rlhf.stages import STAGES
from rlhf.train.ppo import run_ppo
from rlhf.train.ppo_functions import open_estimator, with_defaults

base = test_stages.base  # the fixture

OWN = """
from rlhf.estimators import AdvantageEstimate
from rlhf.group_baselines import group_advantages
from rlhf.losses import ppo_policy_loss


def rloo(completions):
    returns = completions.rewards.sum(dim=-1)
    advantages = group_advantages(returns, completions.groups)
    return AdvantageEstimate(advantages.unsqueeze(-1).expand(completions.mask.shape))


def surrogate(log_probs, *, sequences, **arguments):
    return ppo_policy_loss(log_probs, **arguments)
"""


def run_of(base, folder, dist=None, **settings):
    small = {"num_iterations": 3, "num_epochs": 2, "samples_per_prompt": 4, "batch_size": 4, "minibatch_size": 8}
    changed = dataclasses.replace(base.ppo, **(small | {"estimator": "rloo"} | settings))
    return copy_run(
        base, folder, "ppo", ppo=changed, dist=dist or DistConfig(), checkpoint=CheckpointConfig(every=2, keep=9)
    )


@pytest.fixture(scope="module")
def rloo(base, tmp_path_factory):
    run = run_of(base, tmp_path_factory.mktemp("rloo"))
    run_ppo(run)
    return run


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    return file


def test_an_estimator_brings_its_critic_and_its_whitening(base):
    def filled(**settings):
        config = dataclasses.replace(base, ppo=PPOConfig(**settings))
        ppo = with_defaults(config, open_estimator(config.ppo)).ppo
        return ppo.critic, ppo.whiten_advantages

    assert filled() == ("separate", True)
    assert filled(critic="shared", whiten_advantages=False) == ("shared", False)
    assert filled(estimator="reinforce++") == ("none", True)
    for name in ("rloo", "grpo", "dr-grpo"):
        assert filled(estimator=name) == ("none", False)
    assert filled(estimator="rloo", whiten_advantages=True) == ("none", True)


def test_a_run_without_a_critic_logs_nothing_of_one_and_says_how_many_groups_are_equal(rloo):
    assert not (rloo.output_dir / "policy" / "critic").exists()
    for line in metrics_of(rloo, "ppo"):
        assert line["val/ratio_first"] == pytest.approx(1.0)
        assert 0 <= line["objective/equal_groups"] <= 1
        assert not [name for name in line if "value" in name or name in ("val/mean", "val/explained_variance")]


DIFFERENT = {
    "GRPO": {"estimator": "grpo"},
    "Dr. GRPO": {"estimator": "dr-grpo", "loss_per": "constant"},
    "REINFORCE++": {"estimator": "reinforce++"},
    "per sequence": {"loss_per": "sequence"},
    "per constant": {"loss_per": "constant"},
    "clip-higher": {"clip_eps": 1e-4, "clip_eps_high": 1e-3},
    "CISPO": {"loss": "cispo", "clip_eps_high": 1e-3},
    "GSPO": {"loss": "gspo", "clip_eps": 1e-4},
    "weighted KL": {"kl_in_loss": True, "kl_estimator": "k3", "kl_importance_weighting": True},
    "weighted k1": {"kl_in_loss": True, "kl_importance_weighting": True},
    "critic's clip": {"estimator": "gae", "max_grad_norm": 1e-3, "critic_max_grad_norm": 1e-2, "adam_eps": 1e-2},
    "clip of both": {"estimator": "gae", "max_grad_norm": 1e-3, "adam_eps": 1e-2},
    "critic's rate": {"estimator": "gae", "critic_learning_rate": 1e-2},
}


@pytest.mark.parametrize("option", DIFFERENT)
def test_every_option_trains_and_is_none_of_the_others(base, rloo, tmp_path, option):
    run = run_of(base, tmp_path, num_iterations=2, **DIFFERENT[option])
    run_ppo(run)
    weights = weights_of(run, "ppo")
    assert all(line["val/ratio_first"] == pytest.approx(1.0) for line in metrics_of(run, "ppo"))
    assert SEEN.setdefault(weights, option) == option


SEEN: dict[bytes, str] = {}


def test_groups_of_equal_scores_are_dropped_and_an_iteration_without_any_other_updates_nothing(base, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def same(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    run = run_of(base, tmp_path, reward=(f"{judge}:same",), drop_equal_groups=True)
    run_ppo(run)
    for line in metrics_of(run, "ppo"):
        assert line["objective/equal_groups"] == 1.0
        assert line["policy/updates"] == 0
    sft, policy = (run.output_dir / name / "model.safetensors" for name in ("sft", "policy"))
    assert sft.read_bytes() == policy.read_bytes()


def test_functions_of_ones_own_give_the_bytes_of_ours(base, rloo, own, tmp_path):
    run = run_of(base, tmp_path, estimator=f"{own}:rloo", loss=f"{own}:surrogate")
    run_ppo(run)
    assert weights_of(run, "ppo") == weights_of(rloo, "ppo")
    assert metrics_of(run, "ppo") == metrics_of(rloo, "ppo")


def test_a_function_is_part_of_the_run_by_its_content_not_by_its_place(base, own, tmp_path):
    file = tmp_path / "mine.py"
    shutil.copy(own, file)
    run = run_of(base, tmp_path, estimator=f"{file}:rloo", loss=f"{file}:surrogate", num_iterations=2)
    run_ppo(run)
    elsewhere = tmp_path / "elsewhere.py"
    file.rename(elsewhere)
    moved = dataclasses.replace(run.ppo, estimator=f"{elsewhere}:rloo", loss=f"{elsewhere}:surrogate")
    run_ppo(dataclasses.replace(run, ppo=moved, resume=True))
    elsewhere.write_text(OWN + "\nCHANGED = True\n")
    with pytest.raises(UserError, match=r"ppo.estimator .*elsewhere.py:rloo: the estimator has changed; ppo.loss"):
        run_ppo(dataclasses.replace(run, ppo=moved, resume=True))
    named = dataclasses.replace(run.ppo, estimator="grpo", loss="cispo")
    with pytest.raises(UserError, match=r"ppo.estimator grpo: the estimator has changed"):
        run_ppo(dataclasses.replace(run, ppo=named, resume=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "nowhere.py:rloo"}, r"--ppo.estimator nowhere.py:rloo: nowhere.py cannot be imported"),
        ({"loss": "nowhere.py:loss"}, r"--ppo.loss nowhere.py:loss: nowhere.py cannot be imported"),
        ({"loss": "math:nothing"}, r"--ppo.loss math:nothing: math.* has no function 'nothing'"),
    ],
)
def test_functions_that_are_not_there_are_refused_before_training(base, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run_ppo(run_of(base, tmp_path, **settings))


def test_the_configuration_that_is_written_has_absolute_paths(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    run = dataclasses.replace(base, output_dir=tmp_path / "run", ppo=PPOConfig(estimator="own.py:rloo", loss="ppo"))
    run.output_dir.mkdir()
    write_config(run, STAGES["ppo"], {})
    written = load_config(str(run.output_dir / "config.yaml")).ppo
    assert written.estimator == f"{tmp_path / 'own.py'}:rloo"
    assert written.loss == "ppo"
    assert open_estimator(written).needs_critic is False


WRONG = """
import torch

def tensor(log_probs, **arguments):
    return log_probs.sum()

def old_signature(log_probs, *, old_log_probs):
    return log_probs.sum(), {"count": torch.tensor(2)}

def uncounted(log_probs, **arguments):
    return log_probs.sum(), {}

def named_like_a_mean(log_probs, **arguments):
    return log_probs.sum(), {"loss/own": log_probs.sum().detach(), "count": torch.tensor(2)}

def broken(log_probs, **arguments):
    raise RuntimeError("my own mistake")

def number(completions):
    return 3.0
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "wrong.py:tensor"}, r"--ppo.loss wrong.py:tensor: TypeError"),
        ({"loss": "wrong.py:old_signature"}, r"unexpected keyword argument 'advantages'"),
        ({"loss": "wrong.py:uncounted"}, r"no 'count', the number of tokens"),
        ({"loss": "wrong.py:named_like_a_mean"}, r"loss/own"),
        ({"loss": "wrong.py:broken"}, r"RuntimeError: my own mistake \(.*wrong.py:\d+\)"),
        ({"estimator": "wrong.py:number"}, r"--ppo.estimator wrong.py:number: .*returned a float"),
    ],
)
def test_functions_that_fail_are_named_with_the_reason(base, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    with pytest.raises(UserError, match=message):
        run_ppo(run_of(base, tmp_path, **settings))


PLAIN = """
def loss(log_probs, *, advantages, mask, **others):
    return -(log_probs * advantages.detach() * mask).sum(), {"count": mask.sum()}
"""


def test_a_loss_need_not_log_the_ratio(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(PLAIN)
    assert run_ppo(run_of(base, tmp_path, loss="plain.py:loss")).finished


def test_a_loss_has_to_log_what_the_target_kl_limits(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(PLAIN)
    with pytest.raises(UserError, match=r"no 'policy/approxkl_avg_sum', whose mean --ppo\.target-kl limits"):
        run_ppo(run_of(base, tmp_path, loss="plain.py:loss", target_kl=0.1))
