"""The fast forms of `decode_steps` that a CPU can show; recordings are tested on GPUs (test_gpu.py)."""

import torch
from laws import assert_same_bits

from rlhf import random
from rlhf.execution.draws import one_by_one
from rlhf.models.decode_state import decode_steps
from rlhf.models.decoding import generate_completions as generate


def test_tokens_drawn_one_by_one_are_those_drawn_together(params, config, tokens):
    keys, lengths = random.split(random.key(4), 3), torch.tensor([6, 1, 4])
    settings = {
        "config": config,
        "max_new_tokens": 11,
        "stop_tokens": [1, 2, 3],
        "max_concurrent": 2,
        "draws_per_call": 4,
    }
    together, separate = (
        generate(params, tokens[:, :6], lengths, keys, draw=draw, with_entropies=True, **settings)
        for draw in (decode_steps, one_by_one(decode_steps))
    )
    assert together.ended.any()
    assert_same_bits(separate, together)
