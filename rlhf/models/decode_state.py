"""The state of completions in progress, one per row of a key-value cache, and the functions that advance it."""

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
    """[R, D] hidden state that predicts the next token."""
    completion: Tensor
    """[R] int64 index of the completion that a row writes; in an idle row, the number of completions."""
    prompt_length: Tensor
    """[R] int64 number of tokens of the prompt."""
    step: Tensor
    """[R] int64 index of the next token in the completion."""


@documented
class DecodeOutput(NamedTuple):
    """The tokens drawn by `decode_steps`, K per row."""

    completion: Tensor
    """[K, R] int64 `DecodeState.completion` when the token was drawn."""
    step: Tensor
    """[K, R] int64 index of the token in the completion."""
    token: Tensor
    """[K, R] int64 tokens."""
    per_token: Tensor
    """[K, R, 3] float32 log-probs (nats), values (reward units) and entropies (nats)."""


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
    """Draw `count` tokens in every row, each from the state after the last. This part of decoding may be compiled.

    Args:
        params: parameters that are prepared for decoding (`Architecture.prepare_for_decoding`).
        value_head: head whose values are captured. None captures zeros.
        state: state before the draws, whose cache is written in place.
        uniforms: [N + 1, max_new_tokens] float64 uniforms of each of the N completions, and of idle rows.
        stops: [K] int64 ids of the tokens that end a completion.
        slots: [U] int64 slots 0..U-1 of the cache that attention reads. Only their number is used; a tensor keeps it
            symbolic in compiled code.
        config: shape of `params`.
        count: number of tokens to draw per row.
        temperature: softmax temperature, above 0.
        top_k: number of tokens to sample from; 0 keeps all, and 1 is greedy.
        top_p: probability of the tokens to sample from, in (0, 1].
        min_new_tokens: number of completion tokens before which no stop token is drawn.
        with_entropies: True to capture the entropies; otherwise they are zeros.

    Returns:
        The state after the draws, in which a row whose completion has ended is idle, and the tokens.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> state = init_decode_state(params, 1, 8, 1, config)
        >>> prompts = torch.tensor([[1]]), torch.tensor([1]), torch.tensor([0])
        >>> state = fill_rows(params, prompts, config, state, [0], 0)
        >>> uniforms, stops = torch.full((2, 4), 0.5, dtype=torch.float64), torch.tensor([0])
        >>> options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": 2, "with_entropies": False}
        >>> state, drawn = decode_steps(
        ...     params, None, state, uniforms, stops, torch.arange(8), config=config, count=2, **options
        ... )
        >>> drawn.token.shape, drawn.step.flatten().tolist()
        (torch.Size([2, 1]), [0, 1])
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
        params: parameters that are prepared for decoding.
        rows: number of rows.
        capacity: number of slots that the longest prompt and its completion need.
        idle: index that stands for no completion: the number of completions.
        config: shape of `params`.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> init_decode_state(params, rows=2, capacity=8, idle=3, config=config).completion
        tensor([3, 3])
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
    """Return the state after starting the completions `first`, `first + 1`, …; each of their prompts is read once.

    Args:
        params: parameters that are prepared for decoding.
        prompts: prompts [U, P] int64, right-padded; their lengths [U] int64; the prompt of each completion [B] int64.
        config: shape of `params`.
        state: state before the change, whose cache is written in place.
        rows: rows to fill, one per completion.
        first: index of the first completion to start.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> prompts = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), torch.tensor([0, 1])
        >>> state = fill_rows(params, prompts, config, init_decode_state(params, 2, 8, 2, config), [0, 1], 0)
        >>> state.prompt_length
        tensor([2, 1])
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
    """Return the state of the given rows alone, in new memory.

    Args:
        state: state of all rows.
        rows: rows to keep, in their new order.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> state = init_decode_state(rlhf.gpt2.init(config, key=rlhf.random.key(0)), 3, 8, 3, config)
        >>> select_rows(state, [2]).hidden.shape
        torch.Size([1, 4])
    """
    index = torch.tensor(rows, device=state.hidden.device)
    return tree_map(lambda leaf: torch.index_select(leaf, 0, index, out=torch.empty_like(leaf[: len(index)])), state)
