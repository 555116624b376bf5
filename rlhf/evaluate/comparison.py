"""Completion of the same prompts by several models with the same randomness, and measures of every completion."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.data.collate import join_completions, pack_completions, unpack_sequences, unpack_tokens
from rlhf.data.dataset import Dataset
from rlhf.distributed.compute_context import ComputeContext
from rlhf.errors import UserError
from rlhf.evaluate.estimates import Array
from rlhf.evaluate.evaluate_config import Decoding
from rlhf.evaluate.measures import Measures, make_measure
from rlhf.evaluate.sft_evaluation import ROW_LENGTH
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program
from rlhf.generate.complete import complete, decode_completions, make_completion_fn
from rlhf.io.model_folder import LanguageModel, RewardModel, load_language_model, load_reward_model
from rlhf.kl import KLEstimator, kl_estimate
from rlhf.models.architecture import ModelShape
from rlhf.models.decoding import Completions
from rlhf.models.scoring import make_frozen_cast, reward_model_shapes
from rlhf.random import Purpose, fold_in, key
from rlhf.types import Params


class MeasuredCompletions(NamedTuple):
    """One model's completions: sample s of prompt i is number i * samples + s."""

    texts: list[str]
    tokens: list[list[int]]
    """Token ids of each completion, without padding but with the stop token."""
    ended: Array
    """[B]: 1 where the model ended by itself."""
    entropy: Array
    """[B] nats, summed over tokens."""
    kl: dict[str, Array]
    """[B] nats per completion, KL(model || reference): exact, k1, k2, k3; empty without a reference."""
    rewards: dict[str, Array]
    """[B] reward units, by reward model."""


class Sampling(NamedTuple):
    """Settings of the decoding."""

    decodings: tuple[Decoding, ...]
    temperature: float
    max_new_tokens: int
    seed: int


class ModelSet(NamedTuple):
    """Models that complete prompts, and models that score completions; all with the same vocabulary."""

    language_models: dict[str, LanguageModel]
    """Models that complete prompts, by role: policy, against."""
    reference: LanguageModel | None
    """The model from which the KL is measured."""
    reward_models: dict[str, RewardModel]
    """Reward models by name."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens that every model can read."""
        configs = [model.config for model in self.language_models.values()]
        configs += [model.config for model in self.reward_models.values()]
        configs += [self.reference.config] if self.reference is not None else []
        return min(config.n_positions for config in configs)


def load_models(
    language_models: Mapping[str, Path], reference: Path | None, reward_models: Mapping[str, Path]
) -> ModelSet:
    """Load models from their folders.

    Args:
        language_models: folders of the models that complete prompts, by role.
        reference: folder of the model from which the KL is measured; None if there is none.
        reward_models: folders of the reward models, by name.

    Raises:
        UserError: a folder cannot be read, or its vocabulary is not that of the first language model.
    """
    load = functools.cache(load_language_model)  # the reference is often one of the language models, too
    models = ModelSet(
        {role: load(folder) for role, folder in language_models.items()},
        None if reference is None else load(reference),
        {name: load_reward_model(folder) for name, folder in reward_models.items()},
    )
    (first, *_), (source, *_) = models.language_models.values(), language_models.values()
    folders = [*language_models.values(), reference, *reward_models.values()]
    loaded = [*models.language_models.values(), models.reference, *models.reward_models.values()]
    for folder, model in zip(folders, loaded, strict=True):
        if model is None:
            continue
        same_size = isinstance(model, RewardModel) or model.config.vocab_size == first.config.vocab_size
        if not (same_size and model.tokenizer.same_vocabulary(first.tokenizer)):
            raise UserError(
                f"{folder}: its vocabulary ({model.config.vocab_size} entries) is not that of {source} "
                f"({first.config.vocab_size} entries); only models with the same tokenizer can be compared"
            )
    return models


@contextlib.contextmanager
def open_models(
    context: ComputeContext, models: ModelSet, sampling: Sampling
) -> Iterator[Callable[..., MeasuredCompletions]]:
    """Yield `complete_and_measure` with its first three arguments filled in, for an executor of the models."""
    reference = models.reference
    for model in (*models.language_models.values(), *models.reward_models.values(), reference):
        context.note_all(() if model is None else model.notes)
    program = functools.partial(
        make_comparison_program,
        {role: model.config for role, model in models.language_models.items()},
        None if reference is None else reference.config,
        tuple(model.config for model in models.reward_models.values()),
        {role: model.tokenizer.stop_ids for role, model in models.language_models.items()},
        sampling,
        context.dtype,
    )
    (_, policy), *others = models.language_models.items()
    frozen = {role: model.params for role, model in others}
    frozen |= {} if reference is None else {"reference": reference.params}
    frozen |= {f"reward_model_{k}": model.params for k, model in enumerate(models.reward_models.values())}
    with context.open_executor(program, ModelState(policy.params, frozen)) as executor:
        yield functools.partial(complete_and_measure, executor, models, sampling)


def make_comparison_program(
    language_models: dict[str, ModelShape],
    reference: ModelShape | None,
    reward_models: tuple[ModelShape, ...],
    stop_ids: dict[str, tuple[int, ...]],
    sampling: Sampling,
    dtype: torch.dtype,
) -> Program:
    """Return the program: `<decoding>/<role>` (`make_completion_fn`) and `measure/<role>` for every language model.

    The first language model is the parameters of the executor; the others are frozen models under their roles.

    Args:
        language_models: shapes of the models that complete prompts, by role.
        reference: shape of the reference; None if there is none.
        reward_models: shapes of the reward models.
        stop_ids: ids of the tokens that end a completion, by role.
        sampling: settings of the decoding.
        dtype: dtype of the forward passes.
    """
    eval_fns: dict[str, Callable[..., Any]] = {}
    for number, (role, config) in enumerate(language_models.items()):
        frozen_name = None if number == 0 else role
        for decoding in sampling.decodings:
            rollout = make_completion_fn(
                config,
                dtype=dtype,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=1 if decoding == "greedy" else 0,
                stop_tokens=stop_ids[role],
            )
            eval_fns[f"{decoding}/{role}"] = _on(frozen_name, functools.partial(_roll_out, rollout))
        eval_fns[f"measure/{role}"] = _on(
            frozen_name,
            make_measure(
                config,
                reference=reference,
                reward_models=reward_models,
                dtype=dtype,
                temperature=sampling.temperature,
            ),
        )
    shapes = language_models | reward_model_shapes(reward_models)
    shapes |= {} if reference is None else {"reference": reference}
    return Program({}, eval_fns, {}, prepare_frozen=make_frozen_cast(shapes, dtype))


def complete_and_measure(
    executor: Executor,
    models: ModelSet,
    sampling: Sampling,
    role: str,
    decoding: Decoding,
    prompts: Sequence[np.ndarray],
    *,
    samples: int,
    rollout_rows: int,
    measure_rows: int,
) -> MeasuredCompletions:
    """Complete prompts with one model, and measure the completions.

    Args:
        executor: executor of `make_comparison_program`.
        models: the models of that program.
        sampling: settings of the decoding.
        role: role of the model that completes the prompts.
        decoding: decoding method, one of `sampling.decodings`.
        prompts: token ids, each [n].
        samples: number of completions per prompt; number s of a prompt has the same randomness in every model.
        rollout_rows: number of prompts per micro-batch.
        measure_rows: number of packed rows per micro-batch.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    keys = sample_keys(sampling.seed, len(prompts), samples)
    completions = complete(executor, repeated, keys, rows=rollout_rows, name=f"{decoding}/{role}")
    lengths = completions.mask.sum(dim=1)
    row_length = max(max(map(len, repeated)) + int(lengths.max()), min(ROW_LENGTH, models.context_length))
    joined = join_completions(repeated, completions.tokens, lengths)
    packs = pack_completions(joined, range(len(repeated)), rows=measure_rows, row_length=row_length)
    measures: list[Measures] = executor.map(f"measure/{role}", [pack.batch for pack in packs])

    def per_token(values: list[Tensor]) -> Tensor:
        return unpack_tokens(packs, values, completions.mask.shape).double()

    entropy = per_token([measure.entropy for measure in measures])
    scores = unpack_sequences(packs, [measure.scores for measure in measures]).double().numpy()
    kl: dict[str, Tensor] = {}
    if models.reference is not None:
        log_probs = per_token([measure.log_probs for measure in measures])
        ref_log_probs = per_token([measure.ref_log_probs for measure in measures])
        kl["exact"] = per_token([measure.exact_kl for measure in measures])
        kl |= _estimated_kl(log_probs, ref_log_probs)
    tokenizer = models.language_models[role].tokenizer
    return MeasuredCompletions(
        decode_completions(tokenizer, completions),
        [row[:length] for row, length in zip(completions.tokens.tolist(), lengths.tolist(), strict=True)],
        completions.ended.double().numpy(),
        entropy.sum(dim=1).numpy(),
        {name: values.sum(dim=1).numpy() for name, values in kl.items()},
        dict(zip(models.reward_models, scores.T, strict=True)),
    )


def prompt_tokens(dataset: Dataset, records: Sequence[int], room: int) -> list[np.ndarray]:
    """Return the last `room` tokens of each prompt.

    Raises:
        UserError: there is no room.
    """
    if room < 1:
        raise UserError(f"--max-new-tokens leaves no room for a prompt in the models' context; lower it by {1 - room}")
    return [dataset.prompt(record, room) for record in records]


def sample_keys(seed: int, prompts: int, samples: int) -> Tensor:
    """Return [prompts * samples, 2] int32 keys, by prompt and sample; those of sample 0 do not depend on `samples`."""
    number = torch.arange(prompts)[:, None] + (torch.arange(samples) << 32)
    return fold_in(fold_in(key(seed), int(Purpose.EVALUATION)), number.flatten())


def _estimated_kl(log_probs: Tensor, ref_log_probs: Tensor) -> dict[str, Tensor]:
    names: tuple[KLEstimator, ...] = ("k1", "k2", "k3")
    return {name: kl_estimate(log_probs, ref_log_probs, estimator=name) for name in names}


def _roll_out(rollout: Callable[..., Completions], model: Params, frozen: dict[str, Params], batch: Any) -> Completions:
    return rollout({"policy": model}, frozen, batch)


def _on(name: str | None, function: Callable[[Params, dict[str, Params], Any], Any]) -> Callable[..., Any]:
    """Return `function` on the frozen model of this name; None is the executor's parameters."""

    def on_model(params: Params, frozen: dict[str, Params], batch: Any) -> Any:
        return function(params if name is None else frozen[name], frozen, batch)

    return on_model
