"""What a reward model must beat, or it has learnt nothing: a bag of words."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.evaluate.estimates import Array

_FOLDS = 5


def bag_of_words(pairs: Sequence[dict[str, str]], train: Sequence[dict[str, str]] | None, *, seed: int) -> Array:
    """Margins of a linear Bradley-Terry model of word counts (logistic regression on their difference).

    Args:
        pairs: `prompt`, `chosen`, `rejected`: what is judged.
        train: pairs to learn from; None learns from `pairs` themselves, each part from the others, with a prompt's
            pairs in one part.
        seed: of the parts.

    Returns:
        [n]; above 0 where the chosen one is preferred, 0 where nothing could be learnt.
    """
    if train is not None:
        return _fit_and_judge(train, pairs)
    margins = np.zeros(len(pairs))
    for learn, judge in _folds([pair["prompt"] for pair in pairs], seed):
        margins[judge] = _fit_and_judge([pairs[i] for i in learn], [pairs[i] for i in judge])
    return margins


def _fit_and_judge(train: Sequence[dict[str, str]], pairs: Sequence[dict[str, str]]) -> Array:
    from sklearn.feature_extraction.text import CountVectorizer  # here, because it takes a second to import
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    try:
        words.fit(pair[side] for pair in train for side in ("chosen", "rejected"))
    except ValueError:  # there is not one word
        return np.zeros(len(pairs))

    def counts(texts: Sequence[dict[str, str]]) -> Any:
        chosen, rejected = (words.transform([pair[side] for pair in texts]) for side in ("chosen", "rejected"))
        return chosen.astype(np.float64) - rejected.astype(np.float64)

    inputs = counts(train)
    both, labels = _stack(inputs), np.repeat([1, 0], len(train))  # each pair both ways round: no side is favoured
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, labels)
    margins: Array = counts(pairs) @ model.coef_[0]
    return margins


def _stack(inputs: Any) -> Any:
    from scipy.sparse import vstack

    return vstack([inputs, -inputs]).tocsr()


def _folds(prompts: Sequence[str], seed: int) -> list[tuple[Any, Any]]:
    """(rows to learn from, rows to judge); prompts stay whole where there are several."""
    from sklearn.model_selection import GroupKFold, KFold

    rows, groups = np.zeros(len(prompts)), len(set(prompts))
    if groups > 1:
        return list(GroupKFold(min(_FOLDS, groups)).split(rows, groups=prompts))
    if len(prompts) > 1:
        return list(KFold(min(_FOLDS, len(prompts)), shuffle=True, random_state=seed).split(rows))
    return []
