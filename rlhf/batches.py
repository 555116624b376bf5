"""Micro-batches: the inputs of one call of a pure function.

Sequences are packed into rows, and only the positions whose prediction counts are listed, by their index into the
flattened rows. So neither padding nor prompt logits are computed in any stage.
"""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Packed sequences: each row holds several, distinguished by segment."""

    tokens: Tensor
    """[R, T] int64."""
    positions: Tensor
    """[R, T] int64, from 0 in each sequence."""
    segments: Tensor
    """[R, T] int64: 1, 2, … within a row; 0 on padding."""
    bounds: Tensor
    """[S + 1] int32 into the flattened rows: the start of each sequence, and the end of the last. Padding counts as
    sequences of its own."""


class TokenBatch(NamedTuple):
    """Sequences, and those of their tokens that count."""

    rows: Rows
    predictors: Tensor
    """[C] int64 into the flattened rows: the position that predicts each token that counts."""
    targets: Tensor
    """[C] int64: the tokens that count."""
    mask: Tensor
    """[C] bool: False on padding to a fixed shape."""
    key: Tensor
    """[2] int32, for dropout."""


class PairBatch(NamedTuple):
    """Preference pairs; both members are in the same micro-batch."""

    rows: Rows
    chosen: Tensor
    """[B] int64 into the flattened rows: last token of each chosen sequence."""
    rejected: Tensor
    """[B] int64: last token of each rejected one."""
    margin: Tensor
    """[B] float32, reward units."""
    mask: Tensor
    """[B] bool: False on padding."""


class CompletionPairBatch(NamedTuple):
    """Preference pairs whose completions have their log-probs compared; sequence 2i is chosen, 2i + 1 rejected."""

    rows: Rows
    predictors: Tensor
    """[C] int64: the position that predicts each completion token."""
    targets: Tensor
    """[C] int64: the completion tokens."""
    sequences: Tensor
    """[C] int64: the sequence that each token belongs to."""
    ref_chosen: Tensor
    """[B] float32, nats: log-prob of the chosen completion under the reference."""
    ref_rejected: Tensor
    """[B] float32, nats: of the rejected one."""
    mask: Tensor
    """[B] bool: False on padding."""


class PromptBatch(NamedTuple):
    """Prompts to complete."""

    prompts: Tensor
    """[U, P] int64, right-padded."""
    lengths: Tensor
    """[U] int64."""
    source: Tensor
    """[B] int64: the prompt of each completion."""
    keys: Tensor
    """[B, 2] int32: the randomness of each completion."""


class ScoreBatch(NamedTuple):
    """Finished completions to score."""

    rows: Rows
    predictors: Tensor
    """[C] int64: the position that predicts each completion token."""
    targets: Tensor
    """[C] int64: the completion tokens."""
    mask: Tensor
    """[C] bool: False on padding."""
    last: Tensor
    """[B] int64: last real token of each sequence."""


class PPOBatch(NamedTuple):
    """Completion tokens of one minibatch's part, with everything the update needs."""

    rows: Rows
    predictors: Tensor
    """[C] int64: the position that predicts each completion token."""
    targets: Tensor
    """[C] int64: the completion tokens."""
    mask: Tensor
    """[C] bool: False on padding."""
    old_log_probs: Tensor
    """[C] float32, nats, when sampled."""
    ref_log_probs: Tensor
    """[C] float32, nats, reference."""
    old_values: Tensor
    """[C] float32, reward units, when sampled; zeros without a critic."""
    advantages: Tensor
    """[C] float32, reward units."""
    returns: Tensor
    """[C] float32, reward units; zeros without a critic."""
    kl_coef: Tensor
    """[] float32: weight of the KL where it is part of the loss."""
    weights: Tensor
    """[C] float32: weight of each token in the policy's loss (`rlhf.weighting.loss_weights`)."""
    sequences: Tensor
    """[C] int64: the completion that a token belongs to, from 0 in the micro-batch."""
