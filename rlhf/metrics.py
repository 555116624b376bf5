"""The table of metrics, which the log, the terminal, plots, the web page and evaluation tables share.

To add a metric, add a `Metric` to `METRICS`, or call `register` in the file of the stage that logs it. The metric then
has a label and a chart on the page and in the report, and a curve in the plot of that chart. It has a line in
`rlhf-monitor --live` if it has a `short` name, and a row in the table of `rlhf-evaluate`. The health checks named in
`checks` apply to it. A metric that is not registered is shown by its key.
"""

from collections.abc import Iterable
from dataclasses import replace

from rlhf.metric_record import Metric

__all__ = ["METRICS", "Metric", "describe", "in_order", "is_registered", "register"]

# fmt: off
_TABLE = (
    # Supervised fine-tuning
    Metric("loss/sft", "Loss, training", "nats per token", "down", "loss",
           "Cross-entropy on the demonstrations' completions.", "Falls, then levels off.",
           short="loss", low=0, headline=True),
    Metric("eval/loss", "Loss, held-out", "nats per token", "down", "loss",
           "Cross-entropy on records that are not trained on.",
           "Falls. Rising while the training loss falls: over-fitting.",
           short="held-out loss", row="loss, nats per token", low=0, checks=("overfitting",)),
    Metric("eval/perplexity", "Perplexity, held-out", "e to the loss", "down", "perplexity",
           "Effective number of tokens that the model chooses between, on average.", "Falls; 1 would be certainty.",
           row="perplexity", headline=True),
    Metric("sft/accuracy", "Accuracy, training", "share of tokens", "up", "accuracy",
           "Fraction of tokens that the model finds most likely.", "Rises.", short="accuracy", low=0, high=1),
    Metric("eval/accuracy", "Accuracy, held-out", "share of tokens", "up", "accuracy",
           "Accuracy on held-out records.", "Rises.", row="token accuracy", low=0, high=1, headline=True),
    # Reward model
    Metric("reward/accuracy", "Accuracy, this batch", "share of pairs", "up", "pair-accuracy",
           "Fraction of pairs whose chosen completion has the higher reward.", "Well above 0.5, which is chance.",
           short="accuracy", low=0, high=1),
    Metric("eval/reward/accuracy", "Accuracy, held-out", "share of pairs", "up", "pair-accuracy",
           "Accuracy on held-out pairs.", "Above 0.6. Annotators agree with each other on 0.7 to 0.8 of the pairs.",
           short="held-out acc.", row="accuracy", low=0, high=1, headline=True, checks=("reward-model-chance",)),
    Metric("train/reward/accuracy", "Accuracy, training records", "share of pairs", "up", "pair-accuracy",
           "Accuracy on training records.", "Slightly above the held-out accuracy. Far above it: over-fitting.",
           low=0, high=1),
    Metric("eval/baseline/longer", "Accuracy of the longer completion", "share of pairs",
           meaning="Accuracy of always choosing the longer completion.", row="  always the longer", low=0, high=1),
    Metric("eval/baseline/bag_of_words", "Accuracy of a bag of words", "share of pairs",
           meaning="Accuracy of a linear model that counts words.", row="  bag of words", low=0, high=1),
    Metric("eval/baseline/unigram", "Perplexity of token frequencies", "e to the loss",
           meaning="Perplexity of the model that knows only how often each token occurs.",
           good="Well above the model's own.", row="  of token frequencies alone", low=0),
    Metric("eval/reward/gain_over_longer", "Gain over the longer completion", "difference of shares", "up",
           meaning="Accuracy less that of always choosing the longer completion.", good="Well above 0.",
           row="  gain over the longer", signed=True),
    Metric("eval/reward/gain_over_bag_of_words", "Gain over a bag of words", "difference of shares", "up",
           meaning="Accuracy less that of a linear model that counts words.", good="Above 0.",
           row="  gain over bag of words", signed=True),
    Metric("reward/margin", "Margin, this batch", "reward units", "up", "margin",
           "Reward of the chosen minus the rejected completion.", "Rises above 0.", signed=True),
    Metric("eval/reward/margin", "Margin, held-out", "reward units", "up", "margin",
           "Margin on held-out pairs.", "Above 0.",
           short="held-out margin", row="margin, chosen - rejected", signed=True, headline=True),
    Metric("train/reward/margin", "Margin, training records", "reward units", "up", "margin",
           "Margin on training records.", "Above 0.", signed=True),
    Metric("loss/reward", "Loss", "nats per pair", "down", "reward-loss",
           "Minus log σ(margin). log 2 = 0.69 is chance.", "Falls below 0.69.",  # noqa: RUF001
           short="loss", row="loss, -log sigmoid(margin)", low=0, headline=True),
    Metric("eval/reward/min", "Lowest", "reward units", "none", "held-out-rewards",
           "The lowest reward given to a held-out completion."),
    Metric("eval/reward/mean", "Mean", "reward units", "none", "held-out-rewards",
           "The mean reward of held-out completions.", "Steady; centre_coef keeps it near 0.",
           row="mean reward", signed=True),
    Metric("eval/reward/max", "Highest", "reward units", "none", "held-out-rewards",
           "The highest reward given to a held-out completion.",
           "Well apart from the lowest: a model that cannot tell gives all the same."),
    Metric("train/reward/min", "Lowest", "reward units", "none", "training-rewards",
           "The lowest reward given to a completion that was trained on."),
    Metric("train/reward/mean", "Mean", "reward units", "none", "training-rewards",
           "The mean reward of completions that were trained on.", "Steady."),
    Metric("train/reward/max", "Highest", "reward units", "none", "training-rewards",
           "The highest reward given to a completion that was trained on.", "Well apart from the lowest."),
    Metric("eval/reward/calibration_error", "Expected calibration error", "difference of shares", "down",
           meaning="Mean distance of sigmoid(|margin|) from the share of pairs that are ordered rightly.",
           good="Near 0.", row="expected calibration error", low=0, high=1),
    Metric("eval/reward/length_correlation", "Reward with length, held-out", "correlation", "none",
           "length-correlation", "Correlation of the reward with the length of the completion.",
           "Near 0. Near 1 the model rewards length.", row="correlation with length", low=-1, high=1, signed=True,
           headline=True, checks=("reward-model-length",)),
    Metric("train/reward/length_correlation", "Reward with length, training", "correlation", "none",
           "length-correlation", "The same on records that were trained on.", "Near 0.", low=-1, high=1),
    Metric("eval/reward/pairs", "Held-out pairs", "pairs", meaning="Number of pairs that are held out.",
           good="Some hundreds: with 100, the accuracy of a coin is between 0.4 and 0.6.", low=0),
    # DPO
    Metric("loss/dpo", "Loss, training", "nats per pair", "down", "preference-loss",
           "Minus log sigmoid of the implicit rewards' margin. log 2 = 0.69 is the reference.", "Falls below 0.69.",
           short="loss", low=0, headline=True),
    Metric("eval/loss/dpo", "Loss, held-out", "nats per pair", "down", "preference-loss",
           "The same on held-out pairs.", "Falls. Rising while the training loss falls: over-fitting.", low=0,
           checks=("overfitting",)),
    Metric("loss/ipo", "Loss, training", "squared nats per pair", "down", "preference-loss",
           "Squared distance of the difference of log-ratios from 1 / (2 beta).", "Falls.", short="loss", low=0),
    Metric("eval/loss/ipo", "Loss, held-out", "squared nats per pair", "down", "preference-loss",
           "The same on held-out pairs.", "Falls.", low=0),
    Metric("rewards/accuracies", "Accuracy of implicit rewards, this batch", "share of pairs", "up",
           "preference-accuracy", "Pairs whose chosen completion has the higher implicit reward, beta times the "
           "log-ratio to the reference.", "Rises from 0.5.", short="accuracy", low=0, high=1),
    Metric("eval/rewards/accuracies", "Accuracy of implicit rewards, held-out", "share of pairs", "up",
           "preference-accuracy", "The same on held-out pairs.", "Rises from 0.5.",
           short="held-out acc.", low=0, high=1, headline=True),
    Metric("rewards/margins", "Margin of implicit rewards", "reward units", "up", "implicit-rewards",
           "Implicit reward of the chosen minus that of the rejected completion.", "Rises from 0.", short="margin"),
    Metric("rewards/chosen", "Implicit reward, chosen", "reward units", "none", "implicit-rewards",
           "Beta times the log-ratio of the chosen completion.",
           "Around 0. Far below: the policy also loses what was chosen."),
    Metric("rewards/rejected", "Implicit reward, rejected", "reward units", "none", "implicit-rewards",
           "Beta times the log-ratio of the rejected completion.", "Falls."),
    Metric("eval/rewards/margins", "Margin, held-out", "reward units", "up", "held-out-implicit-rewards",
           "The margin of implicit rewards on held-out pairs.", "Rises from 0."),
    *(Metric(f"eval/rewards/{name}", f"Implicit reward, {name}, held-out", "reward units", "none",
             "held-out-implicit-rewards", "The same on held-out pairs.", "As in training.")
      for name in ("chosen", "rejected")),
    # PPO, the most telling first
    Metric("objective/scores", "Score", "reward units per completion", "up", "score",
           "Mean reward of the completions, as PPO is rewarded: normalised, clipped, with the penalty for completions "
           "that do not end.", "Rises, fast at first, then levels off.", short="score", headline=True),
    Metric("objective/rlhf_reward", "Score minus KL penalty", "reward units per completion", "up", "score",
           "Objective of PPO: the score minus kl_coef times the KL.",
           "Rises. If the score rises and this falls, the policy pays more in KL than it gains."),
    Metric("reward/disagreement", "Disagreement of the ensemble", "reward units", "none", "disagreement",
           "Standard deviation of the reward models' normalised scores of a completion, on average.",
           "Steady. Rising with the score: the policy is where the models know little."),
    Metric("reward/", "Reward: {}", "units of the source", "up", "sources",
           "Scores of one reward source, before weights and normalisation.", "Rises."),
    Metric("gold/", "Gold score: {}", "units of the source", "up", "gold",
           "A score that is logged and never optimised.",
           "Rises with the score. Falling while the score rises: over-optimisation.",
           short="gold {}", checks=("over-optimisation",)),
    Metric("objective/kl", "KL to the reference", "nats per completion", "none", "kl",
           "Distance of the policy from the reference, summed over each completion's tokens and estimated from "
           "them.", "Starts at 0 and rises slowly to a few nats. Clearly negative or growing without bound: check "
           "kl_coef and the learning rate.", short="KL, nats", headline=True, checks=("negative-kl", "kl-explosion")),
    Metric("objective/equal_groups", "Groups of equal scores", "share of completions", "down", "equal-groups",
           "Completions of prompts whose scores are all equal: a group estimator learns nothing from them.",
           "Well below 1. Near 1: the prompts are too easy, too hard, or the reward is too coarse.",
           short="equal groups", low=0, high=1),
    Metric("response_length/mean", "Length", "tokens per completion", "none", "length",
           "Number of tokens of a completion, including its end-of-text token.", "Steady, or changing for a reason. A "
           "steady rise with the score often means that the reward prefers long answers.",
           short="length, tokens", low=0, headline=True, checks=("length-drift",)),
    Metric("policy/entropy_avg", "Entropy", "nats per token", "none", "entropy",
           "Spread of the policy's next-token distribution.", "Falls slowly. Near 0, the policy no longer explores.",
           short="entropy/token", checks=("entropy-collapse",)),
    Metric("response_length/ended", "Ended by themselves", "share of completions", "up", "ended",
           "Fraction of completions that ended with an end-of-text token instead of at max_new_tokens.", "Near 1.",
           short="ended, share", low=0, high=1, headline=True, checks=("unfinished",)),
    Metric("val/explained_variance", "Explained variance", "fraction of the returns’ variance", "up",  # noqa: RUF001
           "explained-variance", "1 − Var(return − value) / Var(return). 0 is no better than "  # noqa: RUF001
           "predicting the mean.", "Rises above 0 within some iterations, towards 0.5 and more. Below 0, the value "
           "function does harm.", short="value expl. var.", high=1, headline=True, checks=("value-function",)),
    Metric("policy/clipfrac_avg", "Clip fraction", "share of tokens", "none", "clip",
           "Fraction of tokens whose ratio is outside of 1 ± clip_eps, so that their gradient is 0.",
           "Between 0 and 0.2. Above 0.3, the updates are too large.",
           short="clipped, share", low=0, checks=("clip-fraction",)),
    Metric("policy/approxkl_avg", "KL of the update", "nats per token", "none", "update-kl",
           "Distance of the policy after the updates from the policy that sampled the batch: half the mean squared "
           "log-ratio.",
           "Below about 0.02. Above 0.1: lower the learning rate or the epochs.",
           short="approx. KL", low=0, checks=("approx-kl",)),
    Metric("loss/value_avg", "Value loss", "squared reward units", "down", "value-loss",
           "Half the squared error of the value function, clipped.", "Falls, with jumps when the score jumps.",
           short="value loss", low=0),
    Metric("objective/non_score_reward", "KL penalty", "reward units per completion", "none", "kl-penalty",
           "Minus kl_coef times the KL to the reference.", "A small part of the score. Falls slowly."),
    Metric("objective/kl_coef", "KL coefficient", "reward units per nat", "none", "kl-coef",
           "Penalty for one nat of KL.", "Constant, or adapted to kl_target with --ppo.kl-adaptive."),
    Metric("objective/entropy", "Surprise of its own completions", "nats per completion", "none", "surprise",
           "Minus the log-probability of the completions, summed over their tokens: an estimate of the policy's "
           "entropy.", "Falls slowly. A collapse means that all completions are alike."),
    Metric("val/mean", "Mean value", "reward units", "none", "value",
           "Mean of the value function over tokens.", "Follows the score."),
    Metric("val/clipfrac_avg", "Value clip fraction", "share of tokens", "none", "value-clip",
           "Fraction of tokens whose value update was clipped.", "Mostly below 0.2.", low=0),
    Metric("val/ratio", "Probability ratio", "new over old probability", "none", "ratio",
           "Mean of new over old probability of the sampled tokens during the updates.",
           "Stays within a few hundredths of 1."),
    Metric("val/ratio_first", "Before the first update", "new over old probability", "none", "ratio",
           "Probability ratio on the first minibatch, before any update.", "Exactly 1; anything else is a defect.",
           checks=("first-ratio",)),
    Metric("loss/policy_avg", "Policy loss", "", "none", "policy-loss",
           "Clipped surrogate loss of PPO.", "Small, around 0. Its level has little meaning."),
    Metric("loss/kl_avg", "KL loss", "nats per token", "none", "kl-loss",
           "KL penalty, if it is in the loss instead of the reward.", "Small."),
    Metric("policy/updates", "Updates", "per iteration", "none", "updates",
           "Number of optimiser steps in the iteration, which is smaller if target_kl stopped it.", "Constant.", low=0),
    # Every stage
    Metric("grad_norm", "Gradient norm", "before clipping", "none", "grad-norm",
           "Norm of the whole gradient.", "Steady. Spikes are clipped to max_grad_norm.", short="grad norm", low=0),
    Metric("lr", "Learning rate", "", "none", "lr", "Learning rate of this step.", "As configured.", low=0),
    Metric("perf/tokens_per_s", "Throughput", "tokens per second", "up", "throughput",
           "Prompt and completion tokens per second of the step.",
           "Steady. A drop means other load, longer texts or a lost worker.",
           short="tokens/s", low=0, headline=True, checks=("throughput",)),
    Metric("timing_s/generate", "generate", "seconds", "down", "phases",
           "Time to generate completions.", "Usually the largest part if completions are long.", low=0),
    Metric("timing_s/score", "score", "seconds", "down", "phases",
           "Time to score completions by reward, reference and value models.", "Less than the update.", low=0),
    Metric("timing_s/update", "update", "seconds", "down", "phases",
           "Time of the minibatch updates of all epochs.", "Grows with num_epochs.", low=0),
    Metric("timing_s/step", "Time per step", "seconds", "down", "step-time",
           "Wall-clock time of the whole step.", "Steady.", low=0),
    Metric("timing_s/", "{}", "seconds", "down", meaning="Wall-clock time.", good="Steady.", low=0),
    Metric("fault/restarts", "Processes replaced", "per step", "down", "restarts",
           "Number of workers and servers that were lost and replaced.", "None.", low=0),
    Metric("fault/recovery_s", "Time to recover", "seconds", "down", "recovery",
           "Time to replace lost processes and to restore the state.", "Seconds.", low=0),
    # Evaluation of a policy
    Metric("eval/reward/", "Reward model: {}", "reward units", "up", row="reward model: {}", signed=True,
           meaning="Mean reward of the completions by one reward model."),
    Metric("eval/best_of/", "Best of {}", "units of the score", "up", row="best of {}", signed=True,
           meaning="Mean score of the best of n completions by the reward model."),
    Metric("eval/judge/", "Judge: {}", "units of the judge", "up", row="judge: {}", signed=True,
           meaning="Mean score of the completions by one judge."),
    Metric("eval/objective/kl_exact", "KL, exact", "nats per completion", row="KL, exact, nats", low=0,
           meaning="KL to the reference, from whole next-token distributions."),
    Metric("eval/objective/kl", "KL by k1", "nats per completion", row="KL by k1, nats",
           meaning="KL to the reference, estimated from the sampled tokens: the mean log-ratio."),
    Metric("eval/objective/kl_k2", "KL by k2", "nats per completion", row="KL by k2, nats", low=0,
           meaning="KL to the reference, estimated as half the mean squared log-ratio."),
    Metric("eval/objective/kl_k3", "KL by k3", "nats per completion", row="KL by k3, nats", low=0,
           meaning="KL to the reference, estimated as ratio - 1 - log-ratio, of the reference over the policy."),
    Metric("eval/policy/entropy_avg", "Entropy", "nats per token", row="entropy, nats per token", low=0,
           meaning="Spread of the policy's next-token distribution."),
    Metric("eval/response_length/mean", "Length", "tokens per completion", row="response length, tokens", low=0,
           meaning="Number of tokens of a completion, including its end-of-text token."),
    Metric("eval/ended", "Ended by itself", "share of completions", "up", row="ended by itself", low=0, high=1,
           meaning="Fraction of completions that ended with an end-of-text token instead of at max_new_tokens."),
    Metric("eval/repeated_4", "Repeated 4-grams", "share of 4-grams", "down", row="repeated 4-grams", low=0, high=1,
           meaning="Fraction of 4-grams of tokens that occurred before in the same completion: seq-rep-4."),
    *(Metric(f"eval/distinct_{n}", f"Distinct-{n}", f"share of {n}-grams", "up", row=f"distinct-{n}", low=0, high=1,
             meaning=f"Distinct {n}-grams of all completions, divided by all {n}-grams.") for n in (1, 2, 3)),
    Metric("eval/win_rate/", "Win rate by {}", "share of prompts", "up", low=0, high=1,
           meaning="Fraction of prompts where the policy's completion is preferred; a tie counts half.",
           good="Above 0.5."),
    Metric("eval/wins/", "Wins by {}", "share of prompts", "up", low=0, high=1,
           meaning="Fraction of prompts where the policy's completion is preferred."),
    Metric("eval/ties/", "Ties by {}", "share of prompts", low=0, high=1, meaning="Fraction of ties."),
    Metric("eval/losses/", "Losses by {}", "share of prompts", "down", low=0, high=1,
           meaning="Fraction of prompts where the other model's completion is preferred."),
    Metric("eval/first_place/", "First place with {}", "share of prompts", low=0, high=1,
           meaning="Fraction of answers, over both orders, in which a judge prefers the completion that it sees first.",
           good="0.5, which is fair."),
)
# fmt: on

METRICS: dict[str, Metric] = {metric.key: metric for metric in _TABLE}
"""Metrics by key, in the order of curves in a chart and of rows in a table."""


def register(metric: Metric) -> None:
    """Add a metric to the end of `METRICS`, for example when the file of a new stage is imported.

    Only programs that import that file know the metric, such as the one that trains the stage and writes its report.

    Args:
        metric: the metric.

    Raises:
        ValueError: the key belongs to another metric.

    Example:
        >>> register(Metric("reward/jokes", "Jokes", unit="per completion", meaning="Jokes told."))
        >>> describe("reward/jokes").label
        'Jokes'
    """
    if METRICS.setdefault(metric.key, metric) != metric:
        raise ValueError(
            f"register: {metric.key} is a metric already, {METRICS[metric.key].label!r}; choose another key"
        )


def is_registered(key: str) -> bool:
    """Return True if the table has a metric with this key, or with a prefix of it.

    Example:
        >>> is_registered("objective/kl"), is_registered("timing_s/generate"), is_registered("my/metric")
        (True, True, False)
    """
    return _row_of(key) is not None


def describe(key: str) -> Metric:
    """Return the metric of a key. The label of a metric that is not registered is its key.

    Example:
        >>> describe("objective/kl").unit, describe("my/metric").label
        ('nats per completion', 'my/metric')
    """
    row = _row_of(key)
    if row is None:
        return Metric(key, key, meaning="A metric of this run.", short=key)
    metric = METRICS[row]
    if not row.endswith("/"):
        return metric
    texts = {name: getattr(metric, name).replace("{}", key[len(row) :]) for name in ("label", "short", "row")}
    return replace(metric, key=key, **texts)


def in_order(keys: Iterable[str]) -> list[str]:
    """Return `keys` in the order of the table. Keys of the same prefix, and unregistered keys, keep their order.

    Example:
        >>> in_order(["my/metric", "objective/kl", "loss/sft"])
        ['loss/sft', 'objective/kl', 'my/metric']
    """
    ranks = {row: rank for rank, row in enumerate(METRICS)}
    return sorted(keys, key=lambda key: ranks.get(_row_of(key) or "", len(ranks)))


def _row_of(key: str) -> str | None:
    """Return the key of the table's row for a metric: the key itself or its longest prefix; None if there is none."""
    if key in METRICS and not key.endswith("/"):
        return key
    parts = key.split("/")
    prefixes = ("/".join(parts[:count]) + "/" for count in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in METRICS), None)
