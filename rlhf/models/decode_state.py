"""Completions in progress, one per row of a key-value cache: rows are filled, decoded and dropped here."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.field_docs import documented
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.heads import apply_head
from rlhf.ops import entropy, scale_logits, token_log_probs
from rlhf.sampling import filter_logits, sample_token
from rlhf.tree import leaves, tree_map
from rlhf.types import Params


@documented
class DecodeState(NamedTuple):
    """The rows of a running decode; a row without a completion is idle."""

    cache: Any
    """The architecture's cache: leaves [R, ...]."""
    hidden: Tensor
    """[R, D]: the state that predicts the next token."""
    completion: Tensor
    """[R] int64: index of the completion that a row writes; in an idle row, the number of completions."""
    prompt_length: Tensor
    """[R] int64: tokens of its prompt."""
    step: Tensor
    """[R] int64: index of its next token in the completion."""


@documented
class DecodeOutput(NamedTuple):
    """The tokens drawn by `decode_steps`, K per row."""

    completion: Tensor
    """[K, R] int64: `DecodeState.completion` when the token was drawn."""
    step: Tensor
    """[K, R] int64: index of the token in the completion."""
    token: Tensor
    """[K, R] int64."""
    per_token: Tensor
    """[K, R, 3] float32: log-prob, value, entropy."""


def decode_steps(
    params: Params,
    value_head: Params | None,
    state: DecodeState,
    uniforms: Tensor,
    stops: Tensor,
    slots: Tensor,
    *,
    config: ModelShape,
    count: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_new_tokens: int,
    with_entropies: bool,
) -> tuple[DecodeState, DecodeOutput]:
    """Draw `count` tokens in every row, each from the state after the last: the part of decoding that may be compiled.

    Args:
        params: prepared for decoding (`Architecture.prepare_for_decoding`).
        value_head: the head whose values are captured; None captures zeros.
        state: its cache is written in place.
        uniforms: [N + 1, max_new_tokens] float64: the uniforms of each of the N completions, and of idle rows.
        stops: int64 ids of the tokens that end a completion.
        slots: [U] int64, 0..U-1: the slots of the cache that attention reads. Only the length is used; a tensor keeps
            it symbolic in compiled code.
        config: the shape of `params`.
        count: tokens drawn per row.
        temperature: as in `generate_completions`.
        top_k: as in `generate_completions`.
        top_p: as in `generate_completions`.
        min_new_tokens: as in `generate_completions`.
        with_entropies: as in `generate_completions`.

    Returns:
        (the state after the draws, the tokens drawn). A row whose completion has ended is idle.
    """
    idle, last = uniforms.shape[0] - 1, uniforms.shape[1] - 1
    decoder = architecture_of(config)
    outputs = []
    for _ in range(count):
        raw = decoder.logits(params, state.hidden[:, None], config=config, padded=True)[:, 0]
        logits = allowed = scale_logits(raw, temperature)
        if min_new_tokens:
            early = (state.step < min_new_tokens)[:, None]
            stopless = logits.scatter(-1, stops.expand(len(logits), -1), -torch.inf)
            allowed = torch.where(early, stopless, logits)
        filtered = filter_logits(allowed, top_k=top_k, top_p=top_p)
        token = sample_token(filtered, uniforms[state.completion, state.step])
        zeros = torch.zeros_like(logits[:, 0])
        value = zeros if value_head is None else apply_head(value_head, state.hidden)
        entropies = entropy(logits) if with_entropies else zeros
        per_token = torch.stack([token_log_probs(logits, token), value, entropies], dim=1)
        outputs.append(DecodeOutput(state.completion, state.step, token, per_token))
        ended = (token[:, None] == stops).any(1) | (state.step == last)
        position = state.prompt_length + state.step
        state = DecodeState(  # torch 2.11 compiles `_replace` to a tuple of nothing
            state.cache,
            decoder.decode(params, token, position, state.cache, config=config, cache_length=len(slots)),
            torch.where(ended, idle, state.completion),
            state.prompt_length,
            (state.step + 1).clamp(max=last),
        )
    return state, DecodeOutput(*(torch.stack(columns) for columns in zip(*outputs, strict=True)))


def init_decode_state(params: Params, rows: int, capacity: int, idle: int, config: ModelShape) -> DecodeState:
    """Return idle rows with an empty cache.

    Args:
        params: prepared for decoding.
        rows: how many.
        capacity: slots that the longest prompt and its completion need.
        idle: the `completion` of an idle row.
        config: the shape of `params`.
    """
    # One slot more than is ever read: compiled code would treat reading the whole cache as a case of its own.
    cache = architecture_of(config).init_cache(params, rows, capacity + 1, config=config)
    like = leaves(cache)[0]
    zeros = torch.zeros(rows, dtype=torch.int64, device=like.device)
    return DecodeState(cache, like.new_zeros(rows, config.n_embd), zeros + idle, zeros, zeros)


def fill_rows(
    params: Params,
    prompts: tuple[Tensor, Tensor, Tensor],
    config: ModelShape,
    state: DecodeState,
    rows: list[int],
    first: int,
) -> DecodeState:
    """Start the completions `first`, `first + 1`, … in these rows: read each of their prompts once.

    Args:
        params: prepared for decoding.
        prompts: right-padded [U, P] int64, their lengths [U] int64, and the prompt of each completion [B] int64.
        config: the shape of `params`.
        state: its cache is written in place.
        rows: rows to fill, one per completion.
        first: index of the first completion to start.
    """
    tokens, lengths, source = prompts
    row = torch.tensor(rows, device=tokens.device)
    completion = torch.arange(first, first + len(rows), device=tokens.device)
    unique, prompt = torch.unique(source[completion], return_inverse=True)
    lengths = lengths[unique]
    tokens = tokens[unique, : int(lengths.max())]
    prefill = architecture_of(config).prefill
    hidden = prefill(params, tokens, lengths, state.cache, config=config, rows=row, source=prompt)
    return DecodeState(
        state.cache,
        state.hidden.index_copy(0, row, hidden),
        state.completion.index_copy(0, row, completion),
        state.prompt_length.index_copy(0, row, lengths[prompt]),
        state.step.index_fill(0, row, 0),
    )


def select_rows(state: DecodeState, rows: list[int]) -> DecodeState:
    """Return the state of these rows alone, in memory of its own."""
    index = torch.tensor(rows, device=state.hidden.device)
    return tree_map(lambda leaf: torch.index_select(leaf, 0, index, out=torch.empty_like(leaf[: len(index)])), state)
