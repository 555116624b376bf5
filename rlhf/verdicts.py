"""Verdicts: one plain sentence about a model, with its evidence and what to do. Pure functions of figures."""

import math
from typing import NamedTuple

from rlhf.field_docs import documented

SAND_PERPLEXITY = 0.75
"""Perplexity, as a share of the unigram model's, above which a language model has learnt little more than which tokens
are frequent. Models of this library trained on 1,600 sentences reach 0.4 to 0.6."""

ONE_SIDED = 1.645
"""Standard errors that a figure exceeds by chance in one case of twenty."""
_FEWEST_PAIRS = 20
"""Pairs below which a reward model is not judged."""


@documented
class Verdict(NamedTuple):
    """Verdict on a model."""

    text: str
    """One sentence with its evidence and, where something is wrong, the remedy."""
    sound: bool = True
    """True if the next stage can build on the model."""


def sft_verdict(perplexity: float, unigram: float, records: int) -> Verdict:
    """Return the verdict on a language model by its perplexity on held-out demonstrations.

    Args:
        perplexity: perplexity per token of the language model.
        unigram: perplexity of the model that knows only how often each token occurs.
        records: number of held-out demonstrations.

    Example:
        >>> sft_verdict(300.0, 350.0, 80).sound
        False
    """
    figures = f"perplexity is {perplexity:.3g} on {records} held-out demonstrations, against {unigram:.3g} of token"
    if not perplexity <= SAND_PERPLEXITY * unigram:
        found = "has learnt little more than" if perplexity < unigram else "knows less than"
        return Verdict(
            f"The language model {found} which tokens are frequent: its {figures} frequencies "
            "alone. Do not build on it yet: train longer (--sft.epochs), on more demonstrations, or from a pre-trained "
            "model (--sft.model-path).",
            sound=False,
        )
    return Verdict(f"The language model has learnt from the demonstrations: its {figures} frequencies alone.")


def reward_verdict(accuracy: float, pairs: int, *, bag_of_words: float, longer: float) -> Verdict:
    """Return the verdict on a reward model by its accuracy on held-out pairs and those of two baselines.

    A baseline wins only by more than chance: by 1.6 standard errors of the accuracy.

    Args:
        accuracy: share of pairs that the model orders as people did.
        pairs: number of held-out pairs.
        bag_of_words: accuracy of a linear model of word counts that learnt from the same pairs; NaN if unknown.
        longer: accuracy of always preferring the longer completion.

    Example:
        >>> reward_verdict(0.62, 400, bag_of_words=0.78, longer=0.51).sound
        False
    """
    figure = f"The reward model orders {accuracy:.0%} of {pairs} held-out pairs"
    if pairs < _FEWEST_PAIRS:
        return Verdict(f"{figure}, which are too few to tell: hold out more (--reward.val-fraction).")
    error = ONE_SIDED * 0.5 / math.sqrt(pairs)
    by_length = "always choosing the longer" if longer >= 0.5 else "always choosing the shorter"
    baselines = {"a bag of words": bag_of_words, by_length: max(longer, 1.0 - longer)}
    name, best = max(
        ((name, value) for name, value in baselines.items() if not math.isnan(value)), key=lambda item: item[1]
    )
    if best > accuracy + error:
        return Verdict(
            f"{figure}, worse than {name} ({best:.0%}): do not optimise it yet. Train longer (--reward.epochs), on "
            "more pairs, or from a better model (--reward.model-path).",
            sound=False,
        )
    if accuracy < 0.5 + error:
        return Verdict(
            f"{figure}, which a coin would do too: do not optimise it yet. Check that chosen and rejected are not "
            "swapped; train longer (--reward.epochs) or on more pairs.",
            sound=False,
        )
    if best > accuracy - error:
        return Verdict(f"{figure}, about as many as {name} ({best:.0%}): watch the samples while it is optimised.")
    return Verdict(f"{figure}, more than {name} ({best:.0%}): it can be optimised.")


def dpo_verdict(accuracy: float, pairs: int, *, bag_of_words: float, longer: float) -> Verdict:
    """Return the verdict on a policy of DPO by the accuracy of its implicit rewards on held-out pairs.

    The interval is Wilson's (1927, "Probable inference, the law of succession, and statistical inference").

    Args:
        accuracy: share of pairs whose chosen completion has the higher implicit reward.
        pairs: number of held-out pairs.
        bag_of_words: accuracy of a linear model of word counts that learnt from the same pairs; NaN if unknown.
        longer: accuracy of always preferring the longer completion.

    Example:
        >>> dpo_verdict(0.51, 200, bag_of_words=0.6, longer=0.5).sound
        False
    """
    z, count = 1.96, max(pairs, 1)
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2)
    words = "" if math.isnan(bag_of_words) else f", a bag of words {bag_of_words:.0%}"
    figure = (
        f"The policy's implicit rewards order {accuracy:.0%} of {pairs} held-out pairs "
        f"(95% interval {centre - half:.0%} to {centre + half:.0%}; a coin 50%, the longer {longer:.0%}{words})"
    )
    if centre + half < 0.5:
        return Verdict(f"{figure}: worse than a coin. Check that chosen and rejected are not swapped.", sound=False)
    if centre - half <= 0.5:
        return Verdict(
            f"{figure}: it cannot be told from a coin. Train longer (--dpo.epochs), on more pairs, or at a higher "
            "--dpo.learning-rate.",
            sound=False,
        )
    return Verdict(f"{figure}: it has learnt the preferences. Whether its completions are better, a judge tells.")


def ppo_verdict(
    *,
    score_before: float,
    score: float,
    error: float,
    kl: float,
    budget: float,
    ended: float,
    must_end: bool,
    unit: str,
) -> Verdict:
    """Return the verdict on a policy by its first and its last iterations.

    Args:
        score_before: mean score of the first iteration, whose completions are the reference's.
        score: mean score of the last iterations.
        error: standard error of their difference.
        kl: mean KL of the last iterations, in nats per completion.
        budget: KL budget of the run, in nats per completion.
        ended: share of completions that end by themselves.
        must_end: True if completions should end by themselves.
        unit: unit of the score: "standard deviations" or "reward units".

    Example:
        >>> ppo_verdict(
        ...     score_before=0.1, score=0.2, error=0.1, kl=3.0, budget=10.0, ended=1.0, must_end=False, unit="units"
        ... ).text.partition(":")[0]
        'The policy has not gained measurably'
    """
    kl = max(kl, 0.0)  # an estimate may lie below
    moved = f"from {score_before:+.2f} to {score:+.2f} {unit} at a KL of {kl:.3g} nats per completion"
    if kl > 1.5 * budget:
        return Verdict(
            f"The policy has left its reference: its score went {moved}, above the budget of {budget:g}. Do not use "
            "it: raise --ppo.kl-coef or lower --ppo.learning-rate.",
            sound=False,
        )
    if must_end and ended < 0.5:
        return Verdict(
            f"The policy's score went {moved}, but only {ended:.0%} of its completions end. Do not use it: raise "
            "--ppo.missing-eos-penalty or --ppo.max-new-tokens.",
            sound=False,
        )
    ending = f", and {ended:.0%} of completions end" if must_end else ""
    if score < score_before - 2 * error:
        text = f"The policy has become worse: its score went {moved}{ending}. Do not use it: lower --ppo.learning-rate."
        return Verdict(text, sound=False)
    if score <= score_before + 2 * error:
        return Verdict(f"The policy has not gained measurably: its score went {moved}{ending}.")
    return Verdict(
        f"The policy's score rose {moved}{ending}. This is the reward that it was trained on: judge it by another one."
    )


def policy_verdict(
    *, judge: str, wins: tuple[float, float, float], prompts: int, against: str, is_own_reward: bool, ended: float
) -> Verdict:
    """Return the verdict on a policy by a judge's preference over another model.

    Args:
        judge: name of the judge.
        wins: win rate and the ends of its interval; the ends are NaN where all prompts agree.
        prompts: number of prompts.
        against: name of the other model.
        is_own_reward: True if the judge is the reward model that the policy was trained on.
        ended: share of the policy's completions that end by themselves.

    Example:
        >>> wins = (0.7, 0.6, 0.8)  # win rate and its interval
        >>> policy_verdict(judge="gold", wins=wins, prompts=100, against="sft", is_own_reward=False, ended=1.0).text
        'The policy is preferred to sft by gold: it wins on 70% of 100 prompts (95% interval 60% to 80%).'
    """
    rate, low, high = wins
    verb = "is preferred to" if low > 0.5 or (math.isnan(low) and rate > 0.5) else ""
    verb = verb or ("loses to" if high < 0.5 or (math.isnan(high) and rate < 0.5) else "cannot be told from")
    text = f"The policy {verb} {against} by {judge}: it wins on {rate:.0%} of {prompts} prompts"
    text += "" if math.isnan(low) or low == high else f" (95% interval {low:.0%} to {high:.0%})"
    if ended < 0.5:
        text += f", but only {ended:.0%} of its completions end"
    if is_own_reward:
        text += ". That is the reward model it was trained on: judge it by another one (--judge)"
    return Verdict(f"{text}.", sound=verb == "is preferred to" and ended >= 0.5)
