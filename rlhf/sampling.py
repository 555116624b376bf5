"""Drawing tokens: filters, one draw by inverse CDF, and whole completions with a key-value cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_integer, check_rank, check_value
from rlhf.gpt2 import decode, init_cache, prefill, unembed
from rlhf.gpt2_config import GPT2Config
from rlhf.heads import apply_head
from rlhf.ops import scale_logits, token_log_probs
from rlhf.random import uniform_at
from rlhf.types import Params


class Completions(NamedTuple):
    """What `generate` returns; right-padded to max_new_tokens, 0 (False) after each row's end."""

    tokens: Tensor
    """[B, T] int64; a stop token, if one was drawn, is the last."""
    mask: Tensor
    """[B, T] bool, True on the completion's tokens, the stop token included."""
    log_probs: Tensor
    """[B, T] float32, nats: `token_log_probs` of each token, before any filter."""
    values: Tensor
    """[B, T] float32, value head on the state in which each token was chosen; zeros without a head."""
    ended: Tensor
    """[B] bool: whether a stop token was drawn."""


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set to -inf every token outside the `top_k` most likely, and outside the nucleus of mass `top_p`.

    Source: Fan et al. 2018, https://arxiv.org/abs/1805.04833 (top-k); Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751 (nucleus: the smallest set whose probability reaches p).

    Args:
        logits: [..., V] float, temperature applied.
        top_k: tokens kept; 0 keeps all. Tokens that tie with the k-th stay.
        top_p: in (0, 1]; 1 keeps all. At least one token stays.

    Returns:
        [..., V].

    Raises:
        ValueError: top_k or top_p is out of range.
    """
    check_value("filter_logits", top_k >= 0, "at least 0", top_k=top_k)
    check_value("filter_logits", 0 < top_p <= 1, "in (0, 1]", top_p=top_p)
    if 0 < top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = torch.where(logits >= weakest, logits, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ranked.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # mass of the more likely tokens
        dropped = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = torch.where(dropped, -torch.inf, logits)
    return logits


def sample_token(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw from softmax(logits) by inverse CDF: the first token whose cumulative probability exceeds `uniform`.

    Args:
        logits: [..., V] float; -inf never drawn.
        uniform: [...] float32 in [0, 1), multiples of 2**-23 (`rlhf.random.uniform_at`).

    Returns:
        [...] int64.
    """
    cumulative = scale_logits(logits, 1.0).softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform.unsqueeze(-1).to(cumulative.dtype) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def generate(
    params: Params,
    prompts: Tensor,
    prompt_lengths: Tensor,
    keys: Tensor,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
    value_head: Params | None = None,
) -> Completions:
    """Complete every prompt, capturing log-probs and values on the way.

    Token t of a row is drawn with `uniform_at(key of the row, t)`, so a completion depends on its prompt and its key
    and on no other row. Filters and `min_new_tokens` shape what is drawn; the log-probs are those of the unfiltered
    softmax(logits / temperature), the same as in the reference and in the update.

    Args:
        params: GPT-2 parameters.
        prompts: [B, P] int64, right-padded with any valid token.
        prompt_lengths: [B] int64, at least 1.
        keys: [B, 2] int32, one key per row.
        config: the shape of `params`.
        max_new_tokens: at least 1; P + max_new_tokens must fit in n_positions.
        temperature: above 0.
        top_k: 0 keeps all tokens, 1 is greedy.
        top_p: in (0, 1].
        min_new_tokens: completion tokens before which no stop token is drawn.
        stop_tokens: token ids that end a row; empty runs every row to max_new_tokens.
        value_head: values are captured where given.

    Raises:
        ValueError: shapes or numbers are out of range.
        TypeError: prompts are not int64.
    """
    check_integer("generate", prompts=prompts, prompt_lengths=prompt_lengths)
    check_rank("generate", 2, prompts=prompts, keys=keys)
    rows, width = prompts.shape
    room = config.n_positions - width
    check_value("generate", 1 <= max_new_tokens <= room, f"in [1, {room}]", max_new_tokens=max_new_tokens)
    device = prompts.device
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    draws = uniform_at(keys[:, None], torch.arange(max_new_tokens, device=device))
    cache = init_cache(params, rows, width + max_new_tokens, config=config)
    hidden = prefill(params, prompts, prompt_lengths, cache, config=config)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for step in range(max_new_tokens):
        logits = scale_logits(unembed(params, hidden), temperature)
        allowed = logits.index_fill(-1, stops, -torch.inf) if step < min_new_tokens else logits
        token = sample_token(filter_logits(allowed, top_k=top_k, top_p=top_p), draws[:, step])
        value = torch.zeros(rows, device=device) if value_head is None else apply_head(value_head, hidden)
        steps.append((token, alive, token_log_probs(logits, token), value))
        alive = alive & ~torch.isin(token, stops)
        if step + 1 == max_new_tokens or not alive.any():
            break
        used = width + step + 1
        hidden = decode(params, token, prompt_lengths + step, cache, config=config, used=used)
    tokens, mask, log_probs, values = (
        torch.nn.functional.pad(torch.stack(column, dim=1), (0, max_new_tokens - len(steps)))
        for column in zip(*steps, strict=True)
    )
    return Completions(
        torch.where(mask, tokens, 0), mask, torch.where(mask, log_probs, 0.0), torch.where(mask, values, 0.0), ~alive
    )
