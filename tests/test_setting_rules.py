"""Every setting of every program has an effect wherever it may be set, or is refused or told where it has none."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from rlhf.cli import monitor
from rlhf.cli.arguments import join_flags
from rlhf.cli.train import parse

from rlhf.config import PipelineRun, PPORun, RewardRun, SFTRun
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import COLUMN_RULES, NO_POLICY_RULES, POLICY_RULES, EvaluateConfig
from rlhf.generate.generate_config import GENERATE_RULES, GenerateConfig
from rlhf.io.presets import load_config, narrow
from rlhf.ranges import flat_fields
from rlhf.setting_rules import COMPUTE_RULES, DATA_RULES, Rule, check_rules
from rlhf.stages import STAGES, check_settings

OPTIMIZER = {
    "learning_rate": "every step",
    "schedule": "every step",
    "weight_decay": "every step",
    "adam_b1": "every step",
    "adam_b2": "every step",
    "adam_eps": "every step",
    "max_grad_norm": "every step",
    "micro_batch_size": "rows computed at once",
    "gradient_checkpointing": "the backward pass; --compile on is refused beside it",
}
SUPERVISED = OPTIMIZER | {
    "max_steps": "the number of steps",
    "batch_size": "every step",
    "max_length": "tokens of a record",
    "warmup_fraction": "every step; train_supervised tells where it is less than a step",
    "model_path": "where training starts",
}
COMPUTE = {
    "dist_config": "read before the flags",
    "precision": "every pass",
    "cache_dir": "where tokenised data are",
}
RUN = COMPUTE | {
    "config": "read before the flags",
    "data.template": "every conversation, and what is saved with the model",
    "output_dir": "where everything goes",
    "seed": "all randomness",
    "resume": "the start; without a checkpoint that is told",
    "compile": "every step; on is refused where it cannot be",
    "model.n_layer": "the shape, which a model folder must agree with",
    "model.n_head": "the shape, which a model folder must agree with",
    "model.n_kv_head": "the shape, which a model folder must agree with",
    "model.n_embd": "the shape, which a model folder must agree with",
    "model.n_inner": "the shape, which a model folder must agree with",
    "model.n_positions": "the shape, which a model folder must agree with",
    "checkpoint.every": "when checkpoints are written",
    "checkpoint.keep": "how many are kept",
    "log.every": "lines of metrics.jsonl",
    "log.tensorboard": "event files",
    "log.sink": "called with every line",
}
ALWAYS: dict[type, dict[str, str]] = {
    PipelineRun: RUN
    | {f"sft.{name}": reason for name, reason in SUPERVISED.items()}
    | {f"reward.{name}": reason for name, reason in SUPERVISED.items()}
    | {f"ppo.{name}": reason for name, reason in OPTIMIZER.items()}
    | {
        "start_at": "the first stage",
        "sft_data": "what is learnt",
        "sft_val_data": "what is held out; refused without --sft-data",
        "preference_data": "what is learnt",
        "preference_val_data": "what is held out; refused without --preference-data",
        "prompt_data": "what is completed",
        "model.n_kv_head": "the shape; refused by families without",
        "model.n_inner": "the shape; refused by families without",
        "sft.loss_on": "the loss",
        "sft.dropout": "the loss",
        "reward.centre_coef": "the loss",
        "reward.use_margin": "the loss; refused without margins",
        "reward.eval_every": "training pairs are evaluated where none is held out",
        "ppo.model_path": "the start",
        "ppo.reward": "the scores",
        "ppo.combine": "the scores",
        "ppo.num_iterations": "the length",
        "ppo.batch_size": "every iteration",
        "ppo.samples_per_prompt": "every iteration",
        "ppo.num_epochs": "every iteration",
        "ppo.minibatch_size": "every update",
        "ppo.rollout_batch_size": "completions of a micro-batch",
        "ppo.max_new_tokens": "every completion",
        "ppo.temperature": "every log-prob",
        "ppo.top_k": "every draw",
        "ppo.stop_at_eos": "every completion",
        "ppo.reward_clip": "every score",
        "ppo.ref_ema": "the reference, of which the KL is logged at any coefficient",
        "ppo.entropy_coef": "every loss",
        "ppo.recompute_log_probs": "every rollout",
    },
    EvaluateConfig: COMPUTE
    | {
        "dist.num_workers": "where it is computed",
        "model_dir": "what is evaluated",
        "eval_type": "what is evaluated",
        "test_data": "on what",
        "train_data": "refused without a reward evaluation",
        "limit": "records read",
        "data.template": "every conversation; texts have none",
        "seed": "resampling",
        "output": "where it is written",
        "overwrite": "what is written over",
        "micro_batch_size": "rows computed at once",
    },
    GenerateConfig: {
        "model_dir": "what completes",
        "against": "what completes beside it",
        "prompt": "what is completed; refused beside --prompt-file",
        "prompt_file": "what is completed",
        "template": "every prompt",
        "data.template": "every conversation; texts have none",
        "output": "where completions go",
        "max_new_tokens": "every completion",
        "greedy": "every draw",
        "device": "every pass",
        "precision": "every pass",
        "threads": "every pass",
    },
    monitor.Monitor: {
        "log_dir": "what is read",
        **dict.fromkeys(("live", "serve", "report", "plot_type", "check", "compare"), "what is done; one at a time"),
    },
}
ALWAYS[PipelineRun] |= {"stop_early": "when a stage is ended", "strict": "when a pipeline is ended"}
RULES: dict[type, tuple[Rule, ...]] = {
    PipelineRun: (*COMPUTE_RULES, *DATA_RULES, *(rule for stage in STAGES.values() for rule in stage.rules)),
    EvaluateConfig: (*COMPUTE_RULES, *COLUMN_RULES, *NO_POLICY_RULES, *POLICY_RULES),
    GenerateConfig: GENERATE_RULES,
    monitor.Monitor: monitor.RULES,
}


@pytest.mark.parametrize("kind", ALWAYS, ids=lambda kind: kind.__name__)
def test_every_setting_has_an_effect_or_a_rule_that_says_when_it_has_none(kind):
    ruled = {name for rule in RULES[kind] for name in rule.names}
    fields = flat_fields(kind()).keys()
    assert ruled - fields == set()
    assert fields - ruled - ALWAYS[kind].keys() == set(), "add a rule, or the reason why it always has an effect"
    assert ALWAYS[kind].keys() - fields == set()
    assert ALWAYS[kind].keys() & ruled == set()


WHOLE_SHAPE = ["--model.preset", "tiny", "--model.n-layer", "1", "--model.n-head", "1", "--model.n-embd", "8"]
WHOLE_SHAPE += ["--model.n-positions", "9"]
WORKERS = ["--dist.num-workers", "2"]
REFUSED: dict[str, tuple[str, list[str], str]] = {
    "address": ("sft", ["--dist.address", "10.0.0.1:6379"], "has no effect without --dist.num-workers"),
    "servers": ("ppo", ["--dist.num-servers", "2"], "--dist.num-servers 2: has no effect without --dist.num-workers"),
    "gpus": ("reward", ["--dist.gpus-per-worker", "1"], "has no effect without --dist.num-workers"),
    "nccl": ("sft", [*WORKERS, "--dist.backend", "nccl"], "nccl needs --dist.gpus-per-worker 1"),
    "nccl on half a GPU": (
        "sft",
        [*WORKERS, "--dist.backend", "nccl", "--dist.gpus-per-worker", "0.5"],
        "nccl needs --dist.gpus-per-worker 1",
    ),
    "cuda without GPUs": ("sft", [*WORKERS, "--device", "cuda"], "without --dist.gpus-per-worker"),
    "cpu with GPUs": ("sft", [*WORKERS, "--device", "cpu", "--dist.gpus-per-worker", "1"], "drop one of the two"),
    "vocabulary of a folder": (
        "sft",
        ["--tokenizer.vocab-size", "999", "--sft.model-path", "m"],
        "--tokenizer.vocab-size 999: has no effect with --sft.model-path",
    ),
    "vocabulary of a tokenizer": (
        "pipeline",
        ["--tokenizer.vocab-size", "999", "--tokenizer.path", "m"],
        "has no effect with --tokenizer.path",
    ),
    "KL target": ("ppo", ["--ppo.kl-target", "3"], "--ppo.kl-target 3.0: has no effect without --ppo.kl-adaptive"),
    "KL horizon": ("ppo", ["--ppo.kl-horizon", "3"], "has no effect without --ppo.kl-adaptive"),
    "columns": ("ppo", ["--data.columns", "question"], "--data.columns: 'question' is not name=column, such as"),
    "column of no name": ("sft", ["--data.columns", "text=body"], "names are prompt, completion"),
    "adaptive from 0": ("ppo", ["--ppo.kl-adaptive", "--ppo.kl-coef", "0"], "--ppo.kl-adaptive: a --ppo.kl-coef of 0"),
}
TOLD: dict[str, tuple[str, list[str], str]] = {
    "time-out": ("sft", ["--dist.timeout-s", "7"], "--dist.timeout-s 7.0: has no effect without --dist.num-workers"),
    "threads": ("sft", [*WORKERS, "--threads", "2"], "--threads 2: has no effect on workers"),
    "many threads": ("sft", ["--threads", "1024"], "--threads 1024: more threads than this machine's"),
    "spread": ("sft", [*WORKERS, "--dist.placement", "spread"], "--dist.placement spread: has no effect without"),
    "no restarts": ("sft", [*WORKERS, "--dist.on-failure", "shrink", "--dist.max-restarts", "0"], "max-restarts 0"),
    "many workers": ("sft", ["--dist.num-workers", "9"], "--dist.num-workers 9: more workers than an update has"),
    "samples of SFT": ("sft", ["--log.samples", "3"], "--log.samples 3: has no effect outside of PPO"),
    "columns": ("sft", ["--data.columns", "prompt=question"], "--data.columns: has no effect on the embedded example"),
    "preset": ("sft", ["--model.preset", "gpt2", "--sft.model-path", "m"], "--model.preset gpt2: has no effect with"),
    "whole shape": ("sft", WHOLE_SHAPE, "the fields beside it"),
    "epochs of SFT": (
        "sft",
        ["--sft.epochs", "5", "--sft.max-steps", "9"],
        "--sft.epochs 5.0: training ends then or at --sft.max-steps 9, whichever is first",
    ),
    "epochs of the reward model": ("reward", ["--reward.epochs", "5", "--reward.max-steps", "9"], "at --reward.max-"),
    "epochs of DPO": ("dpo", ["--dpo.epochs", "5", "--dpo.max-steps", "9"], "at --dpo.max-steps 9, whichever is first"),
    "share": ("sft", ["--sft.val-fraction", "0.2", "--sft-val-data", "v"], "has no effect with --sft-val-data"),
    "evaluations": ("sft", ["--sft.eval-every", "5", "--sft.val-fraction", "0"], "without held-out records"),
    "tokenizer": ("reward", ["--tokenizer.vocab-size", "999", "--preference-data", "p"], "brings its own"),
    "token samples": ("ppo", ["--log.token-samples", "70"], "no more than the --log.samples completions"),
    "samples": ("ppo", ["--log.samples", "65"], "an iteration has no more completions"),
    "slots": ("ppo", ["--ppo.rollout-slots", "65"], "no more completions than --ppo.rollout-batch-size"),
    "shortest": ("ppo", ["--ppo.min-new-tokens", "3", "--ppo.no-stop-at-eos"], "has no effect with --ppo.no-stop-at"),
    "penalty": ("ppo", ["--ppo.missing-eos-penalty", "3", "--ppo.no-stop-at-eos"], "no completion is expected to end"),
    "nucleus of one": ("ppo", ["--ppo.top-k", "1", "--ppo.top-p", "0.5"], "--ppo.top-p 0.5: has no effect with"),
    "functions": ("ppo", ["--ppo.no-normalize-reward", "--ppo.reward", "a:b"], "has no effect on Python functions"),
    "estimator": ("ppo", ["--ppo.kl-estimator", "k3", "--ppo.kl-coef", "0"], "has no effect with --ppo.kl-coef 0"),
    "clip": (
        "ppo",
        ["--ppo.clip-eps", "0.1", "--ppo.num-epochs", "1", "--ppo.minibatch-size", "64"],
        "--ppo.clip-eps 0.1: has no effect with one update",
    ),
    "critic": ("ppo", ["--ppo.critic-warmup", "3", "--ppo.value-coef", "0"], "the value function does not learn"),
    "warm-up": ("ppo", ["--ppo.warmup-fraction", "0.0001"], "less than one of the run's updates"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_other_settings_is_refused_with_flag_and_remedy(case):
    stage, flags, message = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(message)):
        check_settings(parse([stage, *flags]), STAGES["sft" if stage == "pipeline" else stage])


@pytest.mark.parametrize("case", TOLD)
def test_what_is_idle_is_told_in_one_line(case):
    stage, flags, message = TOLD[case]
    (line,) = check_settings(parse([stage, *flags]), STAGES[stage])
    assert message in line
    assert line.startswith("--")


@pytest.mark.parametrize("flags", [["--model.preset", "pythia-70m"], ["--model.family", "llama"]])
def test_a_preset_of_another_family_has_an_effect_beside_the_sizes_of_gpt2(flags):
    assert check_settings(parse(["sft", *WHOLE_SHAPE, *flags]), STAGES["sft"]) == []


@pytest.mark.parametrize("kind", [SFTRun, RewardRun, PPORun, PipelineRun])
@pytest.mark.parametrize(
    "name", ["demo", "distributed", "model_config", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
)
def test_the_defaults_and_the_shipped_presets_are_neither_refused_nor_told(kind, name):
    for config in (kind(), narrow(load_config(name), kind)):
        for stage in STAGES.values():
            if hasattr(config, stage.name):
                assert check_settings(config, stage) == []


def test_what_all_stages_share_is_told_by_the_first():
    config = parse(["pipeline", "--dist.timeout-s", "7"])
    assert [len(check_settings(config, stage)) for stage in STAGES.values()] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "rules", "message"),
    [
        (EvaluateConfig(judge=("a:b",)), NO_POLICY_RULES, "--judge: completions are made only in the policy"),
        (monitor.Monitor(open_browser=False), monitor.RULES, "--no-open-browser: has no effect without --serve"),
        (monitor.Monitor(output_dir=Path("x"), check=True), monitor.RULES, "--output-dir x: has no effect without"),
    ],
)
def test_the_other_programs_refuse_what_has_no_effect(settings, rules, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check_rules(settings, rules)
    assert check_rules(type(settings)(), rules) == []


@pytest.mark.parametrize(
    ("settings", "rules", "message"),
    [
        (GenerateConfig(greedy=True, samples=3, top_p=0.5), GENERATE_RULES, "--top-p 0.5, --samples 3: has no effect"),
        (GenerateConfig(top_k=1, top_p=0.5), GENERATE_RULES, "--top-p 0.5: has no effect with --top-k 1"),
        (EvaluateConfig(samples=3), NO_POLICY_RULES, "--samples 3: completions are made only in the policy"),
        (EvaluateConfig(decoding=("greedy",), samples=3), POLICY_RULES, "--samples 3: has no effect with --decoding"),
    ],
)
def test_the_other_programs_tell_what_is_idle(settings, rules, message):
    (line,) = check_rules(settings, rules)
    assert line.startswith(message)
    assert check_rules(GenerateConfig(top_k=5, top_p=0.5, samples=2, seed=3), GENERATE_RULES) == []


LIST_FLAGS = [
    (kind, name)
    for kind in (PPORun, PipelineRun, EvaluateConfig, GenerateConfig, monitor.Monitor)
    for name, value in flat_fields(kind()).items()
    if isinstance(value, tuple)
]


@pytest.mark.parametrize(("kind", "name"), LIST_FLAGS, ids=lambda part: getattr(part, "__name__", part))
def test_the_values_of_a_repeated_list_flag_add_up(kind: type, name: str):
    flag, under = f"--{name.replace('_', '-')}", f"--{name}"
    for argv in (
        [flag, "a", flag, "b", flag, "c"],
        [flag, "a", "b", f"{flag}=c"],
        [f"{under}=a", "--threads", "1", flag, "b", "c"],
        [flag, "a", "b", "c"],
    ):
        words = join_flags(kind, argv)
        place = words.index(flag)
        assert words[place : place + 4] == [flag, "a", "b", "c"]
        assert words.count(flag) == 1


def test_there_are_list_flags_to_test():
    assert {name for _, name in LIST_FLAGS} == {
        "ppo.reward",
        "test_data",
        "judge",
        "best_of",
        "decoding",
        "prompt",
        "log_dir",
        "data.columns",
    }


def test_repeated_list_flags_replace_what_yaml_says(tmp_path):
    (tmp_path / "mine.yaml").write_text("ppo: {reward: [x, y]}")
    config: Any = parse(["ppo", "--ppo.reward", "a", "--config", str(tmp_path / "mine.yaml"), "--ppo.reward=b", "c"])
    assert config.ppo.reward == ("a", "b", "c")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1", "--seed", "2"], "--seed 1 and --seed 2"),
        (["--sft.epochs=1", "--sft.epochs", "2"], "--sft.epochs 1 and --sft.epochs 2"),
        (["--config", "demo", "--config=gpt2"], "--config demo and --config gpt2"),
        (["--dist-config", "distributed", "--dist_config", "x"], "--dist-config distributed and --dist-config x"),
        (["--resume", "--no-resume"], "--resume and --no-resume"),
        (["--log.no-tensorboard", "--log.tensorboard"], "--log.no-tensorboard and --log.tensorboard"),
    ],
)
def test_a_flag_of_one_value_given_twice_is_told(capsys, flags, message):
    words = join_flags(SFTRun, flags)
    assert capsys.readouterr().err == f"given twice: {message}; the last counts\n"
    assert words == message.partition(" and ")[2].split()


def test_the_same_value_twice_is_fine_and_values_may_begin_with_a_hyphen():
    assert parse(["sft", "--seed", "3", "--resume", "--seed=3", "--resume"]).seed == 3
    assert join_flags(GenerateConfig, ["--prompt=--x", "--prompt", "y"]) == ["--prompt=--x", "y"]
    with pytest.raises(UserError, match="--prompt: of several values only the first may begin with --"):
        join_flags(GenerateConfig, ["--prompt=x", "--prompt=--y"])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--sft.adam-eps", "1e-50", "adam_eps must be between 1.2e-38 and 3.4e+38, which float32 holds"),
        ("--sft.max-grad-norm", "1e-50", "max_grad_norm must be between 1.2e-38"),
        ("--sft.learning-rate", "1e300", "learning_rate must be 0 or between 1.2e-38 and 3.4e+38"),
        ("--sft.batch-size", "100000000", "batch_size must be at most 1048576"),
        ("--threads", "1099511627776", "threads must be at most 1024"),
        ("--dist.timeout-s", "0.001", "timeout_s must be at least 1"),
        ("--dist.heartbeat-s", "1e-9", "heartbeat_s must be at least 1"),
        ("--model.n-layer", "100000", "n_layer must be at most 1024"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_flag(flag, value, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'{flag} {value}: {message}')}.*, got {re.escape(value)}$"):
        parse(["sft", flag, value])


def test_every_number_of_every_program_has_an_upper_bound():
    for kind in (PipelineRun, EvaluateConfig, GenerateConfig, monitor.Monitor):
        for name, value in flat_fields(kind()).items():
            if isinstance(value, int) and not isinstance(value, bool):
                section: Any = kind()
                for part in name.split(".")[:-1]:
                    section = getattr(section, part)
                with pytest.raises(ValueError, match=" must be "):
                    dataclasses.replace(section, **{name.rpartition(".")[2]: 2**65})
