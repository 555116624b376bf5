"""Measurements of the health checks in a stage's metrics.

Measurements of metrics take the metric that is judged, followed by the other metrics that its check reads.
"""

from typing import NamedTuple

import numpy as np

from rlhf.monitor.log import LogReader, Series
from rlhf.monitor.thresholds import THRESHOLDS, Level, worst
from rlhf.verdicts import ONE_SIDED

_FEWEST = 5
"""Minimum number of lines for a conclusion."""


class Reading(NamedTuple):
    """The finding of one measurement."""

    level: Level
    summary: str
    evidence: str
    steps: tuple[int, int] | None = None


class Unknown(Exception):  # noqa: N818 (not an error)
    """The log does not have what a check needs."""


def need(reader: LogReader, stage: str, name: str, fewest: int = _FEWEST) -> Series:
    """Return a metric without its NaN values. Raises Unknown if fewer than `fewest` values are left."""
    steps, values = reader.series(stage, name)
    finite = np.isfinite(values)
    if not len(values):
        raise Unknown(f"{name} is not in the log")
    if finite.sum() < fewest:
        raise Unknown(f"only {finite.sum()} of the {fewest} lines with {name} that this takes")
    return Series(steps[finite], values[finite])


def recent(series: Series) -> Series:
    """Return the newest tenth of a series, between 5 and 50 lines."""
    count = _window(series)
    return Series(series.steps[-count:], series.values[-count:])


def early(series: Series) -> Series:
    """Return as many lines from the start of a series as `recent` returns from its end."""
    count = _window(series)
    return Series(series.steps[:count], series.values[:count])


def _window(series: Series) -> int:
    return min(max(_FEWEST, len(series.values) // 10), 50)


def _median(series: Series) -> float:
    return float(np.median(series.values))


def _span(series: Series) -> tuple[int, int]:
    return int(series.steps[0]), int(series.steps[-1])


def negative_kl(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the KL, which is negative only if sampling and log-probs disagree."""
    newest = recent(need(reader, stage, metric))
    kl = _median(newest)
    negative = int((newest.values < 0).sum())
    return Reading(
        THRESHOLDS["negative-kl"].level(kl),
        f"KL is {kl:.3g} nats per completion",
        f"median {metric} {kl:.3g} nats, negative in {negative} of {len(newest.values)} lines",
        _span(newest),
    )


def kl_explosion(reader: LogReader, stage: str, metric: str, length: str) -> Reading:
    """Return the level of the KL per token, and of its growth since the middle of the run."""
    kl = need(reader, stage, metric)
    lengths = need(reader, stage, length)
    newest, middle = recent(kl), kl.values[len(kl.values) * 2 // 5 : len(kl.values) * 3 // 5]
    per_token = _median(newest) / max(_median(recent(lengths)), 1.0)
    growth = _median(newest) / max(float(np.median(middle)), 1e-9) if len(kl.values) >= 20 else 1.0
    grows: Level = THRESHOLDS["kl-growth"].level(growth) if per_token > 0.1 else "ok"
    peak = int(np.argmax(kl.values))
    highest = f"{kl.values[peak]:.3g} at step {kl.steps[peak]}"
    return Reading(
        worst(THRESHOLDS["kl-level"].level(per_token), grows),
        f"KL is {_median(newest):.3g} nats per completion, {per_token:.2g} per token"
        + (f", and {growth:.1f} times that of the middle of the run" if grows != "ok" else "")
        + (f"; it was {highest}" if kl.values[peak] > 5 * _median(newest) > 0 else ""),
        f"median {metric} {_median(newest):.3g} nats over {_median(recent(lengths)):.3g} tokens; highest {highest}",
        _span(newest),
    )


def first_ratio(reader: LogReader, stage: str, metric: str, mean_ratio: str, updates: str) -> Reading:
    """Return the deviation from 1 of the probability ratio before the first update."""
    if not len(reader.series(stage, metric).values) and set(reader.series(stage, updates).values) == {1.0}:
        metric = mean_ratio  # one update an iteration: the mean is the first
    ratio = need(reader, stage, metric, 1)
    index = int(np.argmax(np.abs(ratio.values - 1.0)))
    off = abs(float(ratio.values[index]) - 1.0)
    return Reading(
        THRESHOLDS["first-ratio"].level(off),
        f"ratio at the first minibatch is {'1' if off < 5e-4 else f'off by up to {off:.2g}'}",
        f"{metric} {ratio.values[index]:.6g} at step {ratio.steps[index]}, the farthest from 1 of "
        f"{len(ratio.values)} lines",
        _span(ratio),
    )


def clip_fraction(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the fraction of clipped tokens."""
    _need_updates(reader, stage)
    return _level_of_median(reader, stage, metric, "clip-fraction", "{:.1%} of tokens are clipped")


def approx_kl(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the KL between the policy that sampled and the policies of an iteration's updates."""
    _need_updates(reader, stage)
    return _level_of_median(reader, stage, metric, "approx-kl", "updates move the policy {:.2g} nats per token")


def _need_updates(reader: LogReader, stage: str) -> None:
    """Raise Unknown if iterations have one update, before which the policy is the one that sampled."""
    updates = reader.series(stage, "policy/updates").values
    if len(updates) and max(updates) <= 1:
        raise Unknown("an iteration has one update, which is measured before its step")


def value_function(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the explained variance; below 0 the values are worse than a constant."""
    summary = "the values' explained variance of the returns is {:.2f}"
    return _level_of_median(reader, stage, metric, "value-function", summary)


def equal_groups(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the share of completions in groups of equal scores, which have no advantage."""
    summary = "{:.0%} of completions are in groups of equal scores"
    return _level_of_median(reader, stage, metric, "equal-groups", summary)


def unfinished(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the share of completions that end before max_new_tokens."""
    return _level_of_median(reader, stage, metric, "unfinished", "{:.0%} of completions end by themselves")


def _level_of_median(reader: LogReader, stage: str, metric: str, threshold: str, summary: str) -> Reading:
    newest = recent(need(reader, stage, metric))
    value = _median(newest)
    low, high = float(newest.values.min()), float(newest.values.max())
    evidence = f"median {metric} {value:.3g}, between {low:.3g} and {high:.3g}"
    return Reading(THRESHOLDS[threshold].level(value), summary.format(value), evidence, _span(newest))


def entropy_collapse(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the entropy relative to the entropy at the start; a policy without entropy does not explore."""
    entropy = need(reader, stage, metric)
    newest, start = recent(entropy), early(entropy)
    share = _median(newest) / max(_median(start), 1e-9)
    return Reading(
        THRESHOLDS["entropy-collapse"].level(share),
        f"entropy is {_median(newest):.2g} nats per token, {share:.0%} of that at the start",
        f"median {metric} {_median(start):.3g} at first, {_median(newest):.3g} now",
        _span(newest),
    )


def length_drift(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the length of completions relative to their length at the start."""
    lengths = need(reader, stage, metric)
    newest, start = recent(lengths), early(lengths)
    growth = _median(newest) / max(_median(start), 1e-9)
    return Reading(
        worst(THRESHOLDS["length-growth"].level(growth), THRESHOLDS["length-shrinkage"].level(growth)),
        f"completions are {_median(newest):.3g} tokens long, {growth:.2g} times the length at the start",
        f"median {metric} {_median(start):.3g} tokens at first, {_median(newest):.3g} now",
        _span(newest),
    )


def over_optimisation(reader: LogReader, stage: str, metric: str, optimised: str) -> Reading:
    """Return the fall of the gold score from its best, while the optimised score rises."""
    if metric.endswith("/"):
        raise Unknown("there is no gold score in the log; --ppo.reward outputs/reward 0*my_rewards:brevity logs one")
    gold, score = need(reader, stage, metric, 20), need(reader, stage, optimised, 20)
    blocks = np.array_split(gold.values, 8)
    means = np.array([block.mean() for block in blocks])
    rounding = 1e-6 * float(np.abs(gold.values).max())  # of float32 scores, which is no fall
    noise = max(float(np.std(np.diff(gold.values))) / 2**0.5, rounding, 1e-9)
    error = noise * (2 / len(blocks[-1])) ** 0.5
    best = int(np.argmax(means))
    peak = np.array_split(gold.steps, len(blocks))[best]
    fall = float(means[best] - means[-1])
    at_peak = float(score.values[(score.steps >= peak[0]) & (score.steps <= peak[-1])].mean())
    at_end = float(score.values[-len(blocks[-1]) :].mean())
    level = THRESHOLDS["over-optimisation"].level(fall / error) if at_end > at_peak else "ok"
    return Reading(
        level,
        f"{metric} has fallen by {fall:.3g} from its best, while the optimised score rose"
        if level != "ok"
        else f"{metric} is {'at' if best == len(means) - 1 else f'{fall:.2g} below'} its best",
        f"{metric} {means[best]:.3g} around step {peak[len(peak) // 2]}, {means[-1]:.3g} now "
        f"(standard error {error:.2g}); {optimised} {at_peak:.3g} then, {at_end:.3g} now",
        (int(peak[0]), int(gold.steps[-1])),
    )


def reward_model_chance(reader: LogReader, stage: str, metric: str, trained: str, count: str) -> Reading:
    """Return the level of the held-out accuracy, compared to chance."""
    accuracy = need(reader, stage, metric, 1)
    value, limits = float(accuracy.values[-1]), THRESHOLDS["reward-model-chance"]
    on_training = reader.series(stage, trained).values
    beside = f"; {trained} {on_training[-1]:.3g}" if len(on_training) else ""
    pairs = reader.series(stage, count).values
    number, level = (f"{pairs[-1]:.0f} " if len(pairs) else ""), limits.level(value)
    if level == "problem" and len(pairs) and value + ONE_SIDED * 0.5 / max(pairs[-1], 1) ** 0.5 > limits.warning:
        number, level = f"only {number}", "warning"  # too few to tell
    return Reading(
        level,
        f"orders {value:.1%} of {number}held-out pairs as people did",
        f"{metric} {value:.3g}{beside}",
        _span(accuracy),
    )


def reward_model_length(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the level of the correlation between reward and length."""
    correlation = need(reader, stage, metric, 1)
    value = float(correlation.values[-1])
    return Reading(
        THRESHOLDS["reward-model-length"].level(abs(value)),
        f"reward and length correlate by {value:.2f}",
        f"{metric} {value:.3g}",
        _span(correlation),
    )


def throughput(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the throughput relative to earlier lines, except the first, which includes warm-up."""
    speed = need(reader, stage, metric, 3 * _FEWEST)
    newest = recent(speed)
    earlier = float(np.median(speed.values[1 : -len(newest.values)]))
    share = _median(newest) / max(earlier, 1e-9)
    return Reading(
        THRESHOLDS["throughput"].level(share),
        f"{_median(newest):,.0f} tokens/s, {share:.0%} of before",
        f"median {metric} {earlier:,.0f} before, {_median(newest):,.0f} now",
        _span(newest),
    )


def overfitting(reader: LogReader, stage: str, metric: str) -> Reading:
    """Return the held-out loss relative to its lowest."""
    loss = need(reader, stage, metric, 2)
    best = int(np.argmin(loss.values))
    ratio = float(loss.values[-1] / max(loss.values[best], 1e-9))
    return Reading(
        THRESHOLDS["overfitting"].level(ratio),
        f"held-out loss is {loss.values[-1]:.3g}, "
        + ("its lowest" if ratio <= 1 else f"{ratio - 1:.1%} above its lowest"),
        f"{metric} {loss.values[best]:.3g} at step {loss.steps[best]}, {loss.values[-1]:.3g} at step {loss.steps[-1]}",
        (int(loss.steps[best]), int(loss.steps[-1])),
    )
