"""DPO, reward ensembles, and all estimators and losses on Ray workers: the bytes of one process, after faults too."""

import json
import os

import pytest
import test_dpo
import test_ppo_functions
import test_reward_ensembles
import test_stages
import toy
from test_stages import metrics_of

from rlhf.config import DistConfig
from rlhf.distributed import cluster, connected
from rlhf.train.dpo import run_dpo
from rlhf.train.ppo import run_ppo
from rlhf.train.reward import run_reward

base, own = test_stages.base, test_ppo_functions.own  # the fixtures


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory):
    """One Ray for all tests of this file, with `toy` on its path; the file of faults."""
    with pytest.MonkeyPatch.context() as patch:
        fault = tmp_path_factory.mktemp("ray") / "fault.json"
        patch.setenv("PYTHONPATH", os.path.dirname(toy.__file__))
        patch.setenv("RLHF_TEST_FAULT", str(fault))
        with connected(DistConfig(num_workers=3)):
            yield fault


@pytest.fixture(params=["whole", "killed"])
def dist(request, monkeypatch, one_ray):
    """Three workers that live, or of which one dies once it has sent what its second step computed."""
    if request.param == "killed":
        one_ray.write_text(json.dumps({"moment": "publish", "rank": 1, "version": 1, "signal": "SIGKILL"}))
        monkeypatch.setattr(cluster, "Worker", toy.FaultyWorker)
    yield DistConfig(num_workers=3, snapshot_every=2, heartbeat_s=2, timeout_s=60)
    assert not one_ray.exists(), "the fault happened"


def figures_of(run, stage):
    """The stage's metric lines without what is logged of faults."""
    return [
        {name: value for name, value in line.items() if not name.startswith("fault/")}
        for line in metrics_of(run, stage)
    ]


def assert_same_bytes(first, second, stage):
    weights = [(run.output_dir / "policy" / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    assert figures_of(first, stage) == figures_of(second, stage)


@pytest.mark.slow
def test_dpo_on_three_workers(base, dist, tmp_path):
    here = test_dpo.dpo_run(base, tmp_path / "here")
    run_dpo(here)
    there = test_dpo.dpo_run(base, tmp_path / "there", dist)
    run_dpo(there)
    assert_same_bytes(here, there, "dpo")


@pytest.mark.slow
def test_members_of_an_ensemble_on_three_workers(base, dist, tmp_path):
    here = test_reward_ensembles.reward_run(base, tmp_path / "here")
    run_reward(here)
    there = test_reward_ensembles.reward_run(base, tmp_path / "there", dist=dist)
    run_reward(there)
    for number in range(2):
        first, second = (test_reward_ensembles.weights_of_member(run, number) for run in (here, there))
        assert first == second
        assert figures_of(here, f"reward/{number}") == figures_of(there, f"reward/{number}")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_dpo_on_workers(base, one_ray, tmp_path, workers):
    here = test_dpo.dpo_run(base, tmp_path / "here")
    run_dpo(here)
    there = test_dpo.dpo_run(base, tmp_path / "there", DistConfig(num_workers=workers))
    run_dpo(there)
    assert_same_bytes(here, there, "dpo")


ONLINE = {"estimator": "online-dpo", "samples_per_prompt": 2, "batch_size": 8, "num_epochs": 1, "minibatch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "{own}:rloo", "loss": "{own}:surrogate"},
        {"estimator": "gae", "critic_max_grad_norm": 0.1},
        ONLINE,
        {"estimator": "grpo", "loss_per": "sequence", "loss": "gspo"},
        {"estimator": "dr-grpo", "loss_per": "constant"},
        {"estimator": "reinforce++", "loss": "cispo"},
    ],
    ids=str,
)
def test_estimators_and_losses(base, own, dist, tmp_path, settings):
    settings = {name: value.format(own=own) if isinstance(value, str) else value for name, value in settings.items()}
    here = test_ppo_functions.run_of(base, tmp_path / "here", **settings)
    run_ppo(here)
    there = test_ppo_functions.run_of(base, tmp_path / "there", dist, **settings)
    run_ppo(there)
    assert_same_bytes(here, there, "ppo")
