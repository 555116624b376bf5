"""The schedule of `rlhf.models.decoding` on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEPS = 16
"""Tokens decoded per call on a GPU: waiting for it this often costs little, and few tokens are wasted."""


def steps_per_call(reference: Callable[..., int], max_new_tokens: int, device: torch.device) -> int:
    """Draw up to 16 tokens between checks for ended rows on a GPU, in calls of equal size."""
    if device.type == "cpu":
        return reference(max_new_tokens, device)
    return -(-max_new_tokens // -(-max_new_tokens // _STEPS))


def attended_slots(reference: Callable[..., Any], least: int, capacity: int, device: torch.device) -> Tensor:
    """Attend over all slots on a GPU: each length would be recorded anew, and the kernel skips unused slots anyway."""
    slots: Tensor = reference(least if device.type == "cpu" else capacity, capacity, device)
    return slots
