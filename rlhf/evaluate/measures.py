"""Token-level measures of completed texts under language models, and their scores by reward models."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.batches import ScoreBatch
from rlhf.kl import exact_kl
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.forward import at_predictors
from rlhf.models.scoring import reward_scores
from rlhf.ops import entropy, is_argmax, token_log_probs
from rlhf.remat import chunk_size, in_chunks
from rlhf.types import Params


class Measures(NamedTuple):
    """Log-probs, entropies and scores of completed texts."""

    log_probs: Tensor
    """[C] float32, nats: log-prob of each token under the model."""
    correct: Tensor
    """[C] bool: True for the model's most likely token."""
    entropy: Tensor
    """[C] float32, nats: entropy of the distribution that each token is drawn from."""
    ref_log_probs: Tensor
    """[C] float32, nats: log-prob under the reference; zeros without one."""
    exact_kl: Tensor
    """[C] float32, nats: KL(model || reference) over the vocabulary; zeros without a reference."""
    scores: Tensor
    """[B, K] float32, reward units: the K reward models' scores, at the last token."""


def make_measure(
    config: ModelShape,
    *,
    reference: ModelShape | None = None,
    reward_models: Sequence[ModelShape] = (),
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
) -> Callable[[Params, dict[str, Params], ScoreBatch], Measures]:
    """Return a function (decoder, frozen, ScoreBatch) -> `Measures`.

    Args:
        config: shape of the model.
        reference: shape of frozen["reference"], which has the model's vocabulary; None if there is no reference.
        reward_models: shapes of frozen["reward_model_0"], frozen["reward_model_1"], …
        dtype: dtype of the models' forward pass.
        temperature: softmax temperature of the model and the reference.
    """
    decoder = architecture_of(config)
    ref_decoder = decoder if reference is None else architecture_of(reference)

    def per_token(models: Params, targets: Tensor, hidden: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = decoder.logits(models["model"], hidden, config=config, padded=True)
        log_probs = token_log_probs(logits, targets, temperature=temperature)
        ref_log_probs = kl = torch.zeros_like(log_probs)
        if ref_hidden:
            ref_logits = ref_decoder.logits(models["reference"], *ref_hidden, config=reference, padded=True)
            ref_log_probs = token_log_probs(ref_logits, targets, temperature=temperature)
            kl = exact_kl(logits, ref_logits, temperature=temperature)
        return log_probs, is_argmax(logits, targets), entropy(logits, temperature=temperature), ref_log_probs, kl

    def measure(params: Params, frozen: dict[str, Params], batch: ScoreBatch) -> Measures:
        shapes = {"model": config} if reference is None else {"model": config, "reference": reference}
        models = {"model": decoder.cast_for_compute(params, dtype)}
        if reference is not None:
            models["reference"] = ref_decoder.cast_for_compute(frozen["reference"], dtype)
        hidden = [at_predictors(models[name], batch, shape) for name, shape in shapes.items()]
        token_measures = in_chunks(per_token, chunk_size(config.vocab_size))(models, batch.targets, *hidden)
        return Measures._make([*token_measures, reward_scores(frozen, batch, reward_models, dtype)])

    return measure
