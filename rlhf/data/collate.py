"""From records and completions to packed micro-batches."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.batches import PairBatch, PPOBatch, PromptBatch, ScoreBatch, TokenBatch
from rlhf.data.dataset import Dataset
from rlhf.data.packing import build_rows, concatenated_ranges, pack
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
    """Micro-batches of demonstrations, in an order that depends on the records alone.

    Args:
        dataset: demonstrations.
        records: which, in any order.
        max_length: tokens per record and per row.
        rows: rows per micro-batch.
        loss_on: the tokens that count; the first token of a sequence is never predicted.
        key: [2] int32; each micro-batch gets one derived from it.
    """
    layouts = pack([dataset.lengths(record, max_length) for record in records], rows=rows, row_length=max_length)
    batches = []
    for number, layout in enumerate(layouts):
        sequences = [dataset.sequences(records[unit], max_length)[0] for unit in layout.units]
        packed = build_rows(
            [sequence.tokens for sequence in sequences], [places[0] for places in layout.places], least=min(2, rows)
        )
        firsts = np.array([max(1, s.prompt if loss_on == "completion" else 1) for s in sequences])
        counts = np.array([len(s.tokens) for s in sequences]) - firsts
        cells = torch.from_numpy(concatenated_ranges(packed.starts + firsts, counts))
        batch = TokenBatch(
            rows=packed.rows,
            predictors=pad_to_two(cells - 1),
            targets=pad_to_two(packed.rows.tokens.flatten()[cells]),
            mask=pad_to_two(torch.ones_like(cells, dtype=torch.bool)),
            key=fold_in(key, number),
        )
        batches.append(batch)
    return batches


class PackedPairs(NamedTuple):
    """A micro-batch of preference pairs and which records they are."""

    batch: PairBatch
    records: list[int]


def pair_batches(
    dataset: Dataset, records: Sequence[int], *, max_length: int, rows: int, margins: bool = False
) -> list[PackedPairs]:
    """Micro-batches of preference pairs; arguments as `token_batches`, with or without the margin column."""
    layouts = pack(
        [dataset.lengths(record, max_length) for record in records], rows=max(2, rows), row_length=max_length
    )
    batches = []
    for layout in layouts:
        kept = [records[unit] for unit in layout.units]
        sequences = [s.tokens for record in kept for s in dataset.sequences(record, max_length)]
        packed = build_rows(sequences, [place for places in layout.places for place in places], least=2)
        last = torch.from_numpy(packed.starts + np.array([len(s) for s in sequences]) - 1)
        batch = PairBatch(
            rows=packed.rows,
            chosen=pad_to_two(last[0::2]),
            rejected=pad_to_two(last[1::2]),
            margin=pad_to_two(torch.tensor([dataset.margin(record) if margins else 0.0 for record in kept])),
            mask=pad_to_two(torch.ones(len(kept), dtype=torch.bool)),
        )
        batches.append(PackedPairs(batch, kept))
    return batches


def prompt_batches(prompts: Sequence[np.ndarray], keys: Tensor, *, rows: int) -> list[tuple[PromptBatch, list[int]]]:
    """Micro-batches of completions to make, of prompts of similar length, each with the numbers of its completions.

    Args:
        prompts: token ids of each completion's prompt, each [n]; equal ones are kept once.
        keys: [len(prompts), 2] int32: the randomness of each completion.
        rows: completions per micro-batch.
    """
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    batches = []
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        unique = {prompts[number].tobytes(): prompts[number] for number in numbers}
        place = {content: row for row, content in enumerate(unique)}
        source = torch.tensor([place[prompts[number].tobytes()] for number in numbers])
        lengths = torch.tensor([len(prompt) for prompt in unique.values()])
        padded = torch.zeros(len(unique), int(lengths.max()), dtype=torch.int64)
        for row, prompt in enumerate(unique.values()):
            padded[row, : len(prompt)] = torch.from_numpy(prompt)
        batches.append((PromptBatch(padded, lengths, source, keys[numbers]), numbers))
    return batches


class JoinedCompletions(NamedTuple):
    """Completions behind their prompts: joined once, then packed in any selection.

    What is known of each token lies in arrays [B, T], as completions come and as advantages are computed. A packed
    token refers to them by one index, that of its cell in the flattened array.
    """

    sequences: list[np.ndarray]
    """Token ids of each prompt and its completion, each [n]."""
    prompt_lengths: np.ndarray
    """[B] int64."""
    lengths: np.ndarray
    """[B] int64: completion tokens."""
    width: int
    """T: columns of the arrays."""


def join_completions(prompts: Sequence[np.ndarray], tokens: Tensor, lengths: Tensor) -> JoinedCompletions:
    """Put completions behind their prompts.

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
    """A micro-batch of finished completions and where its tokens come from."""

    batch: ScoreBatch
    sequences: Tensor
    """[B] int64: which completions it holds."""
    cells: Tensor
    """[C] int64 into the flattened arrays [B, T] of all completions: where each token of the batch is."""


def pack_completions(
    joined: JoinedCompletions, which: Sequence[int], *, rows: int, row_length: int
) -> list[PackedCompletions]:
    """Pack some of an iteration's completions, each behind its prompt.

    Args:
        joined: all completions.
        which: completions to pack.
        rows: rows per micro-batch.
        row_length: tokens per row; prompt and completion must fit.
    """
    selected, packs = np.asarray(which), []
    sizes = (joined.prompt_lengths + joined.lengths)[selected]
    for layout in pack([[size] for size in sizes.tolist()], rows=rows, row_length=row_length):
        numbers = selected[layout.units]
        packed = build_rows(
            [joined.sequences[number] for number in numbers],
            [place for places in layout.places for place in places],
            least=min(2, rows),
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
        own_cells = torch.from_numpy(concatenated_ranges(numbers * joined.width, counts))
        packs.append(PackedCompletions(batch, torch.from_numpy(numbers), own_cells))
    return packs


def unpack_tokens(packs: Sequence[PackedCompletions], parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """[B, T] from per-token results [C] of each pack; 0 where no completion has a token."""
    whole = torch.zeros(math.prod(shape), dtype=parts[0].dtype)
    for packed, part in zip(packs, parts, strict=True):
        whole[packed.cells] = part[: len(packed.cells)]
    return whole.view(*shape)


def unpack_sequences(packs: Sequence[PackedCompletions], parts: Sequence[Tensor]) -> Tensor:
    """[B, ...] from per-sequence results [b, ...] of each pack, which together hold the sequences 0..B-1."""
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
) -> PPOBatch:
    """The packed tokens with what the update needs of them.

    Arrays are [B, T] over the iteration's completions; old values and returns are None, and zeros in the batch, without
    a critic.
    """

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
    )


_Item = TypeVar("_Item")


class Prefetch(Iterator[_Item]):
    """Items of which the next can be made before it is asked for: a step's batches, while a GPU is at the last ones."""

    def __init__(self, items: Iterable[_Item]) -> None:
        """`items` are made one by one."""
        self._left, self._made = iter(items), list[_Item]()

    def __next__(self) -> _Item:
        self.prepare()
        if not self._made:
            raise StopIteration
        return self._made.pop()

    def prepare(self) -> None:
        """Make the next item, if there is one and it is not made already."""
        self._made = self._made or list(itertools.islice(self._left, 1))


def pad_to_two(column: Tensor) -> Tensor:
    """A column of a micro-batch, contiguous; a single entry is followed by a zero.

    Compiled code takes strides, and a size of 1, as fixed.
    """
    return torch.cat([column, torch.zeros_like(column)]) if len(column) == 1 else column.contiguous()
