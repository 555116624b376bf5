"""Completion of prompts through an executor: in the order of their lengths, with results in the prompts' order."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.batches import PromptBatch
from rlhf.data.collate import prompt_batches
from rlhf.execution.executor import Executor
from rlhf.io.tokenizer import Tokenizer
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.decode_state import decode_steps
from rlhf.models.decoding import Completions, generate_completions
from rlhf.types import FrozenParams, Params


def default_length(context: int) -> int:
    """Return the default of `max_new_tokens`: 64, or half of a shorter context."""
    return max(1, min(64, context // 2))


def complete(
    executor: Executor, prompts: Sequence[np.ndarray], keys: Tensor, *, rows: int, name: str = "rollout"
) -> Completions:
    """Complete all prompts with one of the program's `eval_fns`.

    Args:
        executor: executor of a program that has the function, made by `make_completion_fn`.
        prompts: token ids, each [n] int.
        keys: [len(prompts), 2] int32, one key per prompt.
        rows: number of prompts per micro-batch.
        name: name of the function in the program.

    Returns:
        The completions in the order of the prompts, [len(prompts), ...].
    """
    batches = prompt_batches(prompts, keys, rows=rows)
    results = executor.map(name, [batch for batch, _ in batches])
    to_prompt_order = torch.argsort(torch.tensor([number for _, numbers in batches for number in numbers]))
    return Completions(*(torch.cat(parts)[to_prompt_order] for parts in zip(*results, strict=True)))


def decode_completions(tokenizer: Tokenizer, completions: Completions) -> list[str]:
    """Return the text of every completion, without its stop token."""
    lengths = completions.mask.sum(dim=1) - completions.ended.long()
    rows = zip(completions.tokens.tolist(), lengths.tolist(), strict=True)
    return [tokenizer.decode(tokens[:length]) for tokens, length in rows]


def make_completion_fn(
    config: ModelShape,
    *,
    dtype: torch.dtype = torch.float32,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    max_concurrent: int | None = None,
    draw: Callable[..., Any] = decode_steps,
) -> Callable[[Params, FrozenParams, PromptBatch], Completions]:
    """Return a function (params, frozen, PromptBatch) -> `Completions` of the policy.

    Completions have values if there is params["value_head"].

    Args:
        config: shape of the policy.
        dtype: dtype of the forward pass.
        max_new_tokens: maximum number of tokens per completion, at least 1.
        min_new_tokens: number of tokens before which no stop token is drawn.
        temperature: softmax temperature, above 0.
        top_k: number of most likely tokens to draw from; 0 keeps all, 1 is greedy.
        top_p: probability of the most likely tokens to draw from, in (0, 1]; 1 keeps all.
        stop_tokens: ids of the tokens that end a completion.
        max_concurrent: maximum number of completions in progress at a time; None sets no limit.
        draw: `decode_steps`, or its compiled form (`rlhf.execution.draws`). On a CPU each call of that form then
            computes at least 16 layers (32 with one row), which makes the overhead of the call small.
    """
    per_call = 1 if draw is decode_steps else max(1, (32 if max_concurrent == 1 else 16) // config.n_layer)
    decoder = architecture_of(config)

    def rollout(params: Params, frozen: FrozenParams, batch: PromptBatch) -> Completions:
        return generate_completions(
            decoder.prepare_for_decoding(params["policy"], dtype),
            batch.prompts,
            batch.lengths,
            batch.keys,
            config=config,
            source=batch.source,
            max_concurrent=max_concurrent,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            value_head=params.get("value_head"),
            draw=draw,
            draws_per_call=per_call if batch.prompts.is_cpu else None,
        )

    return rollout
