"""The names that users import, pinned with their arguments: a change here is a change for them."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys

import pytest
import torch

import rlhf
import rlhf.config
import rlhf.estimators
import rlhf.metrics
import rlhf.models.architecture
import rlhf.stages

SIGNATURES = {
    "adamw": "learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, lr_multiplier",
    "adaptive_kl_coef": "kl_coef, kl, num_samples, target, horizon",
    "apply_head": "head, hidden",
    "best_of_n": "proxy, values, n",
    "bon_kl_bound": "n",
    "cispo_loss": "log_probs, old_log_probs, advantages, mask, weights, clip_eps, clip_eps_high, sequences",
    "clip_by_global_norm": "grads, max_norm, norm",
    "combine_scores": "scores, how, coef",
    "constant_schedule": "value, warmup_steps",
    "correlation": "x, y",
    "cosine_schedule": "value, total_steps, warmup_steps, final",
    "diversity": "texts, n",
    "dpo_loss": "chosen_log_ratios, rejected_log_ratios, mask, weights, beta, label_smoothing",
    "entropy": "logits, temperature",
    "dpo_advantages": "scores, log_ratios, groups, beta",
    "equal_groups": "scores, groups",
    "exact_kl": "logits, ref_logits, temperature",
    "expected_calibration_error": "margins, bins",
    "filter_logits": "logits, top_k, top_p",
    "forward": "params, tokens, config, attention_mask",
    "gae": "rewards, values, mask, gamma, lam, bootstrap_value",
    "gae_loop": "rewards, values, mask, gamma, lam, bootstrap_value",
    "generate_completions": "params, prompts, prompt_lengths, keys, config, max_new_tokens, source, max_concurrent, "
    "temperature, top_k, top_p, min_new_tokens, stop_tokens, value_head, with_entropies, draw, draws_per_call",
    "group_advantages": "scores, groups, baseline, scale",
    "gspo_loss": "log_probs, old_log_probs, advantages, mask, weights, clip_eps, clip_eps_high, sequences",
    "importance_weighted_kl": "log_probs, old_log_probs, ref_log_probs, estimator",
    "init_reward_head": "n_embd, key",
    "init_value_head": "n_embd",
    "ipo_loss": "chosen_log_ratios, rejected_log_ratios, mask, weights, beta",
    "join": "prompts, lengths, completions",
    "kl_estimate": "log_probs, ref_log_probs, estimator",
    "linear_schedule": "value, total_steps, warmup_steps, final",
    "load_model": "folder",
    "load_run": "folder",
    "loss_weights": "lengths, per, length",
    "make_experience": "scores, log_probs, ref_log_probs, values, mask, groups, estimator, kl_coef, kl_estimator, "
    "kl_in_loss, gamma, lam, whiten_rewards, whiten_advantages, bootstrap_value",
    "masked_mean": "values, mask",
    "masked_sum": "values, mask",
    "masked_var": "values, mask, unbiased",
    "mean_interval": "values",
    "mean_metrics": "sums",
    "ppo_policy_loss": "log_probs, old_log_probs, advantages, mask, weights, clip_eps, clip_eps_high, dual_clip",
    "ppo_value_loss": "values, old_values, returns, mask, weights, value_clip_eps",
    "preference_metrics": "chosen, rejected, chosen_lengths, rejected_lengths",
    "reliability": "margins, bins",
    "returns_to_go": "rewards, mask, gamma",
    "reward_loss": "chosen_scores, rejected_scores, mask, weights, margin, centre_coef",
    "sample_token": "logits, uniform",
    "sequence_log_ratio": "log_probs, ref_log_probs, mask",
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


@pytest.mark.parametrize("name", ["gpt2", "tree", "train"])
def test_a_module_of_the_public_names_is_imported_when_it_is_first_used(name):
    program = f"import rlhf; print(rlhf.{name}.__name__)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


MODULES = [m.name for m in pkgutil.walk_packages(rlhf.__path__, "rlhf.") if not m.name.startswith("rlhf.cli")]


TABLES = [rlhf.metrics.METRICS, rlhf.estimators.ESTIMATORS, rlhf.stages.STAGES, rlhf.models.architecture._REGISTERED]


@pytest.fixture
def restored_tables():
    """Entries that examples register are removed afterwards."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, restored_tables, tmp_path, monkeypatch):
    if name.endswith("_triton"):
        pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    monkeypatch.chdir(tmp_path)
    failures, _ = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "rlhf": rlhf})
    assert failures == 0


def functions_of(module):
    """The public functions that a module defines, by their dotted name."""
    loaded = importlib.import_module(module)
    return {
        f"{module}.{name}": value
        for name, value in vars(loaded).items()
        if inspect.isfunction(value) and value.__module__ == module and not name.startswith("_")
    }


CORE = [name for name in MODULES if name.count(".") == 1 and not hasattr(importlib.import_module(name), "__path__")]
EXECUTION = [name for name in MODULES if name.startswith("rlhf.execution.")]
MODELS = [name for name in MODULES if name.startswith("rlhf.models.")]
PUBLIC = {name: value for module in CORE + EXECUTION + MODELS for name, value in functions_of(module).items()}
PUBLIC |= {f"rlhf.{name}": getattr(rlhf, name) for name in SIGNATURES} | {"rlhf.train.run": rlhf.train.run}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_has_an_example_and_names_its_arguments(name):
    """So that help() of each stands alone."""
    text = inspect.getdoc(PUBLIC[name])
    assert ">>> " in text
    unnamed = [argument for argument in inspect.signature(PUBLIC[name]).parameters if argument not in text]
    assert not unnamed
    assert not re.search(r"(?i)\b(errors|arguments|source|raises|returns)[^.]{0,30}\bas `|^same\b", text)


RECORDS = {
    f"{name}.{key}": value
    for name in MODULES
    if name in CORE
    or name.startswith("rlhf.models.")
    or name.rpartition(".")[0] in ("rlhf.execution", "rlhf.monitor.run_data")
    for key, value in vars(importlib.import_module(name)).items()
    if inspect.isclass(value) and value.__module__ == name and hasattr(value, "_fields") and not key.startswith("_")
}


@pytest.mark.parametrize("name", RECORDS)
def test_help_documents_the_fields_of_records(name):
    text = pydoc.render_doc(RECORDS[name])
    assert "Alias for field number" not in text


def test_the_docstring_of_a_dataclass_documents_its_fields():
    assert "    n_embd: " in rlhf.GPT2Config.__doc__
    ppo = inspect.getdoc(rlhf.config.PPOConfig)
    assert all(f"    {field.name}: " in ppo for field in dataclasses.fields(rlhf.config.PPOConfig))


def test_a_family_is_imported_by_its_name_alone():
    """In a process that has imported nothing else, as in the first line of a user's script."""
    subprocess.run([sys.executable, "-c", "from rlhf import gpt2; gpt2.init"], check=True)


def test_classes_that_users_make_have_an_example():
    for value in (rlhf.GPT2Config, rlhf.Optimizer, rlhf.ParameterServer, rlhf.train.Observer):
        assert ">>> " in inspect.getdoc(value)
