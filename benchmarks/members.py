"""The gradients of five members of an ensemble by `vmap` over stacked parameters, against one member after the other.

Run it by `python -m benchmarks.members`. It takes processor time of one thread, which other programs hardly change.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from rlhf import random
from rlhf.losses import reward_loss
from rlhf.models import gpt2
from rlhf.models.forward import forward
from rlhf.models.gpt2_config import GPT2Config
from rlhf.tree import tree_map
from rlhf.types import Params

MEMBERS, ROUNDS = 5, 7
SHAPES = ((2, 64, 2), (4, 128, 4))
"""Layers, width and heads."""


def run() -> None:
    """Print the median of the rounds' ratios for each shape."""
    torch.set_num_threads(1)
    tokens = torch.arange(16 * 64).reshape(16, 64) * 7919 % 1024
    for layers, width, heads in SHAPES:
        shape = GPT2Config(vocab_size=1024, n_positions=128, n_embd=width, n_layer=layers, n_head=heads)
        members = [gpt2.init(shape, key=random.key(number)) for number in range(MEMBERS)]
        stacked = tree_map(lambda *leaves: torch.stack(leaves), *members)
        gradient = grad(_make_loss(shape, tokens))
        ratios = []
        for number in range(ROUNDS + 1):
            loop = _seconds(lambda members=members, gradient=gradient: list(map(gradient, members)))
            ratio = _seconds(lambda stacked=stacked, gradient=gradient: vmap(gradient)(stacked)) / loop
            ratios += [ratio] if number else []  # the first round warms up
        print(f"{layers} layers of {width}: vmap takes {statistics.median(ratios):.2f} of the loop's time")


def _make_loss(shape: GPT2Config, tokens: Tensor) -> Callable[[Params], Tensor]:
    def loss(params: Params) -> Tensor:
        scores = forward(params, tokens, config=shape)[:, -1, :8].sum(-1)
        return reward_loss(scores[:8], rejected_scores=scores[8:])[0]

    return loss


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    run()
