"""Figures of best-of-n, from several completions of every prompt."""

from collections.abc import Mapping, Sequence

import torch

from rlhf.best_of_n_sampling import best_of_n
from rlhf.evaluate.estimates import Array, Estimate, mean


def best_of_figures(scores: Mapping[str, Array], samples: int, numbers: Sequence[int]) -> dict[str, Estimate]:
    """Return every score of the best of n completions by the reward model, with prompts as samples.

    Args:
        scores: [prompts * samples] float by figure name; the first one under `eval/reward/` chooses the best.
        samples: number of completions per prompt.
        numbers: values of n, each at most `samples`.
    """
    rows = {name: torch.from_numpy(values.reshape(-1, samples)) for name, values in scores.items()}
    proxy = next((values for name, values in rows.items() if name.startswith("eval/reward/")), None)
    if proxy is None:
        return {}
    return {
        f"eval/best_of/{n}/{name.rpartition('/')[2]}": mean(best_of_n(proxy, values, n).numpy())
        for n in numbers
        for name, values in rows.items()
    }
