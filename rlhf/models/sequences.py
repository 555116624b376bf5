"""Sequences that consist of a prompt and its completion, in one tensor."""

import torch
from torch import Tensor

from rlhf.checks import check_integer, check_mask, check_rank
from rlhf.models.decoding import Completions


def join(prompts: Tensor, lengths: Tensor, completions: Completions) -> tuple[Tensor, Tensor]:
    """Return every prompt followed immediately by its completion.

    A model of `tokens[:, :-1]` gives the log-probs of `tokens[:, 1:]`, which have the layout of `mask[:, 1:]`.

    Args:
        prompts: [B, P] int64, right-padded.
        lengths: [B] int64 number of tokens of each prompt.
        completions: [B, T] completions of the prompts, a result of `generate_completions`.

    Returns:
        The tokens [B, P + T] int64, right-padded with 0, and a mask [B, P + T] bool, True on the tokens of completions.

    Raises:
        ValueError: shapes do not match.
        TypeError: tokens or lengths are not int64.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params, keys = rlhf.gpt2.init(config, key=rlhf.random.key(0)), rlhf.random.split(rlhf.random.key(1), 2)
        >>> prompts, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
        >>> out = rlhf.generate_completions(params, prompts, lengths, keys, config=config, max_new_tokens=2)
        >>> tokens, mask = join(prompts, lengths, out)
        >>> mask.int().tolist()
        [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    """
    check_rank("join", 2, prompts=prompts, tokens=completions.tokens)
    check_rank("join", 1, lengths=lengths)
    check_integer("join", prompts=prompts, lengths=lengths, tokens=completions.tokens)
    check_mask("join", completions.mask, tokens=completions.tokens)
    width, longest = prompts.shape[1], completions.tokens.shape[1]
    place = torch.arange(width + longest, device=prompts.device)
    step = place - lengths[:, None]  # of the completion; negative in the prompt
    source = torch.where(step < 0, place, (width + step).clamp(max=width + longest - 1))
    inside = step < longest
    tokens = torch.cat([prompts, completions.tokens], dim=1).gather(1, source)
    mask = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), completions.mask], dim=1).gather(1, source)
    return torch.where(inside, tokens, 0), mask & inside
