"""Facts about demonstrations: their lengths, ends and template, and a baseline of the model trained on them."""

import itertools
from typing import Any

from rlhf.config import SFTRun
from rlhf.data.data_files import Source
from rlhf.data.dataset import load_dataset
from rlhf.data.encoding import holds_conversations
from rlhf.data.prompt_template import common_template
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, read_checked
from rlhf.evaluate.baselines import unigram_perplexity
from rlhf.io.tokenizer import Tokenizer
from rlhf.train.stage_defaults import fit_completion, fit_context, fit_length
from rlhf.train.stage_inputs import given_files, new_config
from rlhf.train.supervised import DataSplit

_COUNTED = 10_000
"""Demonstrations that token frequencies are counted in."""


def unigram_baseline(split: DataSplit, vocab_size: int) -> float:
    """Return `unigram_perplexity` of the held-out completions, fitted to those that are trained on, all whole."""
    train = split.dataset.learnt_tokens(split.train[:_COUNTED])
    return unigram_perplexity([train], [split.validation.learnt_tokens(split.held_out[:_COUNTED])], vocab_size)


def demonstration_facts(path: Source, split: DataSplit, max_length: int) -> dict[str, Any]:
    """Return the fields of `StartFacts` about the demonstrations that are trained on."""
    counts = split.dataset.answer_counts()[split.train]
    records = list(itertools.islice(read_checked(path, DEMONSTRATIONS), _COUNTED))
    chat = holds_conversations(records[0])
    return {
        "completion_tokens": fit_length(counts, step=1, least=1, most=max_length),
        "ended": split.dataset.count_ended(max_length, split.train) / len(split.train),
        "template": None if chat else common_template([record.fields["prompt"] for record in records]),
        "chat": chat,
    }


def fitted_context(config: SFTRun, path: Source, tokenizer: Tokenizer) -> int:
    """Return `fit_context` over the data of all stages of the run, for the family's preset."""
    preset = new_config(config.model, tokenizer.vocab_size).n_positions
    demonstrations = load_dataset(path, DEMONSTRATIONS, tokenizer, config.cache_dir)
    lengths = [demonstrations.token_counts()]
    if (pairs := given_files(config, getattr(config, "preference_data", None))) is not None:
        lengths.append(load_dataset(pairs, PREFERENCES, tokenizer, config.cache_dir).token_counts().max(axis=1))
    if (prompts := given_files(config, getattr(config, "prompt_data", None))) is not None:
        room = fit_completion(fit_length(demonstrations.answer_counts(), step=1, least=1, most=1024), 1024)
        lengths.append(load_dataset(prompts, PROMPTS, tokenizer, config.cache_dir).token_counts() + room)
    return max(fit_context(counts.ravel(), preset) for counts in lengths)
