"""Prompts and completions joined in one tensor."""

import numpy as np
import pytest
import torch

import rlhf
from rlhf.models.decoding import Completions
from rlhf.models.sequences import join


def completions_of(rows: list[list[int]], masks: list[list[bool]]) -> Completions:
    tokens = torch.tensor(rows)
    zeros = torch.zeros(tokens.shape)
    return Completions(tokens, torch.tensor(masks), zeros, zeros, torch.zeros(len(rows), dtype=torch.bool), zeros)


@pytest.mark.parametrize("case", range(20))
def test_join_is_each_prompt_followed_by_its_completion(case):
    """Against rows that are put together in Python."""
    generator = np.random.default_rng(case)
    size, width, longest = generator.integers(1, 5, size=3).tolist()
    lengths = generator.integers(0, width + 1, size=size).tolist()
    ends = generator.integers(0, longest + 1, size=size).tolist()
    prompts = generator.integers(1, 90, size=(size, width)).tolist()
    drawn = generator.integers(1, 90, size=(size, longest)).tolist()
    rows = [[token * (place < end) for place, token in enumerate(row)]
            for row, end in zip(drawn, ends, strict=True)]  # fmt: skip
    masks = [[bool(place < end and generator.random() < 0.8) for place in range(longest)] for end in ends]
    tokens, mask = join(torch.tensor(prompts), torch.tensor(lengths), completions_of(rows, masks))
    expected, expected_mask = [], []
    for prompt, length, row, marks in zip(prompts, lengths, rows, masks, strict=True):
        rest = width - length
        expected.append(prompt[:length] + row + [0] * rest)
        expected_mask.append([False] * length + marks + [False] * rest)
    assert tokens.tolist() == expected
    assert mask.tolist() == expected_mask


def test_log_probs_of_joined_completions_are_those_of_sampling(params, config):
    prompts, lengths = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([3, 2])
    keys = rlhf.random.split(rlhf.random.key(0), 2)
    completions = rlhf.generate_completions(
        params, prompts, lengths, keys, config=config, max_new_tokens=5, stop_tokens=(2, 9)
    )
    tokens, mask = join(prompts, lengths, completions)
    logits = rlhf.forward(params, tokens[:, :-1], config=config)
    log_probs = rlhf.token_log_probs(logits, tokens[:, 1:])[mask[:, 1:]]
    assert torch.allclose(log_probs, completions.log_probs[completions.mask], atol=1e-5)


def test_join_says_what_is_wrong():
    completions = completions_of([[1]], [[True]])
    with pytest.raises(ValueError, match=r"join: prompts has shape \(2,\), expected 2 dimensions"):
        join(torch.tensor([1, 2]), torch.tensor([1]), completions)
    with pytest.raises(TypeError, match=r"join: lengths has dtype torch\.float32"):
        join(torch.tensor([[1, 2]]), torch.tensor([1.0]), completions)
