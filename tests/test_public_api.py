"""The names that users import, pinned with their arguments: a change here is a change for them."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch

import rlhf

SIGNATURES = {
    "adamw": "learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, lr_multiplier",
    "adaptive_kl_coef": "kl_coef, kl, num_samples, target, horizon",
    "apply_head": "head, hidden",
    "clip_by_global_norm": "grads, max_norm, norm",
    "constant_schedule": "value, warmup_steps",
    "correlation": "x, y",
    "cosine_schedule": "value, total_steps, warmup_steps, final",
    "diversity": "texts, n",
    "entropy": "logits, temperature",
    "exact_kl": "logits, ref_logits, temperature",
    "expected_calibration_error": "margins, bins",
    "filter_logits": "logits, top_k, top_p",
    "forward": "params, tokens, config, attention_mask",
    "gae": "rewards, values, mask, gamma, lam, bootstrap_value",
    "gae_loop": "rewards, values, mask, gamma, lam, bootstrap_value",
    "generate_completions": "params, prompts, prompt_lengths, keys, config, max_new_tokens, source, max_concurrent, "
    "temperature, top_k, top_p, min_new_tokens, stop_tokens, value_head, with_entropies, draw, draws_per_call",
    "init_reward_head": "n_embd, key",
    "init_value_head": "n_embd",
    "join": "prompts, lengths, completions",
    "kl_estimate": "log_probs, ref_log_probs, estimator",
    "linear_schedule": "value, total_steps, warmup_steps, final",
    "load_model": "folder",
    "load_run": "folder",
    "make_experience": "scores, log_probs, ref_log_probs, values, mask, groups, estimator, kl_coef, kl_estimator, "
    "kl_in_loss, gamma, lam, whiten_rewards, whiten_advantages, bootstrap_value",
    "masked_mean": "values, mask",
    "masked_sum": "values, mask",
    "masked_var": "values, mask, unbiased",
    "mean_interval": "values",
    "mean_metrics": "sums",
    "ppo_policy_loss": "log_probs, old_log_probs, advantages, mask, weights, clip_eps, dual_clip",
    "ppo_value_loss": "values, old_values, returns, mask, weights, value_clip_eps",
    "preference_metrics": "chosen, rejected, chosen_lengths, rejected_lengths",
    "reliability": "margins, bins",
    "reward_loss": "chosen_scores, rejected_scores, mask, weights, margin, centre_coef",
    "sample_token": "logits, uniform",
    "sft_loss": "log_probs, mask, weights",
    "postprocess_scores": "scores, ended, missing_eos_penalty, clip",
    "token_log_probs": "logits, targets, temperature",
    "token_repetition": "tokens, n",
    "token_rewards": "scores, kl, mask, kl_coef",
    "value_head_from_reward": "head, mean, std, weight",
    "whiten": "values, mask, shift_mean, unbiased",
}
OTHERS = {
    "AdamState", "Completions", "Experience", "GPT2Config", "Optimizer", "PRESETS", "ParameterServer", "RunData",
    "gpt2", "random", "train", "tree",
}  # fmt: skip


def test_the_public_names_are_these():
    assert set(rlhf.__all__) == SIGNATURES.keys() | OTHERS


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_pinned(name):
    assert ", ".join(inspect.signature(getattr(rlhf, name)).parameters) == SIGNATURES[name]


MODULES = [m.name for m in pkgutil.walk_packages(rlhf.__path__, "rlhf.") if not m.name.startswith("rlhf.cli")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    if name.endswith("_triton"):
        pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    failures, _ = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "rlhf": rlhf})
    assert failures == 0


def test_a_family_is_imported_by_its_name_alone():
    """In a process that has imported nothing else, as in the first line of a user's script."""
    subprocess.run([sys.executable, "-c", "from rlhf import gpt2; gpt2.init"], check=True)
