"""The split of a data file into training and held-out records."""

import math

from torch import Tensor

from rlhf.random import permutation


def hold_out(key: Tensor, count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Split records 0..count-1 into (training, held-out), both in order and not empty if count is at least 2.

    Args:
        key: [2] int32, consumed.
        count: number of records.
        fraction: fraction of the records to hold out.
    """
    order = permutation(key, count).tolist()
    held_out = min(math.ceil(fraction * count), count - 1)
    return sorted(order[held_out:]), sorted(order[:held_out])
