"""DPO, and estimators and losses of the user's own, on Ray workers: the bytes of one process."""

import pytest
import test_dpo
import test_ppo_functions
import test_stages
from test_stages import metrics_of

from rlhf.config import DistConfig
from rlhf.distributed import connected
from rlhf.train.dpo import run_dpo
from rlhf.train.ppo import run_ppo

base, own = test_stages.base, test_ppo_functions.own  # the fixtures


@pytest.fixture(scope="module")
def one_ray():
    with connected(DistConfig(num_workers=2)):
        yield


def assert_same_bytes(first, second, stage):
    weights = [(run.output_dir / "policy" / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    assert metrics_of(first, stage) == metrics_of(second, stage)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_dpo_on_workers(base, one_ray, tmp_path, workers):
    here = test_dpo.dpo_run(base, tmp_path / "here")
    run_dpo(here)
    there = test_dpo.dpo_run(base, tmp_path / "there", DistConfig(num_workers=workers))
    run_dpo(there)
    assert_same_bytes(here, there, "dpo")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"estimator": "{own}:rloo", "loss": "{own}:surrogate"}, marks=pytest.mark.slow),
        pytest.param({"estimator": "gae", "critic_max_grad_norm": 0.1}, marks=pytest.mark.slow),
        pytest.param({"estimator": "grpo", "loss_per": "sequence", "loss": "gspo"}, marks=pytest.mark.slow),
        pytest.param({"estimator": "dr-grpo", "loss_per": "constant"}, marks=pytest.mark.slow),
        pytest.param({"estimator": "reinforce++", "loss": "cispo"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_estimators_and_losses(base, own, one_ray, tmp_path, settings):
    settings = {name: value.format(own=own) if isinstance(value, str) else value for name, value in settings.items()}
    here = test_ppo_functions.run_of(base, tmp_path / "here", **settings)
    run_ppo(here)
    there = test_ppo_functions.run_of(base, tmp_path / "there", DistConfig(num_workers=2), **settings)
    run_ppo(there)
    assert_same_bytes(here, there, "ppo")
