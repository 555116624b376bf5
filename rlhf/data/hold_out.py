"""The split of a data file into records to learn from and records held out."""

import math

from torch import Tensor

from rlhf.random import permutation


def hold_out(key: Tensor, count: int, fraction: float) -> tuple[list[int], list[int]]:
    """(records to learn from, records held out) of 0..count-1, both in order; one at least of each where there are two.

    Args:
        key: [2] int32, consumed.
        count: records.
        fraction: share held out.
    """
    order = permutation(key, count).tolist()
    held_out = min(math.ceil(fraction * count), count - 1)
    return sorted(order[held_out:]), sorted(order[:held_out])
