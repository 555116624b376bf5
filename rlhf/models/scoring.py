"""Forward passes that score finished completions and preference pairs, without gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.batches import PairBatch, ScoreBatch
from rlhf.field_docs import documented
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.forward import packed_hidden_states, trunk_states
from rlhf.models.heads import apply_head
from rlhf.ops import gather_rows, token_log_probs
from rlhf.remat import chunk_size, in_chunks
from rlhf.types import FrozenParams, Params


@documented
class Scores(NamedTuple):
    """Scores of finished completions. Tensors that were not requested are zeros."""

    ref_log_probs: Tensor
    """[C] float32, nats: log-probs under the reference."""
    log_probs: Tensor
    """[C] float32, nats: log-probs under the policy, from one full forward pass."""
    values: Tensor
    """[C] float32, reward units: values of a separate critic, or of the value head if log-probs are recomputed."""
    scores: Tensor
    """[B, K] float32, reward units: score of each of the K reward models at the last token."""
    bootstrap_values: Tensor
    """[B] float32, reward units: value of the state after the last token."""


def make_scorer(
    config: ModelShape,
    critic_config: ModelShape | None,
    reward_configs: Sequence[ModelShape],
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    log_probs: bool = False,
    bootstrap: bool = False,
) -> Callable[[Params, FrozenParams, ScoreBatch], Scores]:
    """Return a function (params, frozen, ScoreBatch) -> `Scores` of finished completions.

    Args:
        config: shape of policy and reference (frozen["reference"]).
        critic_config: shape of params["critic"]. None without a separate critic.
        reward_configs: shapes of frozen["reward_model_0"], frozen["reward_model_1"], …
        dtype: dtype of the forward passes. A frozen model that has it already (`make_frozen_cast`) is not copied.
        temperature: softmax temperature of sampling.
        log_probs: recompute the log-probs of the policy, and the values of a head on its trunk.
        bootstrap: compute the values of the states after the last tokens.

    Example:
        >>> config = rlhf.PRESETS["tiny"]
        >>> scorer = make_scorer(config, None, [config], dtype=torch.bfloat16)
    """
    decoder = architecture_of(config)

    def per_token(params: Params, hidden: Tensor, targets: Tensor) -> tuple[Tensor]:
        logits = decoder.logits(params, hidden, config=config, padded=True)
        return (token_log_probs(logits, targets, temperature=temperature),)

    def look(params: Params, batch: ScoreBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states [R * T, D] and log-probs [C] of a decoder of shape `config`."""
        params = decoder.cast_for_compute(params, dtype)
        hidden = packed_hidden_states(params, batch.rows, config)
        predictors = gather_rows(hidden, batch.predictors)
        return hidden, in_chunks(per_token, chunk_size(config.vocab_size))(
            decoder.unembedding(params), predictors, batch.targets
        )[0]

    def score(params: Params, frozen: FrozenParams, batch: ScoreBatch) -> Scores:
        _, ref_log_probs = look(frozen["reference"], batch)
        policy_log_probs = values = torch.zeros_like(ref_log_probs)
        bootstrap_values = torch.zeros(len(batch.last), device=batch.last.device)
        head, hidden = params.get("value_head"), None
        if log_probs or (bootstrap and head is not None):
            hidden, policy_log_probs = look(params["policy"], batch)
        if critic_config is not None:
            head = params["critic"]["head"]
            hidden = trunk_states(params["critic"]["trunk"], batch.rows, critic_config, dtype)
        if head is not None and hidden is not None:
            values = apply_head(head, gather_rows(hidden, batch.predictors))
            if bootstrap:
                bootstrap_values = apply_head(head, gather_rows(hidden, batch.last))
        scores = reward_scores(frozen, batch, reward_configs, dtype)
        return Scores(ref_log_probs, policy_log_probs, values, scores, bootstrap_values)

    return score


def reward_scores(frozen: FrozenParams, batch: ScoreBatch, configs: Sequence[ModelShape], dtype: torch.dtype) -> Tensor:
    """Return the scores of frozen["reward_model_0"], … at the last token of each sequence: [B, K] reward units.

    Args:
        frozen: frozen models, with the K reward models.
        batch: finished texts.
        configs: shapes of the reward models.
        dtype: dtype of their forward passes.

    Example:
        >>> config = rlhf.PRESETS["tiny"]
        >>> trunk = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> head = {"weight": torch.zeros(1, 64), "bias": torch.full((1,), 2.0)}
        >>> tokens, last = torch.tensor([[1, 2, 3]]), torch.tensor([2])
        >>> rows = rlhf.batches.Rows(tokens, torch.arange(3)[None], torch.ones_like(tokens), None)
        >>> batch = ScoreBatch(rows, last, last, last > 0, last)
        >>> reward_scores({"reward_model_0": {"trunk": trunk, "head": head}}, batch, [config], torch.float32)
        tensor([[2.]])
    """
    scores = [torch.zeros(len(batch.last), 0, device=batch.last.device)]
    for number, config in enumerate(configs):
        model = frozen[f"reward_model_{number}"]
        hidden = trunk_states(model["trunk"], batch.rows, config, dtype)
        scores.append(apply_head(model["head"], gather_rows(hidden, batch.last)).unsqueeze(1))
    return torch.cat(scores, dim=1)


def make_frozen_cast(shapes: Mapping[str, ModelShape], dtype: torch.dtype) -> Callable[[str, Params], Params]:
    """Return a function (name, frozen model) -> the model in `dtype`, with its head unchanged.

    Args:
        shapes: shapes of the frozen models, by name.
        dtype: dtype of their forward passes.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> reference = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> cast = make_frozen_cast({"reference": config}, torch.bfloat16)
        >>> cast("reference", reference)["h"][0]["mlp"]["c_fc"]["weight"].dtype
        torch.bfloat16
    """

    def cast(name: str, model: Params) -> Params:
        cast_for_compute = architecture_of(shapes[name]).cast_for_compute
        if "trunk" in model:
            return model | {"trunk": cast_for_compute(model["trunk"], dtype)}
        return cast_for_compute(model, dtype)

    return cast


def reward_model_shapes(configs: Sequence[ModelShape]) -> dict[str, ModelShape]:
    """Return the shapes of reward models by the names of their frozen parameters.

    Args:
        configs: shapes of the reward models.

    Example:
        >>> reward_model_shapes([rlhf.PRESETS["tiny"]])["reward_model_0"].n_embd
        64
    """
    return {f"reward_model_{number}": config for number, config in enumerate(configs)}


def make_pair_scores(
    config: ModelShape, *, dtype: torch.dtype = torch.float32
) -> Callable[[Params, FrozenParams, PairBatch], tuple[Tensor, Tensor]]:
    """Return a function (reward model, frozen, PairBatch) -> scores [B] of chosen and of rejected completions.

    Args:
        config: shape of the reward model.
        dtype: dtype of its forward passes.

    Example:
        >>> config = rlhf.PRESETS["tiny"]
        >>> model = {"trunk": rlhf.gpt2.init(config, key=rlhf.random.key(0)), "head": {"weight": torch.ones(1, 64)}}
        >>> tokens, segments = torch.tensor([[1, 2, 1, 2]]), torch.tensor([[0, 0, 1, 1]])
        >>> rows = rlhf.batches.Rows(tokens, torch.tensor([[0, 1, 0, 1]]), segments, None)
        >>> last = torch.tensor([1]), torch.tensor([3])
        >>> batch = PairBatch(rows, *last, margin=torch.zeros(1), mask=torch.ones(1, dtype=torch.bool))
        >>> torch.equal(*make_pair_scores(config)(model, {}, batch))
        True
    """

    def scores(params: Params, frozen: FrozenParams, batch: PairBatch) -> tuple[Tensor, Tensor]:
        hidden = trunk_states(params["trunk"], batch.rows, config, dtype)
        chosen, rejected = (gather_rows(hidden, last) for last in (batch.chosen, batch.rejected))
        return apply_head(params["head"], chosen), apply_head(params["head"], rejected)

    return scores
