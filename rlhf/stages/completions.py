"""Completing prompts through an executor, in length order, and putting the results back in the prompts' order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf.data.batching import prompt_batches
from rlhf.execution.executor import Executor
from rlhf.io.tokenizer import Tokenizer
from rlhf.sampling import Completions


def default_length(context: int) -> int:
    """Tokens of the longest completion where nobody says how many: 64, or half of a shorter context."""
    return max(1, min(64, context // 2))


def complete(
    executor: Executor, prompts: Sequence[np.ndarray], keys: Tensor, *, rows: int, name: str = "rollout"
) -> Completions:
    """Run a map of the program that makes completions on all prompts.

    Args:
        executor: its program has the map (`rlhf.objectives.make_rollout`).
        prompts: token ids, each [n].
        keys: [len(prompts), 2] int32: the randomness of each.
        rows: prompts per micro-batch.
        name: of the map.
    """
    batches = prompt_batches(prompts, keys, rows=rows)
    results = executor.map(name, [batch for batch, _ in batches])
    back = torch.argsort(torch.tensor([number for _, numbers in batches for number in numbers]))
    return Completions(*(torch.cat(parts)[back] for parts in zip(*results, strict=True)))


def texts_of(tokenizer: Tokenizer, completions: Completions) -> list[str]:
    """The text of every completion, without its stop token."""
    lengths = completions.mask.sum(dim=1) - completions.ended.long()
    rows = zip(completions.tokens.tolist(), lengths.tolist(), strict=True)
    return [tokenizer.decode(tokens[:length]) for tokens, length in rows]
