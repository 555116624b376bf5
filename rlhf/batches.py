"""Micro-batches: the inputs of one call of a pure function.

Sequences are packed into rows. A batch lists the positions whose predictions count, as indices into the flattened rows,
so that no stage computes logits of padding or prompts.
"""

from typing import NamedTuple

from torch import Tensor

from rlhf.field_docs import documented


@documented
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


@documented
class TokenBatch(NamedTuple):
    """Sequences and the tokens that count in them."""

    rows: Rows
    """The packed sequences."""
    predictors: Tensor
    """[C] int64 into the flattened rows: the position that predicts each token that counts."""
    targets: Tensor
    """[C] int64: the tokens that count."""
    mask: Tensor
    """[C] bool: False on entries that pad to a fixed shape."""
    key: Tensor
    """[2] int32: key of the dropout."""


@documented
class PairBatch(NamedTuple):
    """Preference pairs; both members are in the same micro-batch."""

    rows: Rows
    """The packed sequences."""
    chosen: Tensor
    """[B] int64 into the flattened rows: the last token of each chosen sequence."""
    rejected: Tensor
    """[B] int64 into the flattened rows: the last token of each rejected sequence."""
    margin: Tensor
    """[B] float32, reward units."""
    mask: Tensor
    """[B] bool: False on padding."""


@documented
class CompletionPairBatch(NamedTuple):
    """Preference pairs for losses on log-probs. Sequence 2i is the chosen one of a pair, 2i + 1 the rejected one."""

    rows: Rows
    """Packed sequences."""
    predictors: Tensor
    """[C] int64: position that predicts each completion token."""
    targets: Tensor
    """[C] int64: completion tokens."""
    sequences: Tensor
    """[C] int64: sequence that each token belongs to."""
    ref_chosen: Tensor
    """[B] float32, nats: log-prob of the chosen completion under the reference."""
    ref_rejected: Tensor
    """[B] float32, nats: log-prob of the rejected completion under the reference."""
    mask: Tensor
    """[B] bool: False on padding."""


@documented
class PromptBatch(NamedTuple):
    """Prompts to complete."""

    prompts: Tensor
    """[U, P] int64, right-padded."""
    lengths: Tensor
    """[U] int64: tokens of each prompt."""
    source: Tensor
    """[B] int64: index of each completion's prompt."""
    keys: Tensor
    """[B, 2] int32: key of each completion."""


@documented
class ScoreBatch(NamedTuple):
    """Finished completions to score."""

    rows: Rows
    """The packed sequences."""
    predictors: Tensor
    """[C] int64: the position that predicts each completion token."""
    targets: Tensor
    """[C] int64: the completion tokens."""
    mask: Tensor
    """[C] bool: False on padding."""
    last: Tensor
    """[B] int64 into the flattened rows: the last real token of each sequence."""


@documented
class PPOBatch(NamedTuple):
    """Completion tokens of a part of a minibatch, with all inputs of the update."""

    rows: Rows
    """The packed sequences."""
    predictors: Tensor
    """[C] int64: the position that predicts each completion token."""
    targets: Tensor
    """[C] int64: the completion tokens."""
    mask: Tensor
    """[C] bool: False on padding."""
    old_log_probs: Tensor
    """[C] float32, nats: log-probs when the tokens were sampled."""
    ref_log_probs: Tensor
    """[C] float32, nats: log-probs under the reference."""
    old_values: Tensor
    """[C] float32, reward units: values when the tokens were sampled; zeros without a critic."""
    advantages: Tensor
    """[C] float32, reward units."""
    returns: Tensor
    """[C] float32, reward units: targets of the value function; zeros without a critic."""
    kl_coef: Tensor
    """[] float32: weight of the KL where it is part of the loss."""
    weights: Tensor
    """[C] float32: weight of each token in the policy's loss (`rlhf.weighting.loss_weights`)."""
    sequences: Tensor
    """[C] int64: the completion that a token belongs to, from 0 in the micro-batch."""
