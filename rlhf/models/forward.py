"""Forward passes that return the logits of padded rows, or the hidden states of packed rows."""

from typing import Any

import torch
from torch import Tensor

from rlhf.batches import PPOBatch, Rows, ScoreBatch
from rlhf.checks import check_same_shape, check_value
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.ops import gather_rows
from rlhf.types import Params


def forward(params: Params, tokens: Tensor, *, config: ModelShape, attention_mask: Tensor | None = None) -> Tensor:
    """Return logits of the next token at every position.

    Args:
        params: parameters of a decoder.
        tokens: [B, T] int64 in [0, V).
        config: shape of `params`.
        attention_mask: [B, T] bool, False on padding, left or right. None stands for rows without padding.

    Returns:
        [B, T, V] in the parameters' dtype. Rows at padding are meaningless but finite.

    Raises:
        ValueError: shapes do not match, or T exceeds n_positions.
        TypeError: tokens are not int64.

    Example:
        >>> config = rlhf.PRESETS["tiny"]
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> forward(params, torch.tensor([[1, 2, 3]]), config=config).shape
        torch.Size([1, 3, 512])
    """
    decoder, positions, segments = architecture_of(config), None, None
    if attention_mask is not None:
        check_same_shape("forward", tokens=tokens, attention_mask=attention_mask)
        fits = tokens.shape[1] <= config.n_positions
        check_value("forward", fits, f"at most n_positions = {config.n_positions}", length=tokens.shape[1])
        positions, segments = padding_layout(attention_mask)
    hidden = decoder.hidden_states(params, tokens, config=config, positions=positions, segments=segments)
    return decoder.logits(params, hidden, config=config)


def padding_layout(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions and segments of padded rows. Positions of real tokens count from 0; padding is segment 0.

    Args:
        attention_mask: [B, T] bool, False on padding, left or right.

    Returns:
        (positions, segments), each [B, T] int64.

    Example:
        >>> padding_layout(torch.tensor([[False, True, True]]))
        (tensor([[0, 0, 1]]), tensor([[0, 1, 1]]))
    """
    real = attention_mask.long()
    return (real.cumsum(dim=1) - 1).clamp(min=0), real


def at_predictors(params: Params, batch: ScoreBatch | PPOBatch, config: ModelShape, **options: Any) -> Tensor:
    """Return [C, D] hidden states at the positions that predict the completion tokens, the only ones with logits.

    Args:
        params: parameters of the decoder.
        batch: finished texts.
        config: shape of `params`.
        **options: options of the decoder's `hidden_states`, such as `gradient_checkpointing`.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> tokens, bounds = torch.tensor([[1, 2, 3]]), torch.tensor([0, 3], dtype=torch.int32)
        >>> rows = Rows(tokens, torch.arange(3)[None], torch.ones_like(tokens), bounds)
        >>> predictors, targets = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> batch = ScoreBatch(rows, predictors, targets, targets > 0, torch.tensor([2]))
        >>> at_predictors(params, batch, config).shape
        torch.Size([2, 4])
    """
    return gather_rows(packed_hidden_states(params, batch.rows, config, **options), batch.predictors)


def packed_hidden_states(params: Params, rows: Rows, config: ModelShape, **options: Any) -> Tensor:
    """Return [R * T, D] hidden states of packed rows.

    Args:
        params: parameters of the decoder.
        rows: packed sequences.
        config: shape of `params`.
        **options: options of the decoder's `hidden_states`, such as `gradient_checkpointing`.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> tokens, bounds = torch.tensor([[1, 2, 3]]), torch.tensor([0, 3], dtype=torch.int32)
        >>> rows = Rows(tokens, torch.arange(3)[None], torch.ones_like(tokens), bounds)
        >>> packed_hidden_states(params, rows, config).shape
        torch.Size([3, 4])
    """
    return (
        architecture_of(config)
        .hidden_states(
            params,
            rows.tokens,
            config=config,
            positions=rows.positions,
            segments=rows.segments,
            bounds=rows.bounds,
            **options,
        )
        .flatten(0, 1)
    )


def trunk_states(trunk: Params, rows: Rows, config: ModelShape, dtype: torch.dtype, **options: Any) -> Tensor:
    """Return [R * T, D] hidden states of packed rows, computed in `dtype` by a trunk with float32 parameters.

    Args:
        trunk: parameters of the decoder, float32.
        rows: packed sequences.
        config: shape of `trunk`.
        dtype: dtype of the computation.
        **options: options of the decoder's `hidden_states`, such as `gradient_checkpointing`.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> trunk = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> tokens, bounds = torch.tensor([[1, 2, 3]]), torch.tensor([0, 3], dtype=torch.int32)
        >>> rows = Rows(tokens, torch.arange(3)[None], torch.ones_like(tokens), bounds)
        >>> trunk_states(trunk, rows, config, torch.bfloat16).dtype
        torch.bfloat16
    """
    return packed_hidden_states(architecture_of(config).cast_for_compute(trunk, dtype), rows, config, **options)
