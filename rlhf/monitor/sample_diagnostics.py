"""Measurements of the health checks in the newest completions."""

import re
from collections import Counter
from typing import Any

import numpy as np

from rlhf.io.printable_text import shorten
from rlhf.monitor.diagnostics import Reading, Unknown
from rlhf.monitor.log import LogReader
from rlhf.monitor.thresholds import THRESHOLDS, worst

_SAMPLES = 128
"""Number of newest completions that are measured."""


def constant_rewards(reader: LogReader, stage: str) -> Reading:
    """Return the share of the most common score; a policy learns nothing from equal scores."""
    samples = _samples(reader, stage)
    scores = Counter(sample["score"] for sample in samples if "score" in sample)
    if not scores:
        raise Unknown("no completion in samples.jsonl has a number as its score")
    score, count = scores.most_common(1)[0]
    shown = f"{score:.4g}" if isinstance(score, float) else score
    return Reading(
        THRESHOLDS["constant-rewards"].level(count / len(samples)),
        f"{len(scores)} different scores in {len(samples)} completions",
        f"the score {shown} is that of {count} of the newest {len(samples)} completions",
        _step_range(samples),
    )


def repeated_text(reader: LogReader, stage: str) -> Reading:
    """Return the repetition within completions, and the share of the most common completion."""
    samples = _samples(reader, stage)
    repeated = float(np.mean([word_repetition(sample["completion"]) for sample in samples]))
    prompts = {sample["prompt"] for sample in samples}
    text, count = Counter(sample["completion"] for sample in samples).most_common(1)[0]
    several = len(prompts) > 4
    same = count / len(samples) if several else 0.0
    return Reading(
        worst(THRESHOLDS["repeated-text"].level(repeated), THRESHOLDS["same-text"].level(same)),
        f"{repeated:.0%} of 4-grams repeat within a completion"
        + (f"; the commonest completion has a share of {same:.0%}" if several else ""),
        f"of the newest {len(samples)} completions of {len(prompts)} prompts, {count} are {shorten(text, 60)!r}",
        _step_range(samples),
    )


def word_repetition(text: str) -> float:
    """Return the share of a text's 4-grams that occur earlier in it.

    Source: seq-rep-4 of Welleck et al. 2020, https://arxiv.org/abs/1908.04319, over words, or over characters if the
    text has no spaces. A text of fewer than four gives 0.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    parts = words if len(text) < 20 * max(len(words), 1) else list(text)
    grams = list(zip(*(parts[n:] for n in range(4)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _samples(reader: LogReader, stage: str) -> list[dict[str, Any]]:
    """Return the stage's newest completions. Raises Unknown if there are fewer than 16."""
    store = reader.samples
    numbers = [n for n in range(max(0, len(store) - _SAMPLES), len(store)) if store.offsets[n].stage == stage]
    if len(numbers) < 16:
        raise Unknown(f"only {len(numbers)} of the 16 completions that this takes are in samples.jsonl")
    return store[numbers[0] : numbers[-1] + 1]


def _step_range(samples: list[dict[str, Any]]) -> tuple[int, int]:
    return samples[0]["step"], samples[-1]["step"]
