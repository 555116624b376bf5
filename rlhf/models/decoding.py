"""Completing prompts with a key-value cache: the decoding engine of every architecture."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.checks import check_integer, check_rank, check_same_shape, check_value
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.heads import apply_head
from rlhf.ops import entropy, scale_logits, token_log_probs
from rlhf.random import uniform_at
from rlhf.sampling import filter_logits, sample_token
from rlhf.transforms import check_untransformed
from rlhf.tree import leaves, tree_map
from rlhf.types import Params

_BLOCK = 32
"""Slots by which the part of the cache that attention reads grows."""
_UNTRANSFORMED = (
    "the host asks which rows have ended, and the cache is written in place; give one key per completion instead of "
    "mapping, and differentiate the log-probs of finished completions"
)
_REFILLS = 8
"""Rows are refilled when one in so many is idle: reading one prompt at a time would cost more than it brings."""


class Completions(NamedTuple):
    """What `generate_completions` returns; right-padded to max_new_tokens, 0 (False) after each row's end."""

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


class DecodeState(NamedTuple):
    """Completions in progress, one per row."""

    cache: Any
    """Of the architecture: leaves [S, ...]."""
    hidden: Tensor
    """[S, D]: the state that predicts the next token."""
    completion: Tensor
    """[S] int64: which completion a row writes; their number where it is idle."""
    start: Tensor
    """[S] int64: tokens of its prompt."""
    step: Tensor
    """[S] int64: place of its next token in the completion."""


class DecodeOutput(NamedTuple):
    """Tokens that `decode_steps` drew, K per row."""

    completion: Tensor
    """[K, S] int64: as in `DecodeState`, when the token was drawn."""
    step: Tensor
    """[K, S] int64: its place in the completion."""
    token: Tensor
    """[K, S] int64."""
    per_token: Tensor
    """[K, S, 3] float32: log-prob, value, entropy."""


def decode_steps(
    params: Params,
    value_head: Params | None,
    batch: DecodeState,
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
    """Draw `count` tokens in every row and read them: the part of `generate_completions` that may be compiled.

    Args:
        params: prepared for decoding (`Architecture.prepare_for_decoding`).
        value_head: values are captured where given.
        batch: its cache is written in place.
        uniforms: [N + 1, max_new_tokens] float64: the draws of each of the N completions, and of idle rows.
        stops: int64 ids of the tokens that end a completion.
        slots: [U] int64, 0..U-1: the slots of the cache that are looked at, past those of every row `count` tokens on.
        config: the shape of `params`.
        count: tokens drawn per row.
        temperature: of `generate_completions`, as all that follow.
        top_k: same.
        top_p: same.
        min_new_tokens: same.
        with_entropies: same.
    """
    idle, last = uniforms.shape[0] - 1, uniforms.shape[1] - 1
    decoder = architecture_of(config)
    drawn = []
    for _ in range(count):
        raw = decoder.logits(params, batch.hidden[:, None], config=config, padded=True)[:, 0]
        logits = allowed = scale_logits(raw, temperature)
        if min_new_tokens:
            early = (batch.step < min_new_tokens)[:, None]
            stopless = logits.scatter(-1, stops.expand(len(logits), -1), -torch.inf)
            allowed = torch.where(early, stopless, logits)
        filtered = filter_logits(allowed, top_k=top_k, top_p=top_p)
        token = sample_token(filtered, uniforms[batch.completion, batch.step])
        zeros = torch.zeros_like(logits[:, 0])
        value = zeros if value_head is None else apply_head(value_head, batch.hidden)
        spread = entropy(logits) if with_entropies else zeros
        per_token = torch.stack([token_log_probs(logits, token), value, spread], dim=1)
        drawn.append(DecodeOutput(batch.completion, batch.step, token, per_token))
        ended = (token[:, None] == stops).any(1) | (batch.step == last)
        batch = DecodeState(  # torch 2.11 compiles `_replace` to a tuple of nothing
            batch.cache,
            decoder.decode(
                params, token, batch.start + batch.step, batch.cache, config=config, cache_length=len(slots)
            ),
            torch.where(ended, idle, batch.completion),
            batch.start,
            (batch.step + 1).clamp(max=last),
        )
    return batch, DecodeOutput(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def align_left(prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompts [U, P] padded on the right, and their lengths [U].

    Args:
        prompts: padded on either side.
        mask: [U, P] bool, True on the tokens of each.

    Raises:
        ValueError: shapes differ, or a mask has holes.
    """
    check_same_shape("align_left", prompts=prompts, mask=mask)
    lengths, first = mask.sum(dim=1), mask.long().argmax(dim=1)
    place = torch.arange(prompts.shape[1], device=prompts.device)
    is_inside = (place >= first[:, None]) & (place < (first + lengths)[:, None])
    check_value("align_left", torch.equal(is_inside, mask), "without holes", mask=mask.int().tolist())
    shifted = (place + first[:, None]).clamp(max=prompts.shape[1] - 1)
    return prompts.gather(1, shifted), lengths


def _check_limits(room: int, max_new_tokens: int, min_new_tokens: int, max_concurrent: int | None) -> None:
    """Check the numbers that say how long completions are, and how many are made at a time."""
    function = "generate_completions"
    check_value(function, 1 <= max_new_tokens <= room, f"in [1, {room}]", max_new_tokens=max_new_tokens)
    check_value(function, max_concurrent is None or max_concurrent >= 1, "at least 1", max_concurrent=max_concurrent)
    is_reachable = 0 <= min_new_tokens <= max_new_tokens
    check_value(function, is_reachable, f"in [0, {max_new_tokens}]", min_new_tokens=min_new_tokens)


def _sources(source: Tensor | None, prompts: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The prompt of each of `count` completions, as given or one each, and its length."""
    if source is None:
        check_value("generate_completions", count == len(prompts), f"{len(prompts)}, one per prompt", keys=count)
        source = torch.arange(count, device=prompts.device)
    starts, longest = lengths[source].tolist(), prompts.shape[1]
    fit = all(1 <= length <= longest for length in starts)
    check_value("generate_completions", fit, f"in [1, {longest}]", prompt_lengths=starts)
    return source, starts


@torch.no_grad()
def generate_completions(
    params: Params,
    prompts: Tensor,
    prompt_lengths: Tensor,
    keys: Tensor,
    *,
    config: ModelShape,
    max_new_tokens: int,
    source: Tensor | None = None,
    max_concurrent: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
    value_head: Params | None = None,
    with_entropies: bool = False,
    draw: Callable[..., tuple[DecodeState, DecodeOutput]] = decode_steps,
    draws_per_call: int | None = None,
) -> Completions:
    """Complete prompts, capturing log-probs and values on the way.

    Token t of a completion is drawn with `uniform_at(its key, t)`, so a completion depends on its prompt and its key
    and on no other. Filters and `min_new_tokens` shape what is drawn; the log-probs are those of the unfiltered
    softmax(logits / temperature), the same as in the reference and in the update.

    Completions are made in the rows of a key-value cache. The row of one that has ended goes to the next; when none
    is waiting and half of the rows are idle, they are dropped. Attention reads the filled part of the cache alone.

    Args:
        params: prepared for decoding (`Architecture.prepare_for_decoding`).
        prompts: [U, P] int64, right-padded with any valid token.
        prompt_lengths: [U] int64, at least 1; or [U, P] bool, True on the prompts' tokens, where they are padded on the
            left, or on either side.
        keys: [B, 2] int32, one key per completion.
        config: the shape of `params`.
        max_new_tokens: at least 1; P + max_new_tokens must fit in n_positions.
        source: [B] int64, the prompt of each completion, read once for all that start together; None is 0..U-1.
        max_concurrent: rows of the cache: completions made at a time; None is all of them.
        temperature: above 0.
        top_k: 0 keeps all tokens, 1 is greedy.
        top_p: in (0, 1].
        min_new_tokens: completion tokens before which no stop token is drawn.
        stop_tokens: token ids that end a completion; empty runs every one to max_new_tokens.
        value_head: values are captured where given.
        with_entropies: capture entropies, too.
        draw: `decode_steps`, or a compiled form of it.
        draws_per_call: tokens drawn before it is asked which rows have ended; None is 1, and up to 16 on a GPU.

    Raises:
        ValueError: shapes or numbers are out of range, or a mask has holes.
        TypeError: prompts are not int64.
        RuntimeError: it is called under a transform of `torch.func`, such as `vmap`.
    """
    check_untransformed("generate_completions", _UNTRANSFORMED)
    check_rank("generate_completions", 2, prompts=prompts, keys=keys)
    if prompt_lengths.dtype == torch.bool:
        prompts, prompt_lengths = align_left(prompts, prompt_lengths)
    check_integer("generate_completions", prompts=prompts, prompt_lengths=prompt_lengths)
    device, count = prompts.device, len(keys)
    _check_limits(config.n_positions - prompts.shape[1], max_new_tokens, min_new_tokens, max_concurrent)
    per_call = draws_per_call or steps_per_call(max_new_tokens, device)
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    uniforms = uniform_at(torch.cat([keys, keys[:1]])[:, None], torch.arange(max_new_tokens, device=device))
    source, starts = _sources(source, prompts, prompt_lengths, count)
    tokens = torch.full((count + 1, max_new_tokens), -1, device=device)  # idle rows write into the last
    per_token = torch.zeros(count + 1, max_new_tokens, 3, device=device)
    capacity = prompts.shape[1] + max_new_tokens
    batch = _idle_rows(params, min(max_concurrent or count, count), capacity, count, config)
    started = 0
    used, full = ([0] * len(batch.step) for _ in range(2))  # slots of each row's cache: now, and at the end
    while started < count or any(used):
        idle = [row for row, n in enumerate(used) if not n]
        if started < count and len(idle) >= max(1, len(used) // _REFILLS):
            rows = idle[: count - started]
            batch = _fill(params, batch, rows, started, prompts, prompt_lengths, source, config)
            for row in rows:
                used[row], full[row], started = starts[started], starts[started] + max_new_tokens, started + 1
        elif started == count and 2 < len(used) <= 2 * len(idle):
            rows = sorted(sorted(range(len(used)), key=lambda row: not used[row])[: len(used) // 2])
            batch, used, full = _keep(batch, rows), *([some[row] for row in rows] for some in (used, full))
        slots = attended_slots(max(used) + per_call, capacity, device)
        batch, drawn = draw(
            params, value_head, batch, uniforms, stops, slots, config=config, count=per_call, temperature=temperature,
            top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens, with_entropies=with_entropies,
        )  # fmt: skip
        tokens[drawn.completion, drawn.step], per_token[drawn.completion, drawn.step] = drawn.token, drawn.per_token
        used = [(n + per_call) * (0 < n < end - per_call) for n, end in zip(used, full, strict=True)]
        if stop_tokens:  # only then is the device waited for
            used = [n * (number < count) for n, number in zip(used, batch.completion.tolist(), strict=True)]
    return _completions(tokens[:count], per_token[:count], stops)


def _completions(tokens: Tensor, per_token: Tensor, stops: Tensor) -> Completions:
    """Return the completions of tokens [B, T], -1 after each end, and of what was captured with each [B, T, 3]."""
    log_probs, values, entropies = per_token.unbind(dim=2)
    mask = tokens >= 0
    ended = (mask & torch.isin(tokens, stops)).any(1)
    return Completions(tokens.clamp(min=0), mask, log_probs, values, ended, entropies)


def _idle_rows(params: Params, rows: int, capacity: int, idle: int, config: ModelShape) -> DecodeState:
    """Rows with an empty cache."""
    decoder = architecture_of(config)
    cache = decoder.init_cache(params, rows, capacity + 1, config=config)  # all of it is a case of its own if compiled
    like = leaves(cache)[0]
    nothing = torch.zeros(rows, dtype=torch.int64, device=like.device)
    return DecodeState(cache, like.new_zeros(rows, config.n_embd), nothing + idle, nothing, nothing)


def _fill(
    params: Params,
    batch: DecodeState,
    rows: list[int],
    first: int,
    prompts: Tensor,
    prompt_lengths: Tensor,
    source: Tensor,
    config: ModelShape,
) -> DecodeState:
    """Begin the completions from number `first` on in these rows."""
    row = torch.tensor(rows, device=prompts.device)
    number = torch.arange(first, first + len(rows), device=prompts.device)
    unique, place = torch.unique(source[number], return_inverse=True)
    lengths = prompt_lengths[unique]
    read = prompts[unique, : int(lengths.max())]
    hidden = architecture_of(config).prefill(params, read, lengths, batch.cache, config=config, rows=row, source=place)
    return DecodeState(
        batch.cache,
        batch.hidden.index_copy(0, row, hidden),
        batch.completion.index_copy(0, row, number),
        batch.start.index_copy(0, row, lengths[place]),
        batch.step.index_fill(0, row, 0),
    )


@accelerated("decode_schedule.steps_per_call")
def steps_per_call(max_new_tokens: int, device: torch.device) -> int:
    """Return how many tokens are decoded before it is asked which rows have ended."""
    return 1


@accelerated("decode_schedule.attended_slots")
def attended_slots(least: int, capacity: int, device: torch.device) -> Tensor:
    """Return the slots of the cache to look at, 0..U-1: a multiple of a block, so that few shapes occur."""
    blocks = -(-least // _BLOCK) * _BLOCK
    return torch.arange(min(blocks, capacity), device=device)


def _keep(batch: DecodeState, rows: list[int]) -> DecodeState:
    """Some of the rows."""
    kept = torch.tensor(rows, device=batch.hidden.device)
    return tree_map(lambda leaf: torch.index_select(leaf, 0, kept, out=torch.empty_like(leaf[: len(kept)])), batch)
