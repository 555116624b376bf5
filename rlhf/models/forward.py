"""Forward passes over packed rows: hidden states at the positions whose prediction counts, and nothing more."""

from typing import Any

from torch import Tensor

from rlhf.batches import PPOBatch, Rows, ScoreBatch
from rlhf.models.gpt2 import trunk
from rlhf.models.gpt2_config import GPT2Config
from rlhf.ops import gather_rows
from rlhf.types import Params


def at_predictors(params: Params, batch: ScoreBatch | PPOBatch, config: GPT2Config, **options: Any) -> Tensor:
    """[C, D] hidden states that predict the completion tokens; no other logits are ever computed.

    Args:
        params: GPT-2 parameters.
        batch: finished texts.
        config: the shape of `params`.
        **options: of `rlhf.models.gpt2.trunk`.
    """
    return gather_rows(packed_hidden_states(params, batch.rows, config, **options), batch.predictors)


def packed_hidden_states(params: Params, rows: Rows, config: GPT2Config, **options: Any) -> Tensor:
    """[R * T, D] hidden states of packed rows; options as `rlhf.models.gpt2.trunk`'s."""
    return trunk(
        params,
        rows.tokens,
        config=config,
        positions=rows.positions,
        segments=rows.segments,
        bounds=rows.bounds,
        **options,
    ).flatten(0, 1)


def unembedding_params(params: Params) -> Params:
    """What `unembed` reads."""
    return {"wte": params["wte"]}
