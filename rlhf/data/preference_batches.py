"""Collation of preference pairs for losses on the log-probs of their completions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.batches import CompletionPairBatch
from rlhf.data.collate import pad_to_two
from rlhf.data.dataset import Dataset
from rlhf.data.packing import build_rows, concatenated_ranges, pack_records


class PackedCompletionPairs(NamedTuple):
    """A micro-batch of preference pairs and the records that they come from."""

    batch: CompletionPairBatch
    records: list[int]


def completion_pair_batches(
    dataset: Dataset, records: Sequence[int], *, max_length: int, rows: int, ref_log_probs: Tensor | None = None
) -> list[PackedCompletionPairs]:
    """Return micro-batches of preference pairs, in an order that depends on the records only.

    Args:
        dataset: preference pairs.
        records: records to pack, in any order.
        max_length: maximum tokens per sequence.
        rows: maximum rows per micro-batch.
        ref_log_probs: [len(dataset), 2] float32, nats, log-probs of the chosen and the rejected completion under the
            reference; None stands for 0.
    """
    layouts = pack_records(
        [dataset.lengths(record, max_length) for record in records], rows=max(2, rows), limit=max_length
    )
    batches = []
    for layout in layouts:
        selected = [records[unit] for unit in layout.units]
        sequences = [s for record in selected for s in dataset.sequences(record, max_length)]
        places = [place for unit in layout.places for place in unit]
        packed = build_rows([s.tokens for s in sequences], places, min_rows=2)
        firsts = np.array([max(1, s.prompt) for s in sequences])
        counts = np.array([len(s.tokens) for s in sequences]) - firsts
        cells = torch.from_numpy(concatenated_ranges(packed.starts + firsts, counts))
        ref = torch.zeros(len(selected), 2) if ref_log_probs is None else ref_log_probs[selected]
        batch = CompletionPairBatch(
            rows=packed.rows,
            predictors=cells - 1,
            targets=packed.rows.tokens.flatten()[cells],
            sequences=torch.arange(len(sequences)).repeat_interleave(torch.from_numpy(counts)),
            ref_chosen=pad_to_two(ref[:, 0]),
            ref_rejected=pad_to_two(ref[:, 1]),
            mask=pad_to_two(torch.ones(len(selected), dtype=torch.bool)),
        )
        batches.append(PackedCompletionPairs(batch, selected))
    return batches
