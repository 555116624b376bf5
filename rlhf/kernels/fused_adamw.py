"""AdamW in one pass over memory, written into buffers that it owns."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.optim import AdamWHyperparameters, Optimizer

Leaves = dict[str, Tensor]


def write_update(
    reference: Callable[..., Any],
    optimizer: Optimizer,
    grads: Leaves,
    state: Any,
    params: Leaves,
    hyperparameters: dict[str, Any] | None,
    *,
    scale: float,
    learning_rate: float | None,
) -> Any:
    """Update with torch's fused kernel; other optimisers than `rlhf.optim.adamw` are left to the reference.

    The kernel rounds differently from `adamw`, by one or two units in the last place, and works on whole cache lines. A
    buffer that is updated in parts gets the same bits if the parts begin at multiples of 64 bytes.
    """
    records = hyperparameters or {}
    if not records or not all(isinstance(record, AdamWHyperparameters) for record in records.values()):
        return reference(optimizer, grads, state, params, hyperparameters, scale=scale, learning_rate=learning_rate)
    step, groups = state.step + 1, defaultdict(list)
    for name, record in records.items():
        groups[record].append((params[name], grads[name], state.mu[name], state.nu[name]))
    for record, group in groups.items():
        p, g, m, v = map(list, zip(*group, strict=True))
        if record.lr_multiplier == 0:  # subtracting 0.0 may turn -0.0 into 0.0
            p = [leaf.clone() for leaf in p]
        rate = float(record.learning_rate(state.step)) if learning_rate is None else learning_rate
        steps = [step.float().to(p[0].device, non_blocking=True)] * len(p)
        divisor = torch.tensor(1.0 / scale, dtype=torch.float32).to(p[0].device, non_blocking=True)
        torch._fused_adamw_(
            p, g, m, v, [], steps, lr=rate * record.lr_multiplier, beta1=record.b1, beta2=record.b2,
            weight_decay=record.weight_decay, eps=record.eps, amsgrad=False, maximize=False, grad_scale=divisor,
        )  # fmt: skip
    return state._replace(step=step)
