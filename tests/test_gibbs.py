"""Invariant 13: PPO with a KL penalty, run as the real stage, converges to the closed form pi_ref exp(r / beta) / Z."""

import json

import pytest
import reinforce
import torch

from rlhf import random
from rlhf.config import CheckpointConfig, LogConfig, PPOConfig, PPORun
from rlhf.io.model_folder import LanguageModel, load_language_model, save_language_model
from rlhf.io.tokenizer import EOS, Tokenizer
from rlhf.models import gpt2
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.train.ppo import run_ppo

REWARDS = {"a": 0.0, "b": 1.0, "c": 0.6, "d": -0.7, "": 0.3}
BETA = 0.5


def write_toy(folder, *, seed: int):
    """A reference over five tokens, a prompt file and a reward function; returns the model's folder."""
    words = folder / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2, "d": 3, EOS: 4}))
    (words / "merges.txt").write_text("")
    shape = GPT2Config(vocab_size=5, n_positions=4, n_embd=8, n_layer=1, n_head=1)
    params = gpt2.init(shape, key=random.key(seed))
    params["wte"]["weight"] = params["wte"]["weight"] * 20.0  # so that the reference is far from uniform
    save_language_model(folder / "reference", LanguageModel(params, shape, Tokenizer.load(words)), facts={})
    (folder / "prompts.json").write_text(json.dumps([{"prompt": "a"}]))
    (folder / "judge.py").write_text(
        f"R = {REWARDS}\ndef judge(prompts, completions):\n    return [R[c] for c in completions]\n"
    )
    return folder / "reference"


def distribution(folder) -> torch.Tensor:
    model = load_language_model(folder)
    return forward(model.params, torch.tensor([[0]]), config=model.config)[0, -1].double().softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="k1 in the reward"),
        pytest.param({"kl_in_loss": True, "kl_estimator": "exact"}, id="exact in the loss"),
        pytest.param({"estimator": reinforce.REINFORCE.name}, id="leave one out, no critic"),
        pytest.param({"critic": "shared", "num_epochs": 4}, id="shared trunk", marks=pytest.mark.slow),
        pytest.param({"kl_in_loss": True, "kl_estimator": "k2"}, id="k2 in the loss", marks=pytest.mark.slow),
        pytest.param({"whiten_advantages": True}, id="whitened", marks=pytest.mark.slow),
    ],
)
def test_invariant_13_ppo_converges_to_the_gibbs_distribution(tmp_path, options):
    reference = write_toy(tmp_path, seed=5)
    settings = {
        "model_path": reference, "reward": (f"{tmp_path / 'judge.py'}:judge",), "kl_coef": BETA, "max_new_tokens": 1,
        "stop_at_eos": False, "num_iterations": 80, "batch_size": 1, "samples_per_prompt": 256, "minibatch_size": 256,
        "rollout_batch_size": 256, "micro_batch_size": 64, "num_epochs": 2, "learning_rate": 2e-2, "value_coef": 0.5,
        "whiten_advantages": False, "max_grad_norm": float("inf"),
    } | options  # fmt: skip
    run = PPORun(
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        threads=1,
        prompt_data=tmp_path / "prompts.json",
        ppo=PPOConfig(**settings),
        log=LogConfig(tensorboard=False, samples=0),
        checkpoint=CheckpointConfig(every=1000),
    )
    before = distribution(reference)
    after = distribution(run_ppo(run).model)
    rewards = torch.tensor([REWARDS[token] for token in ("a", "b", "c", "d", "")], dtype=torch.float64)
    gibbs = before * torch.exp(rewards / BETA)
    gibbs = gibbs / gibbs.sum()
    assert (before - gibbs).abs().sum() / 2 > 0.15, "the toy must ask for a real change"
    assert (after - gibbs).abs().sum() / 2 < 0.02
