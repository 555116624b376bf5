"""The health panel: named checks over a run's log, each with its evidence, the likely cause and what to change."""

from collections.abc import Callable
from typing import NamedTuple

from rlhf.metrics import METRICS, describe, is_registered
from rlhf.monitor import diagnostics, event_diagnostics, sample_diagnostics
from rlhf.monitor.diagnostics import Reading, Unknown
from rlhf.monitor.log import LogReader
from rlhf.monitor.thresholds import LEVELS, Level
from rlhf.stages import STAGES


class Finding(NamedTuple):
    """The result of one check in one stage."""

    check: str
    """Name of the check, such as `kl-explosion`."""
    level: Level
    stage: str
    summary: str
    """Result in one line."""
    evidence: str
    """Figures that the result is based on."""
    cause: str
    """Most common cause of the problem."""
    advice: str
    """Change to make, in terms of command-line flags."""
    steps: tuple[int, int] | None
    """First and last step of the evidence; None if it has no steps."""


class Check(NamedTuple):
    """A check, with the cause and the advice that are shown if it does not pass.

    A check judges the metrics whose `checks` name it, in every stage that logs one of them. A check that no metric
    names judges completions or events.
    """

    name: str
    measure: Callable[..., Reading]
    """Function (log, stage, *(judged metric, if any), *beside) -> `Reading`."""
    cause: str
    advice: str
    stages: tuple[str, ...] = ("ppo",)
    """Stages in which the check applies even if the log has no such metric."""
    beside: tuple[str, ...] = ()
    """Metrics that the check reads in addition to the judged one."""


_ALL = tuple(STAGES)
"""All built-in stages. A check of a metric also applies to every other stage that logs the metric."""

CHECKS = (
    Check(
        "negative-kl",
        diagnostics.negative_kl,
        "completions are drawn from another distribution than the log-probs are of",
        "sample from the whole distribution: --ppo.top-k 0 --ppo.top-p 1 --ppo.min-new-tokens 0; otherwise the "
        "policy learns to collect reward for negative KL",
    ),
    Check(
        "kl-explosion",
        diagnostics.kl_explosion,
        "steps too large, or a penalty too small for these rewards, so that the policy leaves the reference behind",
        "raise --ppo.kl-coef, or bound the KL with --ppo.kl-budget 5; lower --ppo.learning-rate; end iterations early "
        "with --ppo.target-kl 0.1",
        beside=("response_length/mean",),
    ),
    Check(
        "first-ratio",
        diagnostics.first_ratio,
        "the update computes other log-probs than sampling did: another temperature or rounding, as in bf16",
        "set --ppo.recompute-log-probs True, or --precision fp32; if it stays, it is a defect: please report it",
        beside=("val/ratio", "policy/updates"),
    ),
    Check(
        "clip-fraction",
        diagnostics.clip_fraction,
        "each iteration's updates carry the policy too far, so that most of the gradient is cut off",
        "lower --ppo.learning-rate or --ppo.num-epochs, or raise --ppo.batch-size",
    ),
    Check(
        "approx-kl",
        diagnostics.approx_kl,
        "each iteration's updates carry the policy too far from the one that sampled",
        "lower --ppo.learning-rate or --ppo.num-epochs, or stop early with --ppo.target-kl 0.1",
    ),
    Check(
        "entropy-collapse",
        diagnostics.entropy_collapse,
        "the policy has settled on a few completions and tries nothing else",
        "raise --ppo.kl-coef or --ppo.entropy-coef, lower --ppo.learning-rate, or stop if the completions are good",
    ),
    Check(
        "length-drift",
        diagnostics.length_drift,
        "the reward prefers longer, or shorter, completions whatever they say",
        "look at the samples; correct the reward model's data for length, add a reward that acts against it "
        "(--ppo.reward outputs/reward '0.1*my_rewards:brevity'), or raise --ppo.kl-coef",
    ),
    Check(
        "over-optimisation",
        diagnostics.over_optimisation,
        "the policy exploits errors of the reward model, which it now knows better than what people want",
        "take a checkpoint from before, raise --ppo.kl-coef, or train the reward model on samples of this policy",
        beside=("objective/scores",),
    ),
    Check(
        "value-function",
        diagnostics.value_function,
        "the value function lags behind the policy, so that advantages are noise",
        "let it learn first with --ppo.critic-warmup 5, raise --ppo.value-coef or --ppo.value-clip-eps, or use the "
        "other --ppo.critic; where the scores of the reward model hardly differ (a small std), take shared",
    ),
    Check(
        "constant-rewards",
        sample_diagnostics.constant_rewards,
        "the reward does not tell these completions apart: a bug in it, a clip that cuts all, or a task that is solved",
        "try the reward function on a few completions by hand; raise --ppo.reward-clip; take harder prompts",
    ),
    Check(
        "equal-groups",
        diagnostics.equal_groups,
        "the prompts are too easy or too hard for this policy, or the reward has few values: all completions of a "
        "prompt get the same score, and an estimator that compares them has no gradient",
        "take prompts of which the policy solves some; raise --ppo.samples-per-prompt or --ppo.temperature; take a "
        "reward with more values; with --ppo.drop-equal-groups the updates are made of the other groups",
        stages=(),
    ),
    Check(
        "repeated-text",
        sample_diagnostics.repeated_text,
        "the reward pays for repetition or for one answer to everything, or the policy has collapsed",
        "look at the samples; raise --ppo.kl-coef, lower --ppo.learning-rate, and go back to an earlier checkpoint",
    ),
    Check(
        "unfinished",
        diagnostics.unfinished,
        "completions are cut off at the limit: the limit is low, or nothing rewards ending",
        "raise --ppo.max-new-tokens or --ppo.missing-eos-penalty 1; see that demonstrations end (they do, unless "
        "the context cuts them off); with --ppo.no-stop-at-eos this is expected",
    ),
    Check(
        "reward-model-chance",
        diagnostics.reward_model_chance,
        "the reward model has learnt nothing that holds for new pairs: labels at random, too little data or training, "
        "or a trunk that was not fine-tuned",
        "check that chosen and rejected are not swapped; train longer (--reward.epochs), try other rates "
        "(--reward.learning-rate), start from a better model (--reward.model-path)",
        ("reward",),
        beside=("train/reward/accuracy", "eval/reward/pairs"),
    ),
    Check(
        "reward-model-length",
        diagnostics.reward_model_length,
        "in the preference pairs the longer completion mostly wins, or loses, and the model counts tokens",
        "add pairs in which the shorter one wins to --preference-data; compare with always choosing the longer",
        ("reward",),
    ),
    Check(
        "overfitting",
        diagnostics.overfitting,
        "the model learns the records by heart",
        "train shorter (--sft.epochs, --dpo.epochs, or their max-steps), or with a lower learning rate; SFT also with "
        "--sft.dropout 0.1",
        ("sft",),
    ),
    Check(
        "throughput",
        diagnostics.throughput,
        "something else uses the machine, completions have become longer, or memory is short",
        "look at timing_s/* for the phase that slowed down, and at the machine (top, nvidia-smi)",
        _ALL,
    ),
    Check(
        "recoveries",
        event_diagnostics.recoveries,
        "worker processes were killed (often for memory), hung, or lost their machine",
        "look at the machine's memory; lower --dist.num-workers or the stage's micro-batch-size",
        _ALL,
    ),
    Check(
        "not-finite",
        event_diagnostics.not_finite,
        "a loss, gradient, reward or value overflowed",
        "lower the learning rate, or use --precision fp32; the refused batch is in OUTPUT_DIR/nonfinite",
        _ALL,
    ),
)


def findings(reader: LogReader) -> list[Finding]:
    """Return the findings of every stage so far; problems first, then by stage, in the order of `CHECKS`."""
    results = [
        _finding(check, reader, stage) for stage in reader.stages for check in CHECKS if _applies(check, reader, stage)
    ]
    return sorted(results, key=lambda finding: -LEVELS.index(finding.level))


def _applies(check: Check, reader: LogReader, stage: str) -> bool:
    known = check.stages is _ALL and any(map(is_registered, reader.names(stage)))
    return known or stage in check.stages or bool(_judged(check, reader, stage))


def _judged(check: Check, reader: LogReader, stage: str) -> list[str]:
    """Return the metrics of the stage that the check judges."""
    return [name for name in reader.names(stage) if check.name in describe(name).checks]


def _finding(check: Check, reader: LogReader, stage: str) -> Finding:
    """Return the most serious finding of the check in the metrics that it judges."""
    named = [key for key, metric in METRICS.items() if check.name in metric.checks]
    judged = _judged(check, reader, stage) or named[:1]
    readings = [_reading(check, reader, stage, name) for name in judged] or [_reading(check, reader, stage)]
    level, summary, evidence, steps = max(readings, key=lambda reading: LEVELS.index(reading.level))
    return Finding(check.name, level, stage, summary, evidence, check.cause, check.advice, steps)


def _reading(check: Check, reader: LogReader, stage: str, *metric: str) -> Reading:
    try:
        return check.measure(reader, stage, *metric, *check.beside)
    except Unknown as error:
        return Reading("unknown", str(error), "")
