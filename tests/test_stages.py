"""The stages end to end on a tiny model: what they write, that they learn, and that resuming changes no bit."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rlhf.cli.training import open_training

from rlhf.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    PipelineRun,
    PPOConfig,
    PPORun,
    RewardConfig,
    SFTConfig,
    TokenizerConfig,
)
from rlhf.data.demo_data import write_embedded
from rlhf.errors import Interrupted, NonFiniteError, UserError
from rlhf.execution.executor import Fault
from rlhf.io.checkpoint import last_step, load_checkpoint
from rlhf.io.model_folder import load_language_model, load_reward_model, save_reward_model
from rlhf.io.presets import narrow
from rlhf.monitor.log import read_logs
from rlhf.stages import STAGES
from rlhf.train import loop, pipeline
from rlhf.train.context import open_run
from rlhf.train.pipeline import run_stages
from rlhf.train.ppo import run_ppo
from rlhf.train.ppo_rollout import score_rollout
from rlhf.train.reward import run_reward
from rlhf.train.sft import run_sft
from rlhf.train.signals import stop_on_signal
from rlhf.train.stage_inputs import record_order
from rlhf.tree import named_leaves, tree_map

RUNS = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
MODELS = {"sft": "sft", "reward": "reward", "ppo": "policy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> PipelineRun:
    """A run whose SFT and reward models are there already."""
    folder = tmp_path_factory.mktemp("base")
    files = write_embedded(folder / "data", size=120)
    config = PipelineRun(
        output_dir=folder / "run",
        cache_dir=folder / "cache",
        threads=1,
        sft_data=files.demonstrations,
        preference_data=files.preferences,
        prompt_data=files.prompts,
        model=ModelConfig(preset="tiny", n_layer=1, n_embd=32),
        tokenizer=TokenizerConfig(vocab_size=400),
        sft=SFTConfig(epochs=3, batch_size=16, learning_rate=1e-2, eval_every=7, dropout=0.1),
        reward=RewardConfig(epochs=2, batch_size=16, learning_rate=3e-3, eval_every=5),
        ppo=PPOConfig(
            num_iterations=6, batch_size=8, minibatch_size=4, num_epochs=2, max_new_tokens=8, rollout_batch_size=4,
            learning_rate=1e-3, micro_batch_size=2,
        ),
        checkpoint=CheckpointConfig(every=4, keep=2),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip
    run_sft(config)
    run_reward(config)
    return config


def copy_run(base: PipelineRun, folder: Path, stage: str, **changes) -> PipelineRun:
    """A new output folder with the models that `stage` starts from; paths inside the run stay comparable."""
    run = dataclasses.replace(base, output_dir=folder / "run", **changes)
    for earlier in list(MODELS)[: list(MODELS).index(stage)]:
        shutil.copytree(base.output_dir / MODELS[earlier], run.output_dir / MODELS[earlier])
    return run


def metrics_of(run: PipelineRun, stage: str) -> list[dict]:
    """The stage's metric lines without what depends on the clock."""
    lines = [json.loads(line) for line in (run.output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "timing_s/", "perf/")
    return [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in lines
        if line["stage"] == stage and "event" not in line
    ]


def weights_of(run: PipelineRun, stage: str) -> bytes:
    return (run.output_dir / MODELS[stage] / "model.safetensors").read_bytes()


def watched_losses(monkeypatch) -> set[str | None]:
    """The names of the losses whose rise ends a stage; filled by the runs that follow."""
    names = set()
    monkeypatch.setattr(loop, "find_failure", lambda history, *, kl_budget, loss: names.add(loss) or "")
    return names


def interrupt_after(run: PipelineRun, stage: str, lines: int) -> None:
    """Send this process SIGTERM as soon as the stage has logged so many steps."""

    def watch() -> None:
        path = run.output_dir / "logs" / "metrics.jsonl"
        while not path.exists() or path.read_text().count(f'"stage": "{stage}", "step": ') < lines:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("stage", RUNS)
def test_resuming_gives_the_bits_of_the_run_that_never_stopped(base, tmp_path, stage):
    whole = copy_run(base, tmp_path / "whole", stage)
    RUNS[stage](whole)
    stopped = copy_run(base, tmp_path / "stopped", stage)
    interrupt_after(stopped, stage, 2)
    with stop_on_signal() as stop, pytest.raises(Interrupted, match="continue with --resume") as caught:
        RUNS[stage](stopped, stop=stop)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert not (stopped.output_dir / MODELS[stage]).exists()
    RUNS[stage](dataclasses.replace(stopped, resume=True))
    assert weights_of(whole, stage) == weights_of(stopped, stage)
    assert metrics_of(whole, stage) == metrics_of(stopped, stage)
    samples = [(run.output_dir / "logs" / "samples.jsonl").read_bytes() for run in (whole, stopped)]
    assert samples[0] == samples[1]


def test_a_signal_in_a_stages_last_step_stops_the_pipeline_after_it(base, tmp_path):
    run = dataclasses.replace(base, output_dir=tmp_path / "run")
    interrupt_after(run, "sft", 22)
    with stop_on_signal() as stop, pytest.raises(Interrupted, match="sft: stopped; this stage is finished and saved"):
        run_stages(run, stop=stop)
    assert weights_of(run, "sft") == weights_of(base, "sft")
    assert not (run.output_dir / "reward").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_stops_at_once(base, tmp_path, number):

    def wait() -> None:
        config = dataclasses.replace(base, output_dir=tmp_path / "run")
        with stop_on_signal() as stop, open_run(config, STAGES["sft"], stop=stop):
            os.kill(os.getpid(), number)
            time.sleep(10)

    before = signal.signal(number, signal.SIG_DFL)  # whoever started the tests may have had it ignored
    try:
        with pytest.raises(Interrupted, match="sft: stopped before its first step") as caught:
            wait()
    finally:
        signal.signal(number, before)
    assert caught.value.exit_code == 128 + number


@pytest.mark.parametrize("stage", RUNS)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(base, tmp_path, stage):
    runs = [copy_run(base, tmp_path / str(n), stage, seed=seed) for n, seed in enumerate((0, 0, 1))]
    for run in runs:
        RUNS[stage](run)
    one, same, other = (weights_of(run, stage) for run in runs)
    assert one == same
    assert one != other
    assert metrics_of(runs[0], stage) == metrics_of(runs[1], stage)


@pytest.mark.parametrize("stage", RUNS)
def test_gradient_checkpointing_changes_no_bit(base, tmp_path, stage):
    runs = []
    for on in (False, True):
        settings = dataclasses.replace(getattr(base, stage), gradient_checkpointing=on)
        runs.append(copy_run(base, tmp_path / str(on), stage, **{stage: settings}))
        RUNS[stage](runs[-1])
    assert weights_of(runs[0], stage) == weights_of(runs[1], stage)
    assert metrics_of(runs[0], stage) == metrics_of(runs[1], stage)


def test_resume_of_a_finished_run_changes_nothing(base, tmp_path):
    run = copy_run(base, tmp_path, "ppo")
    run_ppo(run)
    weights, metrics = weights_of(run, "ppo"), metrics_of(run, "ppo")
    run_ppo(dataclasses.replace(run, resume=True))
    assert weights_of(run, "ppo") == weights
    assert metrics_of(run, "ppo") == metrics


def test_a_second_run_into_the_same_folder_is_refused(base):
    with pytest.raises(UserError, match=r"holds checkpoints of another sft run \(step 22\).*--resume"):
        run_sft(base)


def test_resume_with_other_threads_is_told(base, tmp_path, caplog):
    """Threads change the bits, but a run may move to another machine."""
    caplog.set_level("INFO", "rlhf")
    run = dataclasses.replace(base, output_dir=tmp_path / "run", threads=1)
    run_sft(run)
    run_sft(dataclasses.replace(run, threads=2, resume=True))
    assert "made with 1 threads per process and continues with 2" in caplog.text


def test_resume_with_another_setting_is_refused(base):
    changed = dataclasses.replace(base, resume=True, sft=dataclasses.replace(base.sft, learning_rate=5e-3))
    with pytest.raises(UserError, match=r"sft\.learning_rate was 0\.01, is 0\.005"):
        run_sft(changed)


def test_resume_compares_what_has_a_say_in_the_stage(base, tmp_path):
    """Not other stages' settings, nor the name of the data, but its content and that of the reward."""
    run = copy_run(base, tmp_path, "ppo")
    run_ppo(run)
    renamed = shutil.copy(base.prompt_data, tmp_path / "renamed.json")
    other = {
        "prompt_data": Path(renamed), "sft_data": None, "preference_data": None, "sft": SFTConfig(), "resume": True,
        "reward": RewardConfig(), "tokenizer": TokenizerConfig(),
    }  # fmt: skip
    run_ppo(dataclasses.replace(run, **other))
    statistics = run.output_dir / "reward" / "reward_statistics.json"
    (statistics.parent / "manifest.json").unlink()
    statistics.write_text(json.dumps({"mean": 1.0, "std": 2.0, "completions": 3}))
    with pytest.raises(
        UserError,
        match=r"cannot be continued, because the run has changed: ppo\.reward .*/reward: a reward model's weights",
    ):
        run_ppo(dataclasses.replace(run, resume=True))


def test_what_is_no_unfinished_run_of_the_stage_is_not_replaced(base, tmp_path):
    foreign = dataclasses.replace(base, output_dir=tmp_path / "foreign", resume=True)
    (foreign.output_dir / "sft").mkdir(parents=True)
    (foreign.output_dir / "sft" / "__init__.py").write_text("mine")
    with pytest.raises(UserError, match=r"foreign/sft: already exists, and would be replaced"):
        run_sft(foreign)
    assert (foreign.output_dir / "sft" / "__init__.py").read_text() == "mine"
    finished = copy_run(base, tmp_path, "reward")
    with pytest.raises(UserError, match=r"run/sft: already exists"):
        run_sft(finished)


def test_checkpoints_are_kept_as_configured(base):
    assert last_step(base.output_dir / "checkpoints" / "sft") == 22
    names = sorted(path.name for path in (base.output_dir / "checkpoints" / "sft").iterdir())
    assert names == ["step-000020", "step-000022"]
    assert load_checkpoint(base.output_dir / "checkpoints" / "sft").facts["version"] == 22


def test_sft_learns(base):
    losses = [line["loss/sft"] for line in metrics_of(base, "sft")]
    assert losses[-1] < 0.7 * losses[0]
    evaluations = [line["eval/perplexity"] for line in metrics_of(base, "sft") if "eval/perplexity" in line]
    assert len(evaluations) == 4
    assert evaluations[-1] < evaluations[0]


def test_reward_model_learns_and_keeps_its_statistics(base):
    last = metrics_of(base, "reward")[-1]
    names = ("accuracy", "margin", "min", "mean", "max", "length_correlation")
    assert {f"{part}/reward/{name}" for part in ("eval", "train") for name in names} <= last.keys()
    assert last["train/reward/accuracy"] > 0.6
    statistics = load_reward_model(base.output_dir / "reward").statistics
    assert statistics.completions == 114
    assert statistics.std > 0


FIELD_NAMES = {
    "objective/kl", "objective/kl_coef", "objective/entropy", "objective/scores", "objective/rlhf_reward",
    "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg",
    "val/ratio", "val/clipfrac_avg", "response_length/mean", "timing_s/generate", "timing_s/score", "timing_s/update",
    "timing_s/step", "perf/tokens_per_s", "lr",
}  # fmt: skip


def test_ppo_writes_the_fields_metrics_and_samples(base, tmp_path):
    run = copy_run(base, tmp_path, "ppo")
    run_ppo(run)
    lines = [json.loads(line) for line in (run.output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:-1]:
        assert line.keys() >= FIELD_NAMES
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] + line["objective/non_score_reward"], abs=1e-5
        )
        assert line["objective/non_score_reward"] == pytest.approx(
            -line["objective/kl_coef"] * line["objective/kl"], abs=1e-6
        )
    samples = [json.loads(line) for line in (run.output_dir / "logs" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 8
    assert samples[0].keys() >= {"prompt", "completion", "score", "kl", "tokens", "ended", "policy_version", "step"}
    assert [sample["policy_version"] for sample in samples[::8]] == [0, 4, 8, 12, 16, 20]
    by_step = [sum(s["score"] for s in samples[8 * n : 8 * n + 8]) / 8 for n in range(6)]
    assert by_step == pytest.approx([line["objective/scores"] for line in lines[1:-1]], abs=1e-5)
    for sample in samples:
        tokens = sample["per_token"]
        assert "".join(tokens.pop("pieces")) == sample["completion"]
        assert {len(values) for values in tokens.values()} == {sample["tokens"]}
        change = sum(tokens["log_probs"]) - sum(tokens["ref_log_probs"])
        assert change == pytest.approx(sample["kl"], abs=1e-4 * sample["tokens"] + 1e-6)  # k1, each rounded to 4 digits
    advantages = [value for sample in samples[:8] for value in sample["per_token"]["advantages"]]
    assert sum(advantages) == pytest.approx(0, abs=1e-2)  # whitened over the batch's tokens


def test_as_many_samples_are_logged_as_asked_for(base, tmp_path):
    log = LogConfig(tensorboard=False, samples=3, token_samples=1)
    run = copy_run(base, tmp_path, "ppo", log=log, ppo=dataclasses.replace(base.ppo, num_iterations=2))
    run_ppo(run)
    samples = [json.loads(line) for line in (run.output_dir / "logs" / "samples.jsonl").read_text().splitlines()]
    assert ["per_token" in sample for sample in samples] == [True, False, False] * 2


@pytest.mark.parametrize(("stage", "name"), [("sft", "loss/sft"), ("reward", "loss/reward"), ("ppo", None)])
def test_a_rising_training_loss_ends_a_supervised_stage(base, tmp_path, monkeypatch, stage, name):
    watched = watched_losses(monkeypatch)
    run = copy_run(base, tmp_path, stage, ppo=dataclasses.replace(base.ppo, num_iterations=1))
    RUNS[stage](run)
    assert watched == {name}
    assert name is None or name in metrics_of(run, stage)[0]


def test_no_evaluation_and_no_first_step_is_missing_from_a_sparse_log(base, tmp_path):
    run = dataclasses.replace(base, output_dir=tmp_path / "run", log=LogConfig(tensorboard=False, every=10))
    run_sft(run)
    lines, every = metrics_of(run, "sft"), metrics_of(base, "sft")
    assert [line["step"] for line in lines[:4]] == [1, 7, 10, 14]
    evaluated = [line for line in every if "eval/loss" in line]
    assert [line for line in lines if "eval/loss" in line] == evaluated


def test_the_perplexity_is_that_of_completions_whatever_is_trained_on(base, tmp_path):
    found = []
    for loss_on in ("completion", "all"):
        settings = dataclasses.replace(base.sft, loss_on=loss_on, learning_rate=1e-12, max_steps=2)
        run = dataclasses.replace(base, output_dir=tmp_path / loss_on, sft=settings)
        run_sft(run)
        found.append(metrics_of(run, "sft"))
    assert found[0][-1]["eval/perplexity"] == pytest.approx(found[1][-1]["eval/perplexity"], rel=1e-5)
    assert found[0][0]["loss/sft"] != pytest.approx(found[1][0]["loss/sft"], rel=1e-5)


def test_a_report_is_written_however_a_stage_ends_and_fails_none(base, tmp_path, caplog):
    caplog.set_level("INFO", "rlhf")
    run = dataclasses.replace(base, output_dir=tmp_path / "whole")
    with open_training() as training:
        run_sft(run, *training)
    assert (run.output_dir / "report" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "report.html" in caplog.text
    assert '"event":"verdict"' in (run.output_dir / "report" / "report.html").read_text()

    stopped = dataclasses.replace(base, output_dir=tmp_path / "stopped")
    interrupt_after(stopped, "sft", 3)
    with open_training() as training, pytest.raises(Interrupted):
        run_sft(stopped, *training)
    assert '"event":"interrupted"' in (stopped.output_dir / "report" / "report.html").read_text()

    blocked = dataclasses.replace(base, output_dir=tmp_path / "blocked")
    blocked.output_dir.mkdir()
    (blocked.output_dir / "report").write_text("a file where the folder should be")
    with open_training() as training:
        run_sft(blocked, *training)
    assert "report.html: not written" in caplog.text
    assert (blocked.output_dir / "sft" / "model.safetensors").is_file()


def test_invariant_12_learning_rate_0_leaves_parameters_and_kl_unchanged(base, tmp_path):
    run = copy_run(base, tmp_path, "ppo", ppo=dataclasses.replace(base.ppo, learning_rate=0.0))
    run_ppo(run)
    before, after = (load_language_model(run.output_dir / name).params for name in ("sft", "policy"))
    assert all(
        torch.equal(a, b) for a, b in zip(named_leaves(before).values(), named_leaves(after).values(), strict=True)
    )
    for line in metrics_of(run, "ppo"):
        assert line["objective/kl"] == pytest.approx(0.0, abs=1e-4)
        assert line["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert line["policy/clipfrac_avg"] == 0.0


OPTIONS = {
    "shared critic": {"critic": "shared"},
    "moving reference": {"ref_ema": 0.5},
    "adaptive KL": {"kl_adaptive": True, "kl_target": 0.01, "kl_horizon": 100},
    "k3 in the loss": {"kl_in_loss": True, "kl_estimator": "k3"},
    "exact in the loss": {"kl_in_loss": True, "kl_estimator": "exact"},
    "k2 in the reward": {"kl_estimator": "k2"},
    "whitened rewards": {"whiten_rewards": True, "whiten_advantages": False},
    "two samples": {"samples_per_prompt": 2, "top_k": 50, "top_p": 0.9, "temperature": 0.8},
    "no stop": {"stop_at_eos": False, "missing_eos_penalty": 1.0},
    "dual clip, entropy": {"dual_clip": 3.0, "entropy_coef": 0.01, "min_new_tokens": 3},
    "recomputed": {"recompute_log_probs": True, "critic": "shared"},
    "bootstrap of a value head": {"bootstrap_truncated": True, "critic": "shared"},
    "unnormalised": {"normalize_reward": False, "reward_clip": 0.5, "missing_eos_penalty": 1.0},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_ppo_options_run_and_differ_from_the_default(base, tmp_path, option):
    default = copy_run(base, tmp_path / "a", "ppo", ppo=dataclasses.replace(base.ppo, num_iterations=2))
    changed = copy_run(base, tmp_path / "b", "ppo", ppo=dataclasses.replace(default.ppo, **OPTIONS[option]))
    run_ppo(default)
    run_ppo(changed)
    assert metrics_of(default, "ppo")[-1] != metrics_of(changed, "ppo")[-1]
    lines = metrics_of(changed, "ppo")
    if option == "adaptive KL":
        factor = lines[1]["objective/kl_coef"] / lines[0]["objective/kl_coef"]
        error = min(max(lines[0]["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        assert factor == pytest.approx(1 + error * 8 / 100)
    if option == "no stop":
        assert all(line["response_length/mean"] == 8 for line in lines)
        samples = (changed.output_dir / "logs" / "samples.jsonl").read_text().splitlines()
        scores = [json.loads(line)["score"] for line in samples]
        assert max(scores) > -1, "nothing is missing where nothing can end"
    if option == "unnormalised":
        samples = [
            json.loads(line) for line in (changed.output_dir / "logs" / "samples.jsonl").read_text().splitlines()
        ]
        for sample in samples:
            expected = min(max(sample["reward/reward"], -0.5), 0.5) - (not sample["ended"])
            assert sample["score"] == pytest.approx(expected, abs=1e-6)
    shared = changed.ppo.critic == "shared"
    assert (changed.output_dir / "policy" / "value_head.safetensors").is_file() == shared
    assert (changed.output_dir / "policy" / "critic").is_dir() == (not shared)


def test_ppo_goes_on_from_the_critics_value_only_where_a_completion_was_cut(base, tmp_path, monkeypatch):
    seen = []

    def watched(ppo, rollout):
        scored = score_rollout(ppo, rollout)
        seen.append((ppo.settings.bootstrap_truncated, rollout.completions.ended, scored.bootstrap_values))
        return scored

    monkeypatch.setattr("rlhf.train.ppo.score_rollout", watched)
    for on in (False, True):
        settings = dataclasses.replace(base.ppo, num_iterations=1, batch_size=32, bootstrap_truncated=on)
        run_ppo(copy_run(base, tmp_path / str(on), "ppo", ppo=settings))
    for on, ended, values in seen:
        assert 0 < ended.sum() < 32
        assert torch.equal(values != 0, ~ended if on else torch.zeros_like(ended))


def test_ppo_stops_an_iterations_updates_at_the_target_kl(base, tmp_path):
    run = copy_run(base, tmp_path, "ppo", ppo=dataclasses.replace(base.ppo, target_kl=1e-9, num_iterations=2))
    run_ppo(run)
    updates = [line["policy/updates"] for line in metrics_of(run, "ppo")]
    assert updates == [1, 1], "the first minibatch has KL 0; the second exceeds the target and is not applied"


def test_ppo_critic_warmup_moves_the_value_function_alone(base, tmp_path):
    warm = dataclasses.replace(base.ppo, num_iterations=7, critic_warmup=6, critic="separate")
    run = copy_run(base, tmp_path, "ppo", ppo=warm, checkpoint=CheckpointConfig(every=6, keep=2))
    run_ppo(run)
    checkpoints = run.output_dir / "checkpoints" / "ppo"
    before = named_leaves(load_language_model(run.output_dir / "sft").params)
    last = load_checkpoint(checkpoints).tensors
    shutil.rmtree(checkpoints / "step-000007")
    warmed = load_checkpoint(checkpoints).tensors
    assert all(torch.equal(leaf, warmed[f"params.policy.{name}"]) for name, leaf in before.items())
    assert not any(torch.equal(leaf, last[f"params.policy.{name}"]) for name, leaf in before.items())
    losses = [line["loss/value_avg"] for line in metrics_of(run, "ppo")][:6]
    assert losses[-1] < losses[0]


def test_ppo_learns_from_a_python_function_with_columns(base, tmp_path):
    """The reward asks for the customer's item, which only the prompt file's column names."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def brevity(completions, **kwargs):\n    return [-len(text) / 10 for text in completions]\n"
        "def polite(prompts, completions, item):\n"
        "    assert all(i in p for i, p in zip(item, prompts))\n"
        "    return [float('sorry' in text) for text in completions]\n"
    )
    sources = (f"{judge}:brevity", f"0.5*{judge}:polite")
    settings = dataclasses.replace(
        base.ppo, reward=sources, num_iterations=15, batch_size=16, max_new_tokens=16, kl_coef=0.01
    )
    run = copy_run(base, tmp_path, "ppo", ppo=settings)
    run_ppo(run)
    lines = metrics_of(run, "ppo")
    assert {"reward/brevity", "reward/polite"} <= lines[0].keys()
    scores = [line["objective/scores"] for line in lines]
    assert scores[0] == pytest.approx(lines[0]["reward/brevity"] + 0.5 * lines[0]["reward/polite"], abs=1e-5)
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5


def test_a_source_of_weight_0_is_logged_as_gold_and_changes_no_bit(base, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def gold(prompts, completions):\n    return [float(len(text)) for text in completions]\n")
    settings = dataclasses.replace(base.ppo, num_iterations=2)
    plain = copy_run(base, tmp_path / "a", "ppo", ppo=settings)
    sources = (str(plain.output_dir / "reward"), f"0*{judge}:gold")
    watched = copy_run(base, tmp_path / "b", "ppo", ppo=dataclasses.replace(settings, reward=sources))
    run_ppo(plain)
    run_ppo(watched)
    assert weights_of(plain, "ppo") == weights_of(watched, "ppo")
    lines = metrics_of(watched, "ppo")
    samples = [json.loads(line) for line in (watched.output_dir / "logs" / "samples.jsonl").read_text().splitlines()]
    assert all(sample["gold/gold"] == len(sample["completion"]) for sample in samples)
    first = [sample["gold/gold"] for sample in samples if sample["step"] == 1]
    assert lines[0].pop("gold/gold") == pytest.approx(sum(first) / len(first))
    assert lines[0] == metrics_of(plain, "ppo")[0]
    assert all(line["val/ratio_first"] == pytest.approx(1.0, abs=1e-5) for line in lines)
    assert lines[-1]["val/ratio"] != lines[-1]["val/ratio_first"]


def judged_by(base, folder, *body: str) -> tuple[PipelineRun, Path]:
    """(a PPO run, its reward function's file): the function counts its `calls` and goes on with `body`."""
    judge = folder / "judge.py"
    head = "calls = []\ndef judge(completions, **kwargs):\n    calls.append(1)\n"
    judge.write_text(head + "".join(f"    {line}\n" for line in body))
    return copy_run(base, folder, "ppo", ppo=dataclasses.replace(base.ppo, reward=(f"{judge}:judge",))), judge


def test_a_run_says_at_its_end_what_is_wrong(base, tmp_path, caplog):
    caplog.set_level("INFO", "rlhf")
    run, _ = judged_by(base, tmp_path, "return [1.0 for _ in completions]")
    with open_training() as training:
        run_ppo(run, *training)
    problems = [(record.stage, record.message) for record in caplog.records if "PROBLEM" in record.message]
    assert any(stage == "ppo" and text.startswith("PROBLEM constant-rewards: ") for stage, text in problems)
    assert {stage for stage, _ in problems} == {"ppo"}


def test_a_reward_that_is_not_finite_is_refused_and_everything_saved(base, tmp_path):
    run, judge = judged_by(base, tmp_path, "return [float('nan') if len(calls) == 3 else 0.0 for _ in completions]")
    with pytest.raises(NonFiniteError, match=r"ppo iteration 3: reward judge is nan for the completion") as caught:
        run_ppo(run)
    assert caught.value.exit_code == 3
    assert last_step(run.output_dir / "checkpoints" / "ppo") == 2, "the state before the refused iteration"
    assert (run.output_dir / "nonfinite" / "ppo-step-000003" / "manifest.json").is_file()
    judge.write_text("def judge(completions, **kwargs):\n    return [0.0 for _ in completions]\n")
    run_ppo(dataclasses.replace(run, resume=True))
    assert len(metrics_of(run, "ppo")) == 6


def test_a_reward_function_that_fails_costs_nothing_since_the_last_iteration(base, tmp_path):
    fails = "if len(calls) == 6: raise ConnectionError('down')"
    run, _ = judged_by(base, tmp_path, fails, "return [0.0 for _ in completions]")
    with pytest.raises(UserError, match=r"down.*ppo iteration 5 is saved; continue with --resume"):
        run_ppo(run)
    assert last_step(run.output_dir / "checkpoints" / "ppo") == 5
    (log,) = read_logs([run.output_dir / "logs"])
    assert log.progress("ppo").state == "failed"
    run_ppo(dataclasses.replace(run, resume=True))
    assert len(metrics_of(run, "ppo")) == 6


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_model_that_the_last_update_ruined_is_not_written(base, tmp_path, stage):
    settings = dataclasses.replace(
        getattr(base, stage), learning_rate=1e30, warmup_fraction=0.0, max_steps=1, max_grad_norm=float("inf")
    )
    run = copy_run(base, tmp_path, stage, **{stage: settings})
    with pytest.raises(NonFiniteError, match=rf"{stage}: the trained model.*not finite.*was not written"):
        RUNS[stage](run)
    assert not (run.output_dir / stage).exists()


def test_a_policy_that_has_diverged_ends_in_the_same_way(base, tmp_path):
    """Its last update was finite; what it then draws from is not."""
    ppo = dataclasses.replace(base.ppo, learning_rate=1e30, num_epochs=1, minibatch_size=base.ppo.batch_size)
    run = copy_run(base, tmp_path, "ppo", ppo=ppo)
    with pytest.raises(NonFiniteError, match=r"ppo iteration 2: a log-prob is not finite for the completion"):
        run_ppo(run)
    assert last_step(run.output_dir / "checkpoints" / "ppo") == 1
    assert (run.output_dir / "nonfinite" / "ppo-step-000002" / "manifest.json").is_file()


def test_a_gold_score_that_is_not_finite_ends_the_run_too(base, tmp_path):
    """A weight of 0 keeps a model out of the reward; what is measured by it has to be a number all the same."""
    run = copy_run(base, tmp_path, "ppo")
    gold = load_reward_model(run.output_dir / "reward")
    params = gold.params | {"head": tree_map(lambda leaf: torch.full_like(leaf, 3e38), gold.params["head"])}
    save_reward_model(tmp_path / "gold", gold._replace(params=params), facts={})
    ppo = dataclasses.replace(base.ppo, reward=(str(run.output_dir / "reward"), f"0*{tmp_path}/gold"))
    with pytest.raises(NonFiniteError, match=r"ppo iteration 1: a score \(gold/gold\) is not finite for the"):
        run_ppo(dataclasses.replace(run, ppo=ppo))


def test_a_loss_that_is_not_finite_is_refused_and_everything_saved(base, tmp_path):
    settings = dataclasses.replace(base.sft, learning_rate=1e30, warmup_fraction=0.0, max_grad_norm=float("inf"))
    run = copy_run(base, tmp_path, "sft", sft=settings)
    with pytest.raises(NonFiniteError, match=r"sft step 2: main: loss nan.*the update was refused"):
        run_sft(run)
    checkpoint = load_checkpoint(run.output_dir / "checkpoints" / "sft")
    assert checkpoint.step == 1
    folder = run.output_dir / "nonfinite" / "sft-step-000002"
    assert (folder / "batch.safetensors").is_file()
    assert not (run.output_dir / "sft").exists()
    (folder / "notes.txt").write_text("the user's own\n")
    with pytest.raises(NonFiniteError, match=r"sft step 2: main: loss nan.*notes\.txt: is not part of what was saved"):
        run_sft(dataclasses.replace(run, resume=True))
    assert (folder / "notes.txt").read_text() == "the user's own\n"


def test_pipeline_starts_at_a_stage(base, tmp_path):
    run = copy_run(base, tmp_path, "ppo", start_at="ppo")
    results = run_stages(run)
    assert list(results) == ["ppo"]
    assert results["ppo"].model == run.output_dir / "policy"


def test_pipeline_resumes_where_it_was_interrupted(base, tmp_path):
    whole, stopped = (dataclasses.replace(base, output_dir=tmp_path / name / "run") for name in ("whole", "stopped"))
    run_stages(whole)
    interrupt_after(stopped, "reward", 3)
    with stop_on_signal() as stop, pytest.raises(Interrupted):
        run_stages(stopped, stop=stop)
    run_stages(dataclasses.replace(stopped, resume=True))
    for stage in RUNS:
        assert weights_of(whole, stage) == weights_of(stopped, stage)
        assert metrics_of(whole, stage) == metrics_of(stopped, stage)


@pytest.mark.parametrize("named", [False, True])
def test_a_bare_ppo_run_trains_what_it_needs_on_the_embedded_example(base, tmp_path, monkeypatch, named):
    """Also the run's own reward model where a gold score stands beside it."""
    monkeypatch.setattr("rlhf.train.stage_inputs.write_embedded", lambda folder: write_embedded(folder, size=60))
    (tmp_path / "gold.py").write_text(
        "def long(prompts, completions, item): return [float(len(c)) for c in completions]"
    )
    reward = (str(tmp_path / "run" / "reward"), f"0*{tmp_path}/gold.py:long") if named else ()
    bare = dataclasses.replace(
        base, output_dir=tmp_path / "run", sft_data=None, preference_data=None, prompt_data=None,
        ppo=dataclasses.replace(base.ppo, num_iterations=1, reward=reward),
    )  # fmt: skip
    assert pipeline.run(narrow(bare, PPORun), base=bare).model.is_dir()
    assert (bare.output_dir / "sft").is_dir()
    assert (bare.output_dir / "reward").is_dir()
    assert ("gold/long" in metrics_of(bare, "ppo")[0]) == named


def test_record_order_is_a_permutation_per_epoch(key):
    order = [record for first in range(0, 21, 3) for record in record_order(key, 7, first, 3)]
    epochs = [order[n : n + 7] for n in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order == record_order(key, 7, 0, 21)


def test_what_goes_wrong_after_the_last_step_is_in_the_log(tmp_path, monkeypatch):
    class Executor:
        def faults(self):
            return [Fault("worker 1", 2.5, False)]

    opened = contextlib.nullcontext(Executor())
    monkeypatch.setattr("rlhf.distributed.compute_context.open_executor", lambda *args, **options: opened)
    with open_run(PipelineRun(output_dir=tmp_path), STAGES["sft"]) as run:
        run.open_executor(None, None)
    (line,) = map(json.loads, (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines())
    assert {name: line[name] for name in ("stage", "event", "what", "recovery_s", "final")} == {
        "stage": "sft", "event": "fault", "what": "worker 1", "recovery_s": 2.5, "final": False,
    }  # fmt: skip
