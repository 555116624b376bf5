"""Drawing tokens: filters, one draw by inverse CDF, and whole completions with a key-value cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_integer, check_rank, check_value
from rlhf.gpt2 import KVCache, decode, init_cache, prefill
from rlhf.gpt2_config import GPT2Config
from rlhf.heads import apply_head
from rlhf.ops import entropy, scale_logits, token_log_probs
from rlhf.random import uniform_at
from rlhf.types import Params

_BLOCK = 32
"""Slots by which the part of the cache that attention reads grows."""
_REFILLS = 8
"""Rows are refilled when one in so many is idle: reading one prompt at a time would cost more than it brings."""
_LOOK_EVERY = 16
"""Steps after which a GPU is asked which rows have ended; waiting for it at every step would leave it idle."""


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
    entropies: Tensor
    """[B, T] float32, nats: entropy of the distribution each token's log-prob is of; zeros where not asked for."""


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
    source: Tensor | None = None,
    slots: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
    value_head: Params | None = None,
    with_entropies: bool = False,
) -> Completions:
    """Complete prompts, capturing log-probs and values on the way.

    Token t of a completion is drawn with `uniform_at(its key, t)`, so a completion depends on its prompt and its key
    and on no other. Filters and `min_new_tokens` shape what is drawn; the log-probs are those of the unfiltered
    softmax(logits / temperature), the same as in the reference and in the update.

    Completions are made in the rows of a key-value cache. The row of one that has ended goes to the next; when none
    is waiting and half of the rows are idle, they are dropped. Attention reads the filled part of the cache alone.

    Args:
        params: GPT-2 parameters.
        prompts: [U, P] int64, right-padded with any valid token.
        prompt_lengths: [U] int64, at least 1.
        keys: [B, 2] int32, one key per completion.
        config: the shape of `params`.
        max_new_tokens: at least 1; P + max_new_tokens must fit in n_positions.
        source: [B] int64, the prompt of each completion; completions that start together read a common prompt once.
            None completes every prompt once.
        slots: rows of the cache: completions made at a time; None is all of them.
        temperature: above 0.
        top_k: 0 keeps all tokens, 1 is greedy.
        top_p: in (0, 1].
        min_new_tokens: completion tokens before which no stop token is drawn.
        stop_tokens: token ids that end a completion; empty runs every one to max_new_tokens.
        value_head: values are captured where given.
        with_entropies: capture entropies, too.

    Raises:
        ValueError: shapes or numbers are out of range.
        TypeError: prompts are not int64.
    """
    check_integer("generate", prompts=prompts, prompt_lengths=prompt_lengths)
    check_rank("generate", 2, prompts=prompts, keys=keys)
    room, device, count = config.n_positions - prompts.shape[1], prompts.device, len(keys)
    check_value("generate", 1 <= max_new_tokens <= room, f"in [1, {room}]", max_new_tokens=max_new_tokens)
    check_value("generate", slots is None or slots >= 1, "at least 1", slots=slots)
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    draws = uniform_at(keys[:, None], torch.arange(max_new_tokens, device=device))
    draws = torch.cat([draws, draws[:1]])  # idle rows draw something, too, and write it behind the completions
    unembedding = params["wte"]["weight"].to(params["ln_f"]["weight"].dtype).T

    def draw(batch: _Batch) -> tuple[Tensor, Tensor]:
        """Each row's next token [S], and log-prob, value and entropy [S, 3]."""
        logits = scale_logits(batch.hidden @ unembedding, temperature)
        allowed = logits
        if min_new_tokens:
            early = (batch.step < min_new_tokens)[:, None]
            allowed = torch.where(early, logits.index_fill(-1, stops, -torch.inf), logits)
        filtered = filter_logits(allowed, top_k=top_k, top_p=top_p)
        token = sample_token(filtered, draws[batch.completion, batch.step])
        zeros = logits.new_zeros(len(token))
        value = zeros if value_head is None else apply_head(value_head, batch.hidden)
        spread = entropy(logits) if with_entropies else zeros
        return token, torch.stack([token_log_probs(logits, token), value, spread], dim=1)

    size = min(slots or count, count)
    cache = init_cache(params, size, prompts.shape[1] + max_new_tokens, config=config)
    nothing = torch.zeros(size, dtype=torch.int64, device=device)
    batch = _Batch(cache, unembedding.new_zeros(size, config.n_embd), nothing + count, nothing, nothing)
    tokens = torch.full((count + 1, max_new_tokens), -1, device=device)
    captured = torch.zeros(count + 1, max_new_tokens, 3, device=device)
    sources = list(range(count)) if source is None else source.tolist()
    lengths = prompt_lengths.tolist()
    filled, left = [0] * size, [0] * size  # by row: tokens in the cache, tokens still to come; 0 is idle
    begun = steps = 0
    while begun < count or any(left):
        idle = [row for row, n in enumerate(left) if not n]
        if begun < count and len(idle) >= max(1, size // _REFILLS):
            chosen = list(zip(idle, range(begun, count), strict=False))
            batch = _fill(batch, params, config, prompts, prompt_lengths, lengths, sources, chosen)
            begun += len(chosen)
            for row, begins in chosen:
                filled[row], left[row] = lengths[sources[begins]], max_new_tokens
        elif begun == count and size > 1 and len(idle) >= size - size // 2:
            size //= 2
            kept = sorted(sorted(range(len(left)), key=lambda row: not left[row])[:size])
            batch, filled, left = _keep(batch, kept), [filled[row] for row in kept], [left[row] for row in kept]
        token, figures = draw(batch)
        tokens[batch.completion, batch.step] = token
        captured[batch.completion, batch.step] = figures
        filled, left, steps = [n + 1 for n in filled], [max(n - 1, 0) for n in left], steps + 1
        completion = batch.completion
        if stop_tokens or not all(left):
            ended = (token[:, None] == stops).any(1) | (batch.step == max_new_tokens - 1)
            completion = torch.where(ended, count, completion)
            if device.type == "cpu" or steps % _LOOK_EVERY == 0:
                left = [0 if done else n for n, done in zip(left, (completion == count).tolist(), strict=True)]
        hidden = batch.hidden
        if any(left):
            used = max(n for n, more in zip(filled, left, strict=True) if more)
            used = min(-(-used // _BLOCK) * _BLOCK, cache.kv.shape[2])
            hidden = decode(params, token, batch.start + batch.step, batch.cache, config=config, used=used)
        batch = batch._replace(
            hidden=hidden, completion=completion, step=(batch.step + 1).clamp(max=max_new_tokens - 1)
        )
    tokens, captured = tokens[:count], captured[:count]
    mask = tokens >= 0
    ended = (mask & torch.isin(tokens, stops)).any(1)
    log_probs, values, entropies = captured.unbind(dim=2)
    return Completions(tokens.clamp(min=0), mask, log_probs, values, ended, entropies)


class _Batch(NamedTuple):
    """The rows that are being written."""

    cache: KVCache
    hidden: Tensor
    """[S, D]: the state that predicts the next token."""
    completion: Tensor
    """[S] int64: which completion a row writes; their number where it is idle."""
    start: Tensor
    """[S] int64: tokens of its prompt."""
    step: Tensor
    """[S] int64: place of its next token in the completion."""


def _fill(
    batch: _Batch,
    params: Params,
    config: GPT2Config,
    prompts: Tensor,
    prompt_lengths: Tensor,
    lengths: list[int],
    sources: list[int],
    chosen: list[tuple[int, int]],
) -> _Batch:
    """Start completions in idle rows: `chosen` are pairs of row and completion."""
    wanted = sorted({sources[completion] for _, completion in chosen})
    place = {prompt: number for number, prompt in enumerate(wanted)}
    width = max(lengths[prompt] for prompt in wanted)
    unique, rows, completions, source = (
        torch.tensor(numbers, device=prompts.device)
        for numbers in (wanted, *zip(*((row, c, place[sources[c]]) for row, c in chosen), strict=True))
    )
    hidden = prefill(
        params, prompts[unique, :width], prompt_lengths[unique], batch.cache, config=config, rows=rows, source=source
    )
    return _Batch(
        batch.cache,
        batch.hidden.index_copy(0, rows, hidden),
        batch.completion.index_copy(0, rows, completions),
        batch.start.index_copy(0, rows, prompt_lengths[unique][source]),
        batch.step.index_fill(0, rows, 0),
    )


def _keep(batch: _Batch, rows: list[int]) -> _Batch:
    """The batch of some of its rows."""
    kept = torch.tensor(rows, device=batch.hidden.device)
    rest = (leaf.index_select(0, kept) for leaf in batch[1:])
    return _Batch(KVCache(batch.cache.kv.index_select(1, kept)), *rest)
