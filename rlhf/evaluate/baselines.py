"""Baselines that a model must beat to have learnt anything: token frequencies, word counts and lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.evaluate.estimates import Array

_FOLDS = 5


def bag_of_words(pairs: Sequence[dict[str, str]], train: Sequence[dict[str, str]] | None, *, seed: int) -> Array:
    """Return margins of a linear Bradley-Terry model of word counts (logistic regression on their difference).

    Args:
        pairs: pairs to score, each with `prompt`, `chosen` and `rejected`.
        train: pairs to learn from; None cross-validates on `pairs`, with all pairs of a prompt in one fold.
        seed: seed of the folds.

    Returns:
        [n] float, above 0 where the chosen text is preferred, 0 where nothing could be learnt.
    """
    if train is not None:
        return _fit_and_score(train, pairs)
    margins = np.zeros(len(pairs))
    for train_rows, test_rows in _folds([pair["prompt"] for pair in pairs], seed):
        margins[test_rows] = _fit_and_score([pairs[i] for i in train_rows], [pairs[i] for i in test_rows])
    return margins


def unigram_perplexity(train: Sequence[Array], held_out: Sequence[Array], vocab_size: int) -> float:
    """Return the perplexity of the model that knows how often each token occurs in training texts, plus one.

        exp(-mean log((n_v + 1) / (N + V))),   n_v of N training tokens are v, the mean over held-out tokens

    Args:
        train: token ids of each training text, [n] int.
        held_out: token ids of each held-out text, [n] int.
        vocab_size: number of different tokens.
    """
    counts = np.bincount(np.concatenate(train), minlength=vocab_size) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[np.concatenate(held_out)].mean()))


def _fit_and_score(train: Sequence[dict[str, str]], pairs: Sequence[dict[str, str]]) -> Array:
    from sklearn.feature_extraction.text import CountVectorizer  # here, because it takes a second to import
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    try:
        words.fit(pair[side] for pair in train for side in ("chosen", "rejected"))
    except ValueError:  # the texts have no words
        return np.zeros(len(pairs))

    def counts(texts: Sequence[dict[str, str]]) -> Any:
        chosen, rejected = (words.transform([pair[side] for pair in texts]) for side in ("chosen", "rejected"))
        return chosen.astype(np.float64) - rejected.astype(np.float64)

    inputs = counts(train)
    samples, labels = _stack(inputs), np.repeat([1, 0], len(train))  # each pair in both orders: no side is favoured
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(samples, labels)
    margins: Array = counts(pairs) @ model.coef_[0]
    return margins


def _stack(inputs: Any) -> Any:
    from scipy.sparse import vstack

    return vstack([inputs, -inputs]).tocsr()


def _folds(prompts: Sequence[str], seed: int) -> list[tuple[Any, Any]]:
    """Return (training rows, test rows) of each fold; all pairs of a prompt are in one fold, if there are several."""
    from sklearn.model_selection import GroupKFold, KFold

    rows, groups = np.zeros(len(prompts)), len(set(prompts))
    if groups > 1:
        return list(GroupKFold(min(_FOLDS, groups)).split(rows, groups=prompts))
    if len(prompts) > 1:
        return list(KFold(min(_FOLDS, len(prompts)), shuffle=True, random_state=seed).split(rows))
    return []
