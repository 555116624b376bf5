"""Collation of records and completions into packed micro-batches."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.batches import PairBatch, PPOBatch, PromptBatch, ScoreBatch, TokenBatch
from rlhf.data.dataset import Dataset, TokenSequence
from rlhf.data.packing import build_rows, concatenated_ranges, pack, pack_records
from rlhf.random import fold_in


def token_batches(
    dataset: Dataset,
    records: Sequence[int],
    *,
    max_length: int,
    rows: int,
    loss_on: Literal["completion", "all"],
    key: Tensor,
) -> list[TokenBatch]:
    """Return micro-batches of demonstrations, in an order that depends on the records only.

    Args:
        dataset: demonstrations.
        records: records to pack, in any order.
        max_length: maximum tokens per record.
        rows: maximum rows per micro-batch.
        loss_on: tokens that contribute to the loss; the first token of a sequence is never predicted.
        key: [2] int32, consumed: each micro-batch gets a key derived from it.
    """
    layouts = pack_records([dataset.lengths(record, max_length) for record in records], rows=rows, limit=max_length)
    batches = []
    for number, layout in enumerate(layouts):
        sequences = [dataset.sequences(records[unit], max_length)[0] for unit in layout.units]
        packed = build_rows(
            [sequence.tokens for sequence in sequences], [places[0] for places in layout.places], min_rows=min(2, rows)
        )
        firsts = np.array([max(1, s.prompt if loss_on == "completion" else 1) for s in sequences])
        counts = np.array([len(s.tokens) for s in sequences]) - firsts
        cells = torch.from_numpy(concatenated_ranges(packed.starts + firsts, counts))
        if loss_on == "completion" and any(sequence.learnt is not None for sequence in sequences):
            cells = cells[torch.from_numpy(np.concatenate([_learnt(sequence) for sequence in sequences]))]
        batch = TokenBatch(
            rows=packed.rows,
            predictors=pad_to_two(cells - 1),
            targets=pad_to_two(packed.rows.tokens.flatten()[cells]),
            mask=pad_to_two(torch.ones_like(cells, dtype=torch.bool)),
            key=fold_in(key, number),
        )
        batches.append(batch)
    return batches


def _learnt(sequence: TokenSequence) -> np.ndarray:
    """Return [n - max(prompt, 1)] bool: whether each token after the prompt and the first is learnt."""
    after = len(sequence.tokens) - max(1, sequence.prompt)
    return np.ones(after, dtype=bool) if sequence.learnt is None else sequence.learnt[-after:]


class PackedPairs(NamedTuple):
    """A micro-batch of preference pairs and the records that they come from."""

    batch: PairBatch
    records: list[int]


def pair_batches(
    dataset: Dataset, records: Sequence[int], *, max_length: int, rows: int, margins: bool = False
) -> list[PackedPairs]:
    """Return micro-batches of preference pairs, in an order that depends on the records only.

    Args:
        dataset: preference pairs.
        records: records to pack, in any order.
        max_length: maximum tokens per sequence.
        rows: maximum rows per micro-batch.
        margins: True reads the column `margin`; otherwise all margins are 0.
    """
    layouts = pack_records(
        [dataset.lengths(record, max_length) for record in records], rows=max(2, rows), limit=max_length
    )
    batches = []
    for layout in layouts:
        selected = [records[unit] for unit in layout.units]
        sequences = [s.tokens for record in selected for s in dataset.sequences(record, max_length)]
        packed = build_rows(sequences, [place for places in layout.places for place in places], min_rows=2)
        last = torch.from_numpy(packed.starts + np.array([len(s) for s in sequences]) - 1)
        batch = PairBatch(
            rows=packed.rows,
            chosen=pad_to_two(last[0::2]),
            rejected=pad_to_two(last[1::2]),
            margin=pad_to_two(torch.tensor([dataset.margin(record) if margins else 0.0 for record in selected])),
            mask=pad_to_two(torch.ones(len(selected), dtype=torch.bool)),
        )
        batches.append(PackedPairs(batch, selected))
    return batches


def prompt_batches(prompts: Sequence[np.ndarray], keys: Tensor, *, rows: int) -> list[tuple[PromptBatch, list[int]]]:
    """Return micro-batches of prompts of similar length to complete, each with the indices of its completions.

    Args:
        prompts: token ids of each completion's prompt, each [n]; equal prompts of a micro-batch are stored once.
        keys: [len(prompts), 2] int32, the key of each completion.
        rows: completions per micro-batch.
    """
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    batches = []
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        unique = {prompts[number].tobytes(): prompts[number] for number in numbers}
        row_of = {content: row for row, content in enumerate(unique)}
        source = torch.tensor([row_of[prompts[number].tobytes()] for number in numbers])
        lengths = torch.tensor([len(prompt) for prompt in unique.values()])
        padded = torch.zeros(len(unique), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(unique.values()):
            padded[row, : len(prompt)] = torch.from_numpy(prompt)
        batches.append((PromptBatch(padded, lengths, source, keys[numbers]), numbers))
    return batches


class JoinedCompletions(NamedTuple):
    """Completions joined to their prompts once, to be packed in any selection.

    Per-token quantities, such as advantages, are arrays [B, T] over the completions. A packed token refers to them by
    its index in the flattened array.
    """

    sequences: list[np.ndarray]
    """Token ids of each prompt with its completion, each [n]."""
    prompt_lengths: np.ndarray
    """[B] int64."""
    lengths: np.ndarray
    """[B] int64, number of completion tokens."""
    width: int
    """Number of columns T of the arrays."""


def join_completions(prompts: Sequence[np.ndarray], tokens: Tensor, lengths: Tensor) -> JoinedCompletions:
    """Join completions to their prompts.

    Args:
        prompts: token ids of each completion's prompt.
        tokens: [B, T] int64, right-padded.
        lengths: [B] int64, real tokens of each completion, at least 1.
    """
    rows = zip(prompts, tokens.numpy(), lengths.tolist(), strict=True)
    return JoinedCompletions(
        sequences=[np.concatenate([prompt, row[:length]]) for prompt, row, length in rows],
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        lengths=lengths.numpy(),
        width=tokens.shape[1],
    )


class PackedCompletions(NamedTuple):
    """A micro-batch of finished completions and the indices of its tokens."""

    batch: ScoreBatch
    sequences: Tensor
    """[B] int64, indices of its completions."""
    cells: Tensor
    """[C] int64, index of each token of the batch in the flattened arrays [B, T] of all completions."""


def pack_completions(
    joined: JoinedCompletions, selection: Sequence[int], *, rows: int, row_length: int
) -> list[PackedCompletions]:
    """Pack a selection of an iteration's completions, each after its prompt.

    Args:
        joined: all completions.
        selection: indices of the completions to pack.
        rows: maximum rows per micro-batch.
        row_length: tokens per row, at least those of each prompt with its completion.
    """
    selected, packs = np.asarray(selection), []
    sizes = (joined.prompt_lengths + joined.lengths)[selected]
    for layout in pack([[size] for size in sizes.tolist()], rows=rows, row_length=row_length):
        numbers = selected[layout.units]
        packed = build_rows(
            [joined.sequences[number] for number in numbers],
            [place for places in layout.places for place in places],
            min_rows=min(2, rows),
        )
        begins, counts = packed.starts + joined.prompt_lengths[numbers], joined.lengths[numbers]
        cells = torch.from_numpy(concatenated_ranges(begins, counts))
        batch = ScoreBatch(
            rows=packed.rows,
            predictors=pad_to_two(cells - 1),
            targets=pad_to_two(packed.rows.tokens.flatten()[cells]),
            mask=pad_to_two(torch.ones_like(cells, dtype=torch.bool)),
            last=pad_to_two(torch.from_numpy(begins + counts - 1)),
        )
        array_cells = torch.from_numpy(concatenated_ranges(numbers * joined.width, counts))
        packs.append(PackedCompletions(batch, torch.from_numpy(numbers), array_cells))
    return packs


def unpack_tokens(packs: Sequence[PackedCompletions], parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return an array [B, T] of the per-token results [C] of each pack; 0 for cells without a token.

    Args:
        packs: micro-batches of the completions.
        parts: [C] result of each pack.
        shape: (B, T) of the result.
    """
    flat = torch.zeros(math.prod(shape), dtype=parts[0].dtype)
    for packed, part in zip(packs, parts, strict=True):
        flat[packed.cells] = part[: len(packed.cells)]
    return flat.view(*shape)


def unpack_sequences(packs: Sequence[PackedCompletions], parts: Sequence[Tensor]) -> Tensor:
    """Return an array [B, ...] of the per-sequence results [b, ...] of packs that together hold sequences 0..B-1."""
    real = [part[: len(packed.sequences)] for packed, part in zip(packs, parts, strict=True)]
    return torch.cat(real)[torch.argsort(torch.cat([packed.sequences for packed in packs]))]


def ppo_batch(
    packed: PackedCompletions,
    *,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    old_values: Tensor | None,
    advantages: Tensor,
    returns: Tensor | None,
    kl_coef: float,
    weights: Tensor,
) -> PPOBatch:
    """Return the batch of an update on packed completions of an iteration.

    Args:
        packed: completions of the micro-batch.
        old_log_probs: [B, T] float32, nats, of the policy that sampled.
        ref_log_probs: [B, T] float32, nats, of the reference.
        old_values: [B, T] float32, reward units; None without a critic, which gives zeros.
        advantages: [B, T] float32, reward units.
        returns: [B, T] float32, reward units; None without a critic, which gives zeros.
        kl_coef: weight of the KL in the loss, in reward units per nat.
        weights: [B] float32, weight of each completion.
    """
    rows = packed.cells // advantages.shape[1]

    def tokens_of(array: Tensor | None) -> Tensor:
        flat = torch.zeros(len(packed.cells)) if array is None else array.flatten()[packed.cells]
        return pad_to_two(flat)

    return PPOBatch(
        rows=packed.batch.rows,
        predictors=packed.batch.predictors,
        targets=packed.batch.targets,
        mask=packed.batch.mask,
        old_log_probs=tokens_of(old_log_probs),
        ref_log_probs=tokens_of(ref_log_probs),
        old_values=tokens_of(old_values),
        advantages=tokens_of(advantages),
        returns=tokens_of(returns),
        kl_coef=torch.tensor(kl_coef),
        weights=pad_to_two(weights[rows]),
        sequences=pad_to_two(torch.unique_consecutive(rows, return_inverse=True)[1]),
    )


_Item = TypeVar("_Item")


class Prefetch(Iterator[_Item]):
    """An iterator whose next item can be prepared in advance, such as batches while a GPU computes on the last ones."""

    def __init__(self, items: Iterable[_Item]) -> None:
        """Iterate over `items`, which are computed one at a time."""
        self._items, self._prepared = iter(items), list[_Item]()

    def __next__(self) -> _Item:
        self.prepare()
        if not self._prepared:
            raise StopIteration
        return self._prepared.pop()

    def prepare(self) -> None:
        """Compute the next item, unless it is prepared already or there is none."""
        self._prepared = self._prepared or list(itertools.islice(self._items, 1))


def pad_to_two(column: Tensor) -> Tensor:
    """Return a contiguous column of a micro-batch, with a zero after a single entry.

    Compiled code specialises on strides and on a size of 1.
    """
    return torch.cat([column, torch.zeros_like(column)]) if len(column) == 1 else column.contiguous()
