"""What both sides work on: shapes of models and batches, and made-up tokens. Imports numpy alone: peers read it too."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FIRST_TOKEN = 17
"""Tokens below it are special in the tokenizers, such as end of text and padding; data have none of them."""


class Shape(NamedTuple):
    """A GPT-2."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    n_positions: int

    @property
    def block_matrices(self) -> int:
        """Numbers in the matrices of a block, each of which a token is multiplied with."""
        return 12 * self.n_embd**2

    @property
    def cache_width(self) -> int:
        """Numbers that a token leaves in the cache of a block."""
        return 2 * self.n_embd

    @property
    def parameters(self) -> int:
        """How many numbers there are to learn."""
        block = self.block_matrices + 13 * self.n_embd
        return self.n_layer * block + (self.vocab_size + self.n_positions + 2) * self.n_embd


class LlamaShape(NamedTuple):
    """A Llama whose output layer is its embedding."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_inner: int
    vocab_size: int
    n_positions: int
    rope_theta: float

    @property
    def block_matrices(self) -> int:
        """Numbers in the matrices of a block, each of which a token is multiplied with."""
        return (2 * self.n_embd + self.cache_width + 3 * self.n_inner) * self.n_embd

    @property
    def cache_width(self) -> int:
        """Numbers that a token leaves in the cache of a block."""
        return 2 * self.n_embd * self.n_kv_head // self.n_head

    @property
    def parameters(self) -> int:
        """How many numbers there are to learn."""
        return self.n_layer * (self.block_matrices + 2 * self.n_embd) + (self.vocab_size + 1) * self.n_embd


class Iteration(NamedTuple):
    """An iteration of PPO or RLOO."""

    prompts: int
    epochs: int
    minibatch: int
    """Completions of an update."""
    prompt: int
    """Tokens before each completion."""
    completion: int
    """Tokens of each completion."""
    samples: int = 1
    """Completions of each prompt."""

    @property
    def completions(self) -> int:
        """Completions of the iteration."""
        return self.prompts * self.samples

    @property
    def updates(self) -> int:
        """Optimiser steps of the iteration."""
        return self.epochs * self.completions // self.minibatch


class Size(NamedTuple):
    """A model and the work it is measured by."""

    shape: Shape | LlamaShape
    sft: tuple[int, int]
    """Sequences of a step, tokens of each."""
    pairs: tuple[int, int]
    """Preference pairs of a step, tokens of each member, of which a quarter are the prompt."""
    prompt: int
    """Tokens before each completion."""
    completion: int
    """Tokens of each completion."""
    batches: tuple[int, ...]
    """Completions generated together."""
    queue: int
    """Prompts of the row in which completions end by themselves; 0 leaves it out."""
    ppo: Iteration
    steps: int
    """Optimiser steps in a round, so that a round is long enough to be timed."""


_SMALL, _GPT2 = Shape(4, 4, 128, 1024, 128), Shape(12, 12, 768, 50257, 1024)
_SMOLLM2 = LlamaShape(30, 9, 3, 576, 1536, 49152, 8192, 100000.0)

SIZES = {
    "tiny": Size(Shape(1, 2, 16, 300, 32), (4, 16), (2, 16), 6, 10, (2,), 8, Iteration(4, 2, 2, 6, 10), 1),
    "small": Size(_SMALL, (32, 128), (16, 128), 32, 96, (1, 8, 64), 512, Iteration(64, 4, 16, 32, 96), 4),
    "gpt2": Size(_GPT2, (2, 256), (2, 128), 64, 64, (8, 64), 128, Iteration(64, 4, 16, 64, 64), 1),
    "gpt2-gpu": Size(_GPT2, (32, 1024), (64, 256), 32, 96, (8, 512), 2048, Iteration(512, 4, 128, 64, 24), 4),
    "smollm2": Size(_SMOLLM2, (2, 256), (2, 128), 32, 64, (64,), 0, Iteration(16, 2, 8, 32, 32), 1),
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
    """Pairs of sequences that begin with the same prompt."""
    count, length = size.pairs
    members = sequences(fixed_lengths(2 * 64 * count, length), size.shape.vocab_size)
    shared = pair_prompt(size)
    return [
        [chosen, chosen[:shared] + rejected[shared:]]
        for chosen, rejected in zip(members[::2], members[1::2], strict=True)
    ]


DPO_BATCHES = 8
"""Batches of pairs that DPO takes in turn, after their log-probs under the reference are computed."""


def pair_prompt(size: Size) -> int:
    """Tokens of a pair's prompt."""
    return size.pairs[1] // 4


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
