"""From records and completions to packed micro-batches."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.batches import PairBatch, PPOBatch, PromptBatch, ScoreBatch, TokenBatch
from rlhf.data.dataset import Dataset
from rlhf.data.packing import build_rows, pack
from rlhf.experience import Experience
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
        firsts = [max(1, sequence.prompt if loss_on == "completion" else 1) for sequence in sequences]
        index = [
            np.arange(first - 1, len(s.tokens) - 1) + start
            for first, s, start in zip(firsts, sequences, packed.starts, strict=True)
        ]
        targets = torch.from_numpy(
            np.concatenate([s.tokens[first:] for first, s in zip(firsts, sequences, strict=True)])
        )
        mask = torch.ones_like(targets, dtype=torch.bool)
        predictors, targets, mask = pad_to_two(torch.from_numpy(np.concatenate(index)), targets, mask)
        batches.append(TokenBatch(packed.rows, predictors, targets, mask, fold_in(key, number)))
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
        last = torch.tensor([start + len(s) - 1 for s, start in zip(sequences, packed.starts, strict=True)])
        margin = torch.tensor([dataset.margin(record) if margins else 0.0 for record in kept])
        mask = torch.ones(len(kept), dtype=torch.bool)
        pairs = pad_to_two(last[0::2], last[1::2], margin, mask)
        batches.append(PackedPairs(PairBatch(packed.rows, *pairs), kept))
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


class PackedCompletions(NamedTuple):
    """A micro-batch of finished completions and where its tokens come from."""

    batch: ScoreBatch
    sequences: Tensor
    """[B] int64: which completions it holds."""
    sequence: Tensor
    """[C] int64: the completion that each token belongs to."""
    step: Tensor
    """[C] int64: the token's place in it."""


def pack_completions(
    prompts: Sequence[np.ndarray], tokens: Tensor, lengths: Tensor, which: Sequence[int], *, rows: int, row_length: int
) -> list[PackedCompletions]:
    """Pack some of an iteration's completions, each behind its prompt.

    Args:
        prompts: token ids of each completion's prompt.
        tokens: [B, T] int64, right-padded.
        lengths: [B] int64, real tokens of each completion, at least 1.
        which: completions to pack.
        rows: rows per micro-batch.
        row_length: tokens per row; prompt and completion must fit.
    """
    counts = lengths.tolist()
    full = {number: np.concatenate([prompts[number], tokens[number, : counts[number]].numpy()]) for number in which}
    packs = []
    for layout in pack([[len(full[number])] for number in which], rows=rows, row_length=row_length):
        numbers = [which[unit] for unit in layout.units]
        packed = build_rows(
            [full[number] for number in numbers], [places[0] for places in layout.places], least=min(2, rows)
        )
        begins = [start + len(prompts[number]) for number, start in zip(numbers, packed.starts, strict=True)]
        step = torch.cat([torch.arange(counts[number]) for number in numbers])
        repeats = torch.tensor([counts[number] for number in numbers])
        sequence = torch.tensor(numbers).repeat_interleave(repeats)
        index = torch.tensor(begins).repeat_interleave(repeats) + step - 1
        last = torch.tensor(begins) + repeats - 1
        mask = torch.ones_like(index, dtype=torch.bool)
        columns = pad_to_two(index, tokens[sequence, step], mask)
        batch = ScoreBatch(packed.rows, *columns, *pad_to_two(last))
        packs.append(PackedCompletions(batch, torch.tensor(numbers), sequence, step))
    return packs


def unpack_tokens(packs: Sequence[PackedCompletions], parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """[B, T] from per-token results [C] of each pack; 0 where no completion has a token."""
    whole = torch.zeros(tuple(shape), dtype=parts[0].dtype)
    for packed, part in zip(packs, parts, strict=True):
        whole[packed.sequence, packed.step] = part[: len(packed.step)]
    return whole


def unpack_sequences(packs: Sequence[PackedCompletions], parts: Sequence[Tensor]) -> Tensor:
    """[B, ...] from per-sequence results [b, ...] of each pack, which together hold the sequences 0..B-1."""
    real = [part[: len(packed.sequences)] for packed, part in zip(packs, parts, strict=True)]
    return torch.cat(real)[torch.argsort(torch.cat([packed.sequences for packed in packs]))]


def ppo_batch(
    packed: PackedCompletions,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    experience: Experience,
    kl_coef: float,
) -> PPOBatch:
    """The packed tokens with what the update needs of them; all arrays [B, T] over the iteration's completions."""
    arrays = (log_probs, ref_log_probs, values, experience.advantages, experience.returns)
    gathered = [array[packed.sequence, packed.step] for array in arrays]
    columns = [*packed.batch[1:4], *pad_to_two(*gathered), torch.tensor(kl_coef)]
    return PPOBatch(packed.batch.rows, *columns)


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


def pad_to_two(*columns: Tensor) -> list[Tensor]:
    """The columns of a micro-batch, laid out alike; a single entry is followed by filling.

    Compiled code takes strides, and a size of 1, as fixed.
    """
    return [torch.cat([c, torch.zeros_like(c)]) if len(c) == 1 else c.contiguous() for c in columns]
