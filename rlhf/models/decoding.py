"""The decoding engine of all architectures, which completes prompts with a key-value cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.checks import check_integer, check_rank, check_same_shape, check_value
from rlhf.field_docs import documented
from rlhf.models.architecture import ModelShape
from rlhf.models.decode_state import DecodeOutput, DecodeState, decode_steps, fill_rows, init_decode_state, select_rows
from rlhf.random import uniform_at
from rlhf.transforms import check_untransformed
from rlhf.types import Params

_BLOCK = 32
"""Number of slots by which the part of the cache that attention reads grows."""
_REFILL_SHARE = 8
"""Rows are refilled when one in this many is idle; to read single prompts more often would cost more than it gains."""
_UNTRANSFORMED = (
    "the host asks which rows have ended, and the cache is written in place; give one key per completion instead of "
    "mapping, and differentiate the log-probs of finished completions"
)


@documented
class Completions(NamedTuple):
    """Completions of prompts, right-padded to max_new_tokens with 0 or False."""

    tokens: Tensor
    """[B, T] int64 tokens; a stop token, if one was drawn, is the last."""
    mask: Tensor
    """[B, T] bool, True on the completion's tokens, the stop token included."""
    log_probs: Tensor
    """[B, T] float32, nats: `token_log_probs` of each token before any filter."""
    values: Tensor
    """[B, T] float32, reward units: value of the state in which each token was chosen; zeros without a value head."""
    ended: Tensor
    """[B] bool, True where a stop token was drawn."""
    entropies: Tensor
    """[B, T] float32, nats: entropy of the unfiltered distribution of each token; zeros if they are not requested."""


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
    """Return completions of prompts, with the log-probs and values of their tokens.

    Token t of a completion is drawn with `uniform_at(key, t)`, so a completion depends on its prompt and its key alone.
    Filters and `min_new_tokens` shape what is drawn; log-probs are those of softmax(logits / temperature) before them.
    Completions are written in the rows of a key-value cache. When one ends, its row takes the next one; when none is
    waiting and half of the rows are idle, these rows are dropped. Attention reads only the filled part of the cache.

    Args:
        params: parameters that are prepared for decoding (`Architecture.prepare_for_decoding`).
        prompts: [U, P] int64, right-padded with any valid token.
        prompt_lengths: [U] int64 number of tokens of each prompt, at least 1. For prompts padded on the left or on
            either side: the mask [U, P] bool, True on their tokens.
        keys: [B, 2] int32 keys, one per completion.
        config: shape of `params`.
        max_new_tokens: largest number of tokens of a completion, at least 1 and at most n_positions - P.
        source: [B] int64 prompt of each completion. None stands for 0..U-1. Completions that start together share one
            reading of their prompt.
        max_concurrent: number of completions in progress at a time, the rows of the cache. None stands for B.
        temperature: softmax temperature, above 0.
        top_k: number of tokens to sample from; 0 keeps all, and 1 is greedy.
        top_p: probability of the tokens to sample from, in (0, 1].
        min_new_tokens: number of completion tokens before which no stop token is drawn.
        stop_tokens: ids of the tokens that end a completion. Without any, each has max_new_tokens tokens.
        value_head: head whose values are captured. None captures zeros.
        with_entropies: True to capture the entropies; otherwise they are zeros.
        draw: `decode_steps`, or a compiled form of it.
        draws_per_call: number of tokens drawn between checks for ended rows. None: 1 on a CPU, up to 16 on a GPU.

    Returns:
        Completions [B, max_new_tokens].

    Raises:
        ValueError: shapes or numbers are out of range, or a mask has holes.
        TypeError: prompts are not int64.
        RuntimeError: called under a transform of `torch.func`, such as `vmap`.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params, keys = rlhf.gpt2.init(config, key=rlhf.random.key(0)), rlhf.random.split(rlhf.random.key(1), 2)
        >>> prompts, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
        >>> generate_completions(params, prompts, lengths, keys, config=config, max_new_tokens=5).tokens.shape
        torch.Size([2, 5])
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
    fill = functools.partial(fill_rows, params, (prompts, prompt_lengths, source), config)

    def advance(state: DecodeState, least: int) -> tuple[DecodeState, DecodeOutput]:
        slots = attended_slots(least, capacity, device)
        return draw(
            params, value_head, state, uniforms, stops, slots, config=config, count=per_call, temperature=temperature,
            top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens, with_entropies=with_entropies,
        )  # fmt: skip

    state = init_decode_state(params, min(max_concurrent or count, count), capacity, count, config)
    for output in _decode(state, starts, max_new_tokens, per_call, fill, advance, may_stop=bool(stop_tokens)):
        tokens[output.completion, output.step] = output.token
        per_token[output.completion, output.step] = output.per_token
    return _completions(tokens[:count], per_token[:count], stops)


def _decode(
    state: DecodeState,
    starts: list[int],
    max_new_tokens: int,
    per_call: int,
    fill: Callable[[DecodeState, list[int], int], DecodeState],
    advance: Callable[[DecodeState, int], tuple[DecodeState, DecodeOutput]],
    *,
    may_stop: bool,
) -> Iterator[DecodeOutput]:
    """Yield the tokens of all completions as they are drawn, filling idle rows and dropping superfluous ones.

    Args:
        state: state whose rows are all idle.
        starts: number of slots that each completion's prompt takes.
        max_new_tokens: number of slots that the longest completion takes.
        per_call: number of tokens that `advance` draws per row.
        fill: function (state, rows, first) -> the state with the completions `first`, `first + 1`, … in these rows.
        advance: function (state, slots in use after it) -> the state and the tokens drawn.
        may_stop: True if a stop token may end a completion; only then does the host wait for the device.
    """
    count, first = len(starts), 0  # completions, and the index of the next one to start
    filled, limits = ([0] * len(state.step) for _ in range(2))  # slots of each row: in use (0 is idle), and at its end
    while first < count or any(filled):
        idle = [row for row, n in enumerate(filled) if not n]
        if first < count and len(idle) >= max(1, len(filled) // _REFILL_SHARE):
            rows = idle[: count - first]
            state = fill(state, rows, first)
            for row in rows:
                filled[row], limits[row], first = starts[first], starts[first] + max_new_tokens, first + 1
        elif first == count and 2 < len(filled) <= 2 * len(idle):
            rows = sorted(sorted(range(len(filled)), key=lambda row: not filled[row])[: len(filled) // 2])
            state, filled, limits = select_rows(state, rows), [filled[n] for n in rows], [limits[n] for n in rows]
        state, output = advance(state, max(filled) + per_call)
        yield output
        filled = [(n + per_call) * (0 < n < limit - per_call) for n, limit in zip(filled, limits, strict=True)]
        if may_stop:
            filled = [n * (index < count) for n, index in zip(filled, state.completion.tolist(), strict=True)]


def align_left(prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompts moved to the left edge, with all padding on the right, and their lengths.

    Args:
        prompts: [U, P] int64, padded on either side.
        mask: [U, P] bool, True on the tokens of each prompt.

    Returns:
        The prompts [U, P] int64, right-padded, and their lengths [U] int64.

    Raises:
        ValueError: shapes differ, or a mask has holes.

    Example:
        >>> prompts, lengths = align_left(torch.tensor([[0, 5, 6]]), torch.tensor([[False, True, True]]))
        >>> prompts[0, :2].tolist(), lengths.tolist()
        ([5, 6], [2])
    """
    check_same_shape("align_left", prompts=prompts, mask=mask)
    lengths, first = mask.sum(dim=1), mask.long().argmax(dim=1)
    place = torch.arange(prompts.shape[1], device=prompts.device)
    inside = (place >= first[:, None]) & (place < (first + lengths)[:, None])
    check_value("align_left", torch.equal(inside, mask), "without holes", mask=mask.int().tolist())
    shifted = (place + first[:, None]).clamp(max=prompts.shape[1] - 1)
    return prompts.gather(1, shifted), lengths


def _check_limits(room: int, max_new_tokens: int, min_new_tokens: int, max_concurrent: int | None) -> None:
    """Raise ValueError unless the lengths of completions and the number in progress are in range."""
    function = "generate_completions"
    check_value(function, 1 <= max_new_tokens <= room, f"in [1, {room}]", max_new_tokens=max_new_tokens)
    check_value(function, max_concurrent is None or max_concurrent >= 1, "at least 1", max_concurrent=max_concurrent)
    is_reachable = 0 <= min_new_tokens <= max_new_tokens
    check_value(function, is_reachable, f"in [0, {max_new_tokens}]", min_new_tokens=min_new_tokens)


def _sources(source: Tensor | None, prompts: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Return the prompt of each of `count` completions, one each if `source` is None, and these prompts' lengths."""
    if source is None:
        check_value("generate_completions", count == len(prompts), f"{len(prompts)}, one per prompt", keys=count)
        source = torch.arange(count, device=prompts.device)
    starts, longest = lengths[source].tolist(), prompts.shape[1]
    fit = all(1 <= length <= longest for length in starts)
    check_value("generate_completions", fit, f"in [1, {longest}]", prompt_lengths=starts)
    return source, starts


def _completions(tokens: Tensor, per_token: Tensor, stops: Tensor) -> Completions:
    """Return the record of tokens [B, T], -1 after each end, and of their log-probs, values, entropies [B, T, 3]."""
    log_probs, values, entropies = per_token.unbind(dim=2)
    mask = tokens >= 0
    ended = (mask & torch.isin(tokens, stops)).any(1)
    return Completions(tokens.clamp(min=0), mask, log_probs, values, ended, entropies)


@accelerated("decode_schedule.steps_per_call")
def steps_per_call(max_new_tokens: int, device: torch.device) -> int:
    """Return the number of tokens drawn between checks for ended rows.

    Args:
        max_new_tokens: maximum number of tokens of a completion.
        device: device of the computation.

    Example:
        >>> steps_per_call(32, torch.device("cpu"))
        1
    """
    return 1


@accelerated("decode_schedule.attended_slots")
def attended_slots(least: int, capacity: int, device: torch.device) -> Tensor:
    """Return the slots 0..U-1 that attention reads, [U] int64, in whole blocks, so that few lengths occur.

    Args:
        least: number of slots in use.
        capacity: upper bound of U.
        device: device of the result.

    Example:
        >>> len(attended_slots(5, 100, torch.device("cpu")))
        32
    """
    blocks = -(-least // _BLOCK) * _BLOCK
    return torch.arange(min(blocks, capacity), device=device)
