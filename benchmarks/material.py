"""What both sides work on: shapes of models and batches, and made-up tokens. Imports numpy alone: peers read it too."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FIRST_TOKEN = 2
"""Tokens below it are the tokenizer's end of text and padding; data have none of them."""


class Shape(NamedTuple):
    """A GPT-2."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    n_positions: int

    @property
    def parameters(self) -> int:
        """How many numbers there are to learn."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return self.n_layer * block + (self.vocab_size + self.n_positions + 2) * self.n_embd


class Iteration(NamedTuple):
    """An iteration of PPO."""

    prompts: int
    epochs: int
    minibatch: int
    """Completions of an update."""
    prompt: int
    """Tokens before each completion."""
    completion: int
    """Tokens of each completion."""


class Size(NamedTuple):
    """A model and the work it is measured by."""

    shape: Shape
    sft: tuple[int, int]
    """Sequences of a step, tokens of each."""
    pairs: tuple[int, int]
    """Preference pairs of a step, tokens of each member."""
    prompt: int
    """Tokens before each completion."""
    completion: int
    """Tokens of each completion."""
    batches: tuple[int, ...]
    """Completions generated together."""
    queue: int
    """Prompts of the row in which completions end by themselves."""
    ppo: Iteration
    steps: int
    """Optimiser steps in a round, so that a round is long enough to be timed."""


_SMALL, _GPT2 = Shape(4, 4, 128, 1024, 128), Shape(12, 12, 768, 50257, 1024)

SIZES = {
    "tiny": Size(Shape(1, 2, 16, 300, 32), (4, 16), (2, 16), 6, 10, (2,), 8, Iteration(4, 2, 2, 6, 10), 1),
    "small": Size(_SMALL, (32, 128), (16, 128), 32, 96, (1, 8, 64), 512, Iteration(64, 4, 16, 32, 96), 4),
    "gpt2": Size(_GPT2, (2, 256), (2, 128), 64, 64, (8, 64), 128, Iteration(64, 4, 16, 64, 64), 1),
    "gpt2-gpu": Size(_GPT2, (32, 1024), (64, 256), 32, 96, (8, 512), 2048, Iteration(512, 4, 128, 64, 24), 4),
}
"""`tiny` is for the tests; the others are the library's presets, GPT-2 also with the work of a large GPU."""


def fixed_lengths(count: int, length: int) -> list[int]:
    """The same length for every sequence."""
    return [length] * count


def varied_lengths(count: int, longest: int) -> list[int]:
    """Lengths as demonstrations have them: log-normal, cut at `longest`, with a mean of about a third of it."""
    drawn = np.random.default_rng(1).lognormal(np.log(longest / 4), 0.75, count)
    return np.clip(drawn, 4, longest).astype(int).tolist()


def sequences(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(FIRST_TOKEN, vocab_size, length).tolist() for length in lengths]


def demonstrations(size: Size, varied: bool) -> list[list[int]]:
    """Enough batches for a while; whoever needs more begins again."""
    count, longest = size.sft
    lengths = varied_lengths(64 * count, longest) if varied else fixed_lengths(64 * count, longest)
    return sequences(lengths, size.shape.vocab_size)


def preferences(size: Size) -> list[list[list[int]]]:
    """Pairs of sequences."""
    count, length = size.pairs
    members = sequences(fixed_lengths(2 * 64 * count, length), size.shape.vocab_size)
    return [list(pair) for pair in zip(members[::2], members[1::2], strict=True)]


def stop_tokens(size: Size) -> list[int]:
    """A stop set of which an untrained model draws one soon enough for completions of a third of the longest."""
    longest = size.completion
    chance = min(np.linspace(1e-4, 1, 10_000), key=lambda p: abs((1 - (1 - p) ** longest) / p - longest / 3))
    count = max(1, round(float(chance) * size.shape.vocab_size))
    return list(range(size.shape.vocab_size - count, size.shape.vocab_size))


KIND_WORDS = {
    "apologise", "day", "free", "full", "glad", "have", "help", "lovely", "new", "patience", "refund", "repair", "send",
    "sorry", "thank", "today",
}  # fmt: skip
"""Words of the embedded example's good replies."""


def kindness(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """The share of a completion's words that are kind, 0 to 1, whatever its length; a reward function of both sides."""
    words = [re.findall("[a-z]+", completion.lower()) for completion in completions]
    return [sum(word in KIND_WORDS for word in found) / max(1, len(found)) for found in words]


def records(path: str) -> list[dict[str, Any]]:
    """Read a JSON list."""
    found: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found
