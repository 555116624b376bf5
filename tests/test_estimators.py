"""The contract of estimators, and a throw-away one, in a file of its own, through the whole system."""

import dataclasses
import json
import shutil
import types

import pytest
import reinforce
import test_stages
import torch
from laws import assert_close, assert_same_bits, floats, ragged_mask
from test_stages import copy_run, metrics_of, weights_of

from rlhf.advantages import gae, token_rewards
from rlhf.config import CheckpointConfig, DistConfig, PPOConfig, PPORun
from rlhf.distributed import connected
from rlhf.errors import UserError
from rlhf.estimators import ESTIMATORS, GAE, AdvantageEstimate, Estimator, register_estimator
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation import run_evaluation
from rlhf.experience import make_experience
from rlhf.losses import ppo_policy_loss
from rlhf.preference_losses import dpo_loss, sequence_log_ratio
from rlhf.stages import STAGES, check_settings
from rlhf.train.ppo import run_ppo

base = test_stages.base  # the fixture

SCORES, LOG_PROBS, REF_LOG_PROBS = floats(1, 6), -floats(2, 6, 5).abs(), -floats(3, 6, 5).abs()
MASK = ragged_mask(4, 6, 5)
GROUPS = torch.tensor([0, 0, 1, 1, 1, 0])


def experience(estimator, values=None, **options):
    return make_experience(
        SCORES, LOG_PROBS, REF_LOG_PROBS, values, MASK, groups=GROUPS, estimator=estimator, kl_coef=0.3, **options
    )


def test_gae_is_the_estimator_of_its_name():
    values, options = floats(5, 6, 5), {"gamma": 0.9, "lam": 0.8}
    rewards = token_rewards(SCORES, torch.where(MASK, LOG_PROBS - REF_LOG_PROBS, 0.0), MASK, kl_coef=0.3)
    found = experience(ESTIMATORS["gae"], values, whiten_advantages=False, **options)
    assert_same_bits(tuple(found[:2]), gae(rewards, values, MASK, **options))


def test_online_dpo_has_the_gradient_of_dpo_on_the_pairs_of_the_rollout():
    pairs = torch.tensor([0, 1, 0, 2, 2, 1])
    options = {"groups": pairs, "estimator": ESTIMATORS["online-dpo"], "kl_coef": 0.3, "whiten_advantages": False}
    advantages = make_experience(SCORES, LOG_PROBS, REF_LOG_PROBS, None, MASK, **options).advantages
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, _ = ppo_policy_loss(log_probs, old_log_probs=LOG_PROBS, advantages=advantages, mask=MASK)
    (found,) = torch.autograd.grad(loss, log_probs)
    ratios = sequence_log_ratio(log_probs, ref_log_probs=REF_LOG_PROBS, mask=MASK)
    members = [sorted((pairs == pair).nonzero().flatten().tolist(), key=lambda row: -SCORES[row]) for pair in range(3)]
    chosen, rejected = torch.tensor(members).T
    loss, _ = dpo_loss(ratios[chosen], rejected_log_ratios=ratios[rejected], beta=0.3)
    assert_close(found, torch.autograd.grad(loss, log_probs)[0], 1e-12)


def test_an_estimator_without_a_critic_has_no_values_no_returns_and_no_metrics_of_them():
    found = experience(reinforce.REINFORCE, whiten_advantages=False)
    returns = token_rewards(SCORES, torch.where(MASK, LOG_PROBS - REF_LOG_PROBS, 0.0), MASK, kl_coef=0.3).sum(1)
    for row in range(6):
        others = [other for other in range(6) if other != row and GROUPS[other] == GROUPS[row]]
        expected = returns[row] - sum(returns[other] for other in others) / len(others)
        assert_close(found.advantages[row], torch.where(MASK[row], expected, 0.0))
    assert found.returns is None
    assert not any(name.startswith("val/") for name in found.metrics)
    assert {"objective/kl", "objective/scores", "response_length/mean"} <= found.metrics.keys()


@pytest.mark.parametrize(
    ("estimator", "values", "message"),
    [
        (GAE, None, r"^make_experience: values is None, expected a tensor with the estimator gae$"),
        (reinforce.REINFORCE, MASK.float(), r"values is a tensor, expected None with the estimator reinforce$"),
        (
            Estimator("wrong", lambda completions: AdvantageEstimate(completions.scores), needs_critic=False),
            None,
            r"^estimator wrong: advantages has shape \(6,\), expected \(6, 5\) like mask$",
        ),
        (
            Estimator("lazy", lambda completions: AdvantageEstimate(completions.rewards), needs_critic=True),
            MASK.float(),
            r"^estimator lazy: returns is None, expected a tensor with the estimator lazy$",
        ),
    ],
)
def test_an_estimator_that_breaks_the_contract_is_named(estimator, values, message):
    with pytest.raises(ValueError, match=message):
        experience(estimator, values)


def test_a_name_is_registered_once():
    again = types.FunctionType(reinforce.REINFORCE.function.__code__, {})
    register_estimator(reinforce.REINFORCE._replace(function=again))  # as importing its file again does
    register_estimator(reinforce.REINFORCE)
    with pytest.raises(ValueError, match="there is another estimator 'gae'"):
        register_estimator(GAE._replace(needs_critic=False))


FREE = {"estimator": "reinforce"}
ONLINE = {"estimator": "online-dpo", "samples_per_prompt": 2, "num_epochs": 1, "minibatch_size": 128}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimator": "rloop"},
            r"^--ppo.estimator rloop: there is no such estimator; there are: gae, rloo, grpo, dr-",
        ),
        ({"critic": "none"}, r"^--ppo.critic none: the estimator gae reads values; .* that reads none: rloo, .*force$"),
        (FREE | {"critic": "shared"}, r"^--ppo.critic shared: the estimator reinforce reads no values"),
        (FREE | {"critic": "separate"}, r"^--ppo.critic separate: the estimator reinforce reads no"),
        (FREE | {"critic_warmup": 2}, r"^--ppo.critic-warmup 2: asks for values, of which the estimator reinforce has"),
        (FREE | {"bootstrap_truncated": True}, r"^--ppo.bootstrap-truncated: asks for values"),
        ({"estimator": "rloo"}, r"^--ppo.estimator rloo: compares the completions of a prompt, of which there is 1; r"),
        ({"drop_equal_groups": True}, r"^--ppo.drop-equal-groups: leaves no completion to learn from"),
        ({"critic": "shared", "critic_max_grad_norm": 1.0}, r"^--ppo.critic-max-grad-norm 1.0: clips a separate crit"),
        (ONLINE | {"samples_per_prompt": 4}, r"^--ppo.estimator online-dpo: compares two completions of a prompt; set"),
        (
            ONLINE | {"num_epochs": 2},
            r"^--ppo.estimator online-dpo: .*set --ppo.num-epochs 1 --ppo.minibatch-size 128",
        ),
        (ONLINE | {"minibatch_size": 64}, r"^--ppo.estimator online-dpo: has the gradient of DPO in the first update"),
        (
            ONLINE | {"minibatch_size": None},
            r"^--ppo.estimator online-dpo: .*set --ppo.num-epochs 1 --ppo.minibatch-size 128",
        ),
        (ONLINE | {"kl_in_loss": True, "kl_estimator": "k3"}, r"^--ppo.kl-in-loss, --ppo.kl-estimator k3: changes "),
        (ONLINE | {"whiten_advantages": True}, r"^--ppo.whiten-advantages: changes what --ppo.estimator online-dpo"),
        (ONLINE | {"loss": "gspo"}, r"^--ppo.loss gspo: changes what --ppo.estimator online-dpo computes"),
        (ONLINE | {"loss_per": "sequence"}, r"^--ppo.loss-per sequence: weighs the two completions of a pair uneq"),
        (ONLINE | {"kl_coef": 0.0}, r"^--ppo.kl-coef 0.0: is the beta of --ppo.estimator online-dpo, which is above 0"),
        ({"loss": "gspoo"}, r"^--ppo.loss gspoo: there is no such loss; there are: ppo, cispo, gspo, module:function"),
        ({"loss": "gspo", "dual_clip": 3.0}, r"^--ppo.dual-clip 3.0: is of --ppo.loss ppo alone; drop one of the two$"),
        ({"kl_importance_weighting": True}, r"^--ppo.kl-importance-weighting: has no effect without --ppo.kl-in-loss"),
    ],
)
def test_combinations_that_cannot_work_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        check_settings(PPORun(ppo=PPOConfig(**options)), STAGES["ppo"])


@pytest.mark.parametrize(
    "option",
    [
        {"value_coef": 0.5},
        {"value_clip_eps": 0.1},
        {"lam": 0.5},
        {"critic_learning_rate": 1e-3},
        {"critic_max_grad_norm": 1.0},
    ],
)
def test_settings_of_a_critic_are_idle_without_one(option):
    lines = check_settings(PPORun(ppo=PPOConfig(**FREE, **option)), STAGES["ppo"])
    idle = "has no effect with the estimator reinforce, which has no critic"
    assert [line.rpartition(": ")[2] for line in lines] == [idle]
    assert check_settings(PPORun(ppo=PPOConfig(**FREE)), STAGES["ppo"]) == []


def free_run(base, folder, **changes):
    settings = dataclasses.replace(base.ppo, **FREE, num_iterations=3, num_epochs=1, samples_per_prompt=2, batch_size=4)
    return copy_run(base, folder, "ppo", ppo=settings, checkpoint=CheckpointConfig(every=2, keep=9), **changes)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    run = free_run(base, tmp_path_factory.mktemp("free"))
    run_ppo(run)
    return run


def test_a_run_without_a_critic_has_nothing_of_one(finished):
    folder = finished.output_dir
    assert not (folder / "policy" / "critic").exists()
    assert not (folder / "policy" / "value_head.safetensors").exists()
    names = {name for line in metrics_of(finished, "ppo") for name in line}
    of_values = {name for name in names if name.startswith("val/") and not name.startswith("val/ratio")}
    assert not of_values | {name for name in names if "value" in name}  # val/ratio is the policy's
    assert {"loss/policy_avg", "val/ratio_first", "objective/kl"} <= names
    samples = [json.loads(line) for line in (folder / "logs" / "samples.jsonl").read_text().splitlines()]
    assert "values" not in samples[0]["per_token"]
    assert len(samples[0]["per_token"]["advantages"]) == samples[0]["tokens"]


def test_it_resumes_to_the_bits_of_the_run_that_never_stopped(finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path / "run")
    again = dataclasses.replace(finished, output_dir=tmp_path / "run", resume=True)
    shutil.rmtree(again.output_dir / "policy")
    shutil.rmtree(again.output_dir / "checkpoints" / "ppo" / "step-000003")
    run_ppo(again)
    assert weights_of(again, "ppo") == weights_of(finished, "ppo")


def test_a_norm_of_a_critic_changes_nothing_without_one(base, finished, tmp_path):
    run = free_run(base, tmp_path)
    run_ppo(dataclasses.replace(run, ppo=dataclasses.replace(run.ppo, critic_max_grad_norm=0.5)))
    assert weights_of(run, "ppo") == weights_of(finished, "ppo")


def test_what_it_trained_is_evaluated(finished, tmp_path):
    config = EvaluateConfig(
        model_dir=finished.output_dir,
        eval_type="policy",
        test_data=(finished.prompt_data,),
        limit=4,
        threads=1,
        cache_dir=finished.cache_dir,
        output=tmp_path / "evaluation",
    )
    report = run_evaluation(config)
    assert {evaluation.kind for evaluation in report.evaluations} == {"policy"}


def test_bf16_recomputes_log_probs_without_a_critic(base, tmp_path):
    run = free_run(base, tmp_path, precision="bf16")
    run_ppo(run)
    assert all(line["val/ratio_first"] == 1.0 for line in metrics_of(run, "ppo"))


def test_two_workers_give_the_bits_of_one_process(base, finished, tmp_path):
    run = free_run(base, tmp_path, dist=DistConfig(num_workers=2))
    with connected(DistConfig(num_workers=2)):
        run_ppo(run)
    assert weights_of(run, "ppo") == weights_of(finished, "ppo")
    assert metrics_of(run, "ppo") == metrics_of(finished, "ppo")


def test_a_registered_estimator_of_groups_needs_several_completions_of_a_prompt(monkeypatch):
    mine = ESTIMATORS["rloo"]._replace(name="mine")
    monkeypatch.setitem(ESTIMATORS, "mine", mine)
    with pytest.raises(UserError, match="mine: compares the completions of a prompt, of which there is 1"):
        check_settings(PPORun(ppo=PPOConfig(estimator="mine")), STAGES["ppo"])
    several = PPOConfig(estimator="mine", samples_per_prompt=4, gamma=0.9)
    (line,) = check_settings(PPORun(ppo=several), STAGES["ppo"])
    assert line.endswith("has no effect on the scores of whole completions")
