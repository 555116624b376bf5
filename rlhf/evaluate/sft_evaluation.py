"""Evaluation of a language model on demonstrations: perplexity and token accuracy of their completions."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf.data.collate import join_completions, pack_completions, unpack_tokens
from rlhf.data.dataset import TokenSequence
from rlhf.distributed.compute_context import ComputeContext
from rlhf.evaluate.baselines import unigram_perplexity
from rlhf.evaluate.estimates import exponential, figures, ratio
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.evaluate.evaluation_inputs import TestData, open_data
from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.evaluate.measures import Measures, make_measure
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program
from rlhf.io.model_folder import load_language_model
from rlhf.models.architecture import ModelShape

ROW_LENGTH = 256
"""Tokens per packed row, unless a sequence is longer."""

_RECORDS_AT_ONCE = 1024


def evaluate_sft(config: EvaluateConfig, context: ComputeContext, folder: Path, data: TestData) -> Evaluation:
    """Return perplexity and accuracy over completion tokens, end-of-text included; their samples are the records.

    Args:
        config: settings of the evaluation.
        context: device, threads and workers.
        folder: folder of the language model.
        data: demonstrations.

    Raises:
        UserError: the model or the data cannot be used.
    """
    model = load_language_model(folder)
    context.note_all(model.notes)
    dataset, records = open_data(data, model.tokenizer, config)
    max_length = model.config.n_positions
    program = functools.partial(make_sft_measures, model.config, context.dtype)
    losses, correct, tokens = [], [], []
    completions: list[np.ndarray] = []
    with context.open_executor(program, ModelState(model.params, {})) as executor:
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            chunk = records[start : start + _RECORDS_AT_ONCE]
            sequences = [dataset.sequences(record, max_length)[0] for record in chunk]
            completions += map(_learnt_tokens, sequences)
            log_probs, hits, mask = _measure(executor, sequences, config.micro_batch_size)
            losses.append(-log_probs.double().sum(dim=1))
            correct.append(hits.double().sum(dim=1))
            tokens.append(mask.sum(dim=1))
    loss, hit, count = (torch.cat(parts).numpy() for parts in (losses, correct, tokens))
    nats = ratio(loss, count)
    estimates = {"eval/loss": nats, "eval/perplexity": exponential(nats), "eval/accuracy": ratio(hit, count)}
    frequencies = unigram_perplexity(completions, completions, model.config.vocab_size)
    extras = {
        "unigram_perplexity": frequencies,
        "tokens": int(count.sum()),
        "cut": dataset.count_cut(max_length, records),
    }
    columns = {"model": figures(estimates, seed=config.seed)}
    return Evaluation("sft", {"model": folder}, data, "records", columns, extras)


def make_sft_measures(config: ModelShape, dtype: torch.dtype) -> Program:
    """Return the program: `measure` (`rlhf.evaluate.measures.make_measure`)."""
    return Program({}, {"measure": make_measure(config, dtype=dtype)}, {})


def _learnt_tokens(sequence: TokenSequence) -> np.ndarray:
    """Return the tokens that the perplexity is of."""
    tokens = sequence.tokens[sequence.prompt :]
    return tokens if sequence.learnt is None else tokens[sequence.learnt]


def _measure(executor: Executor, sequences: list[TokenSequence], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return [B, T] log-probs of completion tokens, whether each was the most likely one, and their mask."""
    prompts = [sequence.tokens[: sequence.prompt] for sequence in sequences]
    lengths = torch.tensor([len(sequence.tokens) - sequence.prompt for sequence in sequences])
    tokens = np.zeros((len(sequences), int(lengths.max())), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : lengths[row]] = sequence.tokens[sequence.prompt :]
    longest = max(len(sequence.tokens) for sequence in sequences)
    packs = pack_completions(
        join_completions(prompts, torch.from_numpy(tokens), lengths),
        range(len(sequences)),
        rows=rows,
        row_length=max(longest, ROW_LENGTH),
    )
    measures: list[Measures] = executor.map("measure", [pack.batch for pack in packs])
    log_probs = unpack_tokens(packs, [measure.log_probs for measure in measures], tokens.shape)
    hits = unpack_tokens(packs, [measure.correct for measure in measures], tokens.shape)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    for row, sequence in enumerate(sequences):
        if sequence.learnt is not None:
            mask[row, : lengths[row]] &= torch.from_numpy(sequence.learnt)
    return log_probs * mask, hits * mask, mask
