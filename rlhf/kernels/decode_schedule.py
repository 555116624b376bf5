"""How `rlhf.models.decoding` goes about its steps on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STEPS = 16
"""Tokens decoded at a time on a GPU: waiting for it so often costs little, and few steps are in vain."""


def steps_per_call(reference: Callable[..., int], max_new_tokens: int, device: torch.device) -> int:
    """On a GPU, decode up to 16 tokens before it is asked which rows have ended."""
    if device.type == "cpu":
        return reference(max_new_tokens, device)
    return -(-max_new_tokens // -(-max_new_tokens // _STEPS))


def attended_slots(reference: Callable[..., Any], least: int, capacity: int, device: torch.device) -> Tensor:
    """On a GPU look at all slots: each number is a recording of its own, and no unused slot is read."""
    slots: Tensor = reference(least if device.type == "cpu" else capacity, capacity, device)
    return slots
