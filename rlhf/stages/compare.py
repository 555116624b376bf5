"""Two models on the same prompts: what each writes, how a judge scores it, and how far apart the models are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf.data.batching import pack_completions, unpack_tokens
from rlhf.distributed.executor import LocalExecutor, Models, Program
from rlhf.errors import UserError
from rlhf.evaluation import mean_interval
from rlhf.io.model_folder import LanguageModel, load_language_model
from rlhf.objectives import make_rollout, make_scorer
from rlhf.random import Purpose, fold_in, key
from rlhf.sampling import Completions
from rlhf.stages.completions import complete, texts_of

Judge = Callable[..., list[float]]
"""A function with the signature of a reward function."""


class Judged(NamedTuple):
    """One model's completions."""

    texts: list[str]
    scores: list[float]
    mean: float
    interval: float
    """Half-width of the mean's 95% confidence interval."""


class Comparison(NamedTuple):
    """A model before and after alignment, on the same prompts with the same randomness."""

    prompts: list[str]
    before: Judged
    after: Judged
    gain: float
    """Mean of the paired differences of the scores."""
    gain_interval: float
    """Half-width of its 95% confidence interval."""
    kl: float
    """Mean over completions of KL(after || before), nats per completion, exact over the vocabulary."""


def compare(
    before: Path,
    after: Path,
    prompts: Sequence[dict[str, Any]],
    judge: Judge,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Comparison:
    """Let two models complete the same prompts and score both.

    Args:
        before: model folder: the reference.
        after: model folder: the policy; same vocabulary.
        prompts: records with `prompt` and any other columns, which go to the judge; at least 2.
        judge: scores completions.
        seed: of the sampling; both models see the same random numbers.
        max_new_tokens: longest completion.
        temperature: of both.

    Raises:
        UserError: a folder cannot be read, or the models have different vocabularies.
    """
    reference, policy = load_language_model(before), load_language_model(after)
    if not policy.tokenizer.same_vocabulary(reference.tokenizer):
        raise UserError(
            f"{after}: its vocabulary is not that of {before}; only models with the same tokenizer can be compared"
        )
    texts = [record["prompt"] for record in prompts]
    room = min(reference.config.n_positions, policy.config.n_positions) - max_new_tokens
    tokens = [
        np.array(ids[-room:] or [policy.tokenizer.eos_id], dtype=np.int64) for ids in policy.tokenizer.encode(texts)
    ]
    keys = fold_in(fold_in(key(seed), int(Purpose.EVALUATION)).expand(len(tokens), 2), torch.arange(len(tokens)))
    columns = {name: [record.get(name) for record in prompts] for name in prompts[0] if name != "prompt"}
    judged = []
    for model in (reference, policy):
        executor = _executor(reference, model, max_new_tokens, temperature)
        completions = complete(executor, tokens, keys, rows=64)
        written = texts_of(model.tokenizer, completions)
        scores = judge(prompts=texts, completions=written, **columns)
        judged.append(Judged(written, scores, *mean_interval(torch.tensor(scores))))
    gain, gain_interval = mean_interval(torch.tensor(judged[1].scores) - torch.tensor(judged[0].scores))
    kl = _exact_kl(executor, tokens, completions)
    return Comparison(texts, judged[0], judged[1], gain, gain_interval, kl)


def _executor(
    reference: LanguageModel, policy: LanguageModel, max_new_tokens: int, temperature: float
) -> LocalExecutor:
    stops = (policy.tokenizer.eos_id,)
    rollout = make_rollout(policy.config, max_new_tokens=max_new_tokens, temperature=temperature, stop_tokens=stops)
    score = make_scorer(policy.config, None, [], temperature=temperature, exact=True)
    maps: dict[str, Callable[..., Any]] = {"rollout": rollout, "score": score}
    models = Models({"policy": policy.params}, {"reference": reference.params})
    return LocalExecutor(Program({}, maps, {}), models, torch.device("cpu"))


def _exact_kl(executor: LocalExecutor, prompts: list[np.ndarray], completions: Completions) -> float:
    """Mean over the policy's completions of the summed exact KL."""
    lengths = completions.mask.sum(dim=1)
    row_length = max(map(len, prompts)) + int(lengths.max())
    packs = pack_completions(prompts, completions.tokens, lengths, range(len(prompts)), rows=16, row_length=row_length)
    parts = [scores.exact_kl for scores in executor.map("score", [pack.batch for pack in packs])]
    return float(unpack_tokens(packs, parts, completions.mask.shape).sum(dim=1).mean())
