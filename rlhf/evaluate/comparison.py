"""Models completing the same prompts with the same randomness, and what is measured of every completion."""

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
from rlhf.evaluate.measures import make_measure
from rlhf.evaluate.sft_evaluation import ROW_LENGTH
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program
from rlhf.generate.complete import complete, make_completion_fn, texts_of
from rlhf.io.model_folder import LanguageModel, RewardModel, load_language_model, load_reward_model
from rlhf.kl import KLEstimator, kl_estimate
from rlhf.models.decoding import Completions
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.scoring import cast_frozen
from rlhf.random import Purpose, fold_in, key
from rlhf.types import Params


class Answers(NamedTuple):
    """One model's completions: sample s of prompt i is number i * samples + s."""

    texts: list[str]
    tokens: list[list[int]]
    """Without padding, with the stop token."""
    ended: Array
    """[B]: 1 where the model ended by itself."""
    entropy: Array
    """[B] nats, summed over tokens."""
    kl: dict[str, Array]
    """[B] nats per completion, KL(model || reference): exact, k1, k2, k3; empty without a reference."""
    rewards: dict[str, Array]
    """[B] reward units, by reward model."""


class Sampling(NamedTuple):
    """How completions are made."""

    decodings: tuple[Decoding, ...]
    temperature: float
    max_new_tokens: int
    seed: int


class ModelSet(NamedTuple):
    """Models that complete prompts, and models that score them; all with the same vocabulary."""

    writers: dict[str, LanguageModel]
    """By the part they play."""
    reference: LanguageModel | None
    reward_models: dict[str, RewardModel]
    """By name."""

    @property
    def context(self) -> int:
        """Tokens that every model can read."""
        configs = [model.config for model in self.writers.values()]
        configs += [model.config for model in self.reward_models.values()]
        configs += [self.reference.config] if self.reference is not None else []
        return min(config.n_positions for config in configs)


def load_panel(writers: Mapping[str, Path], reference: Path | None, reward_models: Mapping[str, Path]) -> ModelSet:
    """Load the models.

    Raises:
        UserError: a folder cannot be read, or its vocabulary is not that of the first writer.
    """
    load = functools.cache(load_language_model)  # the reference often writes, too
    panel = ModelSet(
        {part: load(folder) for part, folder in writers.items()},
        None if reference is None else load(reference),
        {name: load_reward_model(folder) for name, folder in reward_models.items()},
    )
    (first, *_), (source, *_) = panel.writers.values(), writers.values()
    folders = [*writers.values(), reference, *reward_models.values()]
    models = [*panel.writers.values(), panel.reference, *panel.reward_models.values()]
    for folder, model in zip(folders, models, strict=True):
        if model is None:
            continue
        same_size = isinstance(model, RewardModel) or model.config.vocab_size == first.config.vocab_size
        if not (same_size and model.tokenizer.same_vocabulary(first.tokenizer)):
            raise UserError(
                f"{folder}: its vocabulary ({model.config.vocab_size} entries) is not that of {source} "
                f"({first.config.vocab_size} entries); only models with the same tokenizer can be compared"
            )
    return panel


@contextlib.contextmanager
def open_panel(place: ComputeContext, panel: ModelSet, sampling: Sampling) -> Iterator[Callable[..., Answers]]:
    """`answer` with the models at hand, until the block ends."""
    reference = panel.reference
    for model in (*panel.writers.values(), *panel.reward_models.values(), reference):
        place.note_all(() if model is None else model.notes)
    program = functools.partial(
        make_program,
        {part: model.config for part, model in panel.writers.items()},
        None if reference is None else reference.config,
        tuple(model.config for model in panel.reward_models.values()),
        {part: model.tokenizer.stop_ids for part, model in panel.writers.items()},
        sampling,
        place.dtype,
    )
    (_, policy), *others = panel.writers.items()
    frozen = {part: model.params for part, model in others}
    frozen |= {} if reference is None else {"reference": reference.params}
    frozen |= {f"reward_model_{k}": model.params for k, model in enumerate(panel.reward_models.values())}
    with place.open_executor(program, ModelState(policy.params, frozen)) as executor:
        yield functools.partial(answer, executor, panel, sampling)


def make_program(
    writers: dict[str, GPT2Config],
    reference: GPT2Config | None,
    reward_models: tuple[GPT2Config, ...],
    stop_ids: dict[str, tuple[int, ...]],
    sampling: Sampling,
    dtype: torch.dtype,
) -> Program:
    """The work: `<decoding>/<part>` (`make_completion_fn`) and `measure/<part>` for every writer.

    The first writer is what the executor calls the parameters; the others are frozen models under their parts.
    """
    eval_fns: dict[str, Callable[..., Any]] = {}
    for number, (part, config) in enumerate(writers.items()):
        own = None if number == 0 else part
        for decoding in sampling.decodings:
            rollout = make_completion_fn(
                config,
                dtype=dtype,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=1 if decoding == "greedy" else 0,
                stop_tokens=stop_ids[part],
            )
            eval_fns[f"{decoding}/{part}"] = _on(own, functools.partial(_roll_out, rollout))
        eval_fns[f"measure/{part}"] = _on(
            own,
            make_measure(
                config,
                reference=reference,
                reward_models=reward_models,
                dtype=dtype,
                temperature=sampling.temperature,
            ),
        )
    return Program({}, eval_fns, {}, prepare_frozen=functools.partial(cast_frozen, dtype=dtype))


def answer(
    executor: Executor,
    panel: ModelSet,
    sampling: Sampling,
    part: str,
    decoding: Decoding,
    prompts: Sequence[np.ndarray],
    *,
    samples: int,
    rollout_rows: int,
    measure_rows: int,
) -> Answers:
    """Let one model complete prompts, and measure the result.

    Args:
        executor: runs `make_program`.
        panel: the models.
        sampling: how.
        part: who writes.
        decoding: one of `sampling.decodings`.
        prompts: token ids, each [n].
        samples: completions per prompt; number s of a prompt has the same randomness in every model.
        rollout_rows: prompts per micro-batch.
        measure_rows: packed rows per micro-batch.
    """
    many = [prompt for prompt in prompts for _ in range(samples)]
    keys = sample_keys(sampling.seed, len(prompts), samples)
    completions = complete(executor, many, keys, rows=rollout_rows, name=f"{decoding}/{part}")
    lengths = completions.mask.sum(dim=1)
    row_length = max(max(map(len, many)) + int(lengths.max()), min(ROW_LENGTH, panel.context))
    joined = join_completions(many, completions.tokens, lengths)
    packs = pack_completions(joined, range(len(many)), rows=measure_rows, row_length=row_length)
    results = executor.map(f"measure/{part}", [pack.batch for pack in packs])

    def tokens_of(parts: list[Tensor]) -> Tensor:
        return unpack_tokens(packs, parts, completions.mask.shape).double()

    log_probs = tokens_of([result.log_probs for result in results])
    entropy = tokens_of([result.entropy for result in results])
    ref_log_probs = tokens_of([result.ref_log_probs for result in results])
    exact = tokens_of([result.exact_kl for result in results])
    scores = unpack_sequences(packs, [result.scores for result in results]).double().numpy()
    kl = {} if panel.reference is None else {"exact": exact} | _estimated_kl(log_probs, ref_log_probs)
    tokenizer = panel.writers[part].tokenizer
    return Answers(
        texts_of(tokenizer, completions),
        [row[:length] for row, length in zip(completions.tokens.tolist(), lengths.tolist(), strict=True)],
        completions.ended.double().numpy(),
        entropy.sum(dim=1).numpy(),
        {name: of_tokens.sum(dim=1).numpy() for name, of_tokens in kl.items()},
        dict(zip(panel.reward_models, scores.T, strict=True)),
    )


def prompt_tokens(dataset: Dataset, records: Sequence[int], room: int) -> list[np.ndarray]:
    """The last `room` tokens of prompts.

    Raises:
        UserError: there is no room.
    """
    if room < 1:
        raise UserError(f"--max-new-tokens leaves no room for a prompt in the models' context; lower it by {1 - room}")
    return [dataset.prompt(record, room) for record in records]


def sample_keys(seed: int, prompts: int, samples: int) -> Tensor:
    """[prompts * samples, 2] int32, by prompt and sample; those of sample 0 do not depend on how many there are."""
    number = torch.arange(prompts)[:, None] + (torch.arange(samples) << 32)
    return fold_in(fold_in(key(seed), int(Purpose.EVALUATION)), number.flatten())


def _estimated_kl(log_probs: Tensor, ref_log_probs: Tensor) -> dict[str, Tensor]:
    names: tuple[KLEstimator, ...] = ("k1", "k2", "k3")
    return {name: kl_estimate(log_probs, ref_log_probs, estimator=name) for name in names}


def _roll_out(rollout: Callable[..., Completions], model: Params, frozen: dict[str, Params], batch: Any) -> Completions:
    return rollout({"policy": model}, frozen, batch)


def _on(part: str | None, function: Callable[[Params, dict[str, Params], Any], Any]) -> Callable[..., Any]:
    """A map on the model that plays `part`; None is the executor's parameters."""

    def on_part(params: Params, frozen: dict[str, Params], batch: Any) -> Any:
        return function(params if part is None else frozen[part], frozen, batch)

    return on_part
