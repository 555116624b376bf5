"""Invariant 13: PPO with a KL penalty, run as the real stage, converges to the closed form pi_ref exp(r / beta) / Z."""

import itertools
import json
import math

import pytest
import torch

from rlhf import random
from rlhf.config import CheckpointConfig, DPOConfig, DPORun, LogConfig, PPOConfig, PPORun
from rlhf.io.model_folder import LanguageModel, load_language_model, save_language_model
from rlhf.io.tokenizer import EOS, Tokenizer
from rlhf.models import gpt2
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.train.dpo import run_dpo
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


def ppo_run(folder, reference, **options) -> PPORun:
    settings = {
        "model_path": reference, "reward": (f"{folder / 'judge.py'}:judge",), "kl_coef": BETA, "max_new_tokens": 1,
        "stop_at_eos": False, "num_iterations": 80, "batch_size": 1, "samples_per_prompt": 256, "minibatch_size": 256,
        "rollout_batch_size": 256, "micro_batch_size": 64, "num_epochs": 2, "learning_rate": 2e-2, "value_coef": 0.5,
        "whiten_advantages": False, "max_grad_norm": float("inf"),
    } | options  # fmt: skip
    return PPORun(
        output_dir=folder / "run",
        cache_dir=folder / "cache",
        threads=1,
        prompt_data=folder / "prompts.json",
        ppo=PPOConfig(**settings),
        log=LogConfig(tensorboard=False, samples=0),
        checkpoint=CheckpointConfig(every=1000),
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="k1 in the reward"),
        pytest.param({"kl_in_loss": True, "kl_estimator": "exact"}, id="exact in the loss"),
        pytest.param({"estimator": "rloo"}, id="RLOO"),
        pytest.param({"estimator": "grpo", "loss_per": "sequence"}, id="GRPO"),
        pytest.param({"estimator": "reinforce++"}, id="REINFORCE++", marks=pytest.mark.slow),
        pytest.param({"estimator": "dr-grpo", "loss_per": "constant"}, id="Dr. GRPO", marks=pytest.mark.slow),
        pytest.param(
            {"estimator": "dr-grpo", "kl_in_loss": True, "kl_estimator": "k3", "kl_importance_weighting": True},
            id="Dr. GRPO, weighted k3 in the loss",
            marks=pytest.mark.slow,
        ),
        pytest.param({"estimator": "rloo", "loss": "cispo"}, id="CISPO", marks=pytest.mark.slow),
        pytest.param({"estimator": "rloo", "loss": "gspo"}, id="GSPO", marks=pytest.mark.slow),
        pytest.param({"critic": "shared", "num_epochs": 4}, id="shared trunk", marks=pytest.mark.slow),
        pytest.param({"kl_in_loss": True, "kl_estimator": "k2"}, id="k2 in the loss", marks=pytest.mark.slow),
        pytest.param({"whiten_advantages": True}, id="whitened", marks=pytest.mark.slow),
    ],
)
def test_invariant_13_ppo_converges_to_the_gibbs_distribution(tmp_path, options):
    reference = write_toy(tmp_path, seed=5)
    before = distribution(reference)
    after = distribution(run_ppo(ppo_run(tmp_path, reference, **options)).model)
    gibbs = gibbs_of(before)
    assert (before - gibbs).abs().sum() / 2 > 0.15, "the toy must ask for a real change"
    assert (after - gibbs).abs().sum() / 2 < 0.02


def test_online_dpo_goes_to_the_best_completion_because_its_labels_are_certain(tmp_path):
    reference = write_toy(tmp_path, seed=5)
    settings = {"estimator": "online-dpo", "samples_per_prompt": 2, "batch_size": 128, "num_epochs": 1}
    run = ppo_run(tmp_path, reference, **settings, kl_budget=float("inf"), num_iterations=40)
    before = distribution(reference)
    after = distribution(run_ppo(run).model)
    best = list(REWARDS.values()).index(max(REWARDS.values()))
    assert before[best] < 0.5
    assert after[best] > max(0.9, gibbs_of(before)[best])


def gibbs_of(reference: torch.Tensor) -> torch.Tensor:
    rewards = torch.tensor([REWARDS[token] for token in ("a", "b", "c", "d", "")], dtype=torch.float64)
    gibbs = reference * torch.exp(rewards / BETA)
    return gibbs / gibbs.sum()


def write_pairs(path, count=600):
    """Pairs of single tokens, labelled by the reward as Bradley-Terry has it, in exact proportion."""
    pairs, tokens = [], ["a", "b", "c", "d"]
    for first, second in itertools.combinations(tokens, 2):
        wins = round(count / 6 / (1 + math.exp(REWARDS[second] - REWARDS[first])))
        for number in range(count // 6):
            chosen, rejected = (first, second) if number < wins else (second, first)
            pairs.append({"prompt": "a", "chosen": chosen, "rejected": rejected})
    path.write_text(json.dumps(pairs))


def test_invariant_13_dpo_converges_to_the_gibbs_distribution(tmp_path):
    """Among the completions that the pairs compare: one of four tokens, then the end of the text."""
    reference = write_toy(tmp_path, seed=6)
    write_pairs(tmp_path / "pairs.json")
    run = DPORun(
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        threads=1,
        preference_data=tmp_path / "pairs.json",
        dpo=DPOConfig(
            model_path=reference,
            beta=BETA,
            epochs=50,
            batch_size=600,
            learning_rate=3e-2,
            val_fraction=0.0,
            micro_batch_size=600,
            max_grad_norm=float("inf"),
        ),
        log=LogConfig(tensorboard=False),
        checkpoint=CheckpointConfig(every=1000),
    )
    before, after = (completions_of(folder) for folder in (reference, run_dpo(run).model))
    rewards = torch.tensor([REWARDS[token] for token in ("a", "b", "c", "d")], dtype=torch.float64)
    gibbs = before * torch.exp(rewards / BETA)
    gibbs = gibbs / gibbs.sum()
    assert (before - gibbs).abs().sum() / 2 > 0.15, "the toy must ask for a real change"
    assert (after - gibbs).abs().sum() / 2 < 0.02


def completions_of(folder) -> torch.Tensor:
    """[4] float64, in proportion: the probabilities of a, b, c or d and the end of the text after the prompt."""
    model = load_language_model(folder)
    tokens = torch.tensor([[0, token] for token in range(4)])
    log_probs = forward(model.params, tokens, config=model.config).double().log_softmax(-1)
    probabilities = (log_probs[:, 0, :].diagonal()[:4] + log_probs[:, 1, 4]).exp()
    return probabilities / probabilities.sum()
