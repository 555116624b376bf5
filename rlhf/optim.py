"""Optimisers as pure (init, update) pairs over pytrees.

A flat buffer is a pytree with one leaf, so the same functions update a tree on a laptop and a range of the
parameter server's buffer.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_value
from rlhf.schedules import Schedule
from rlhf.tree import global_norm, tree_map, tree_map_named, zip_named
from rlhf.types import Tree


class Optimizer(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[Tree], Any]
    """params -> state."""
    update: Callable[..., tuple[Tree, Any]]
    """(grads, state, params) -> (params, state). The caller may choose the learning rate of a step where the optimiser
    takes it as the keyword `rate`, a float."""
    update_inplace: Callable[..., Any] | None = None
    """(grads, state, params, scale) -> state: the same step with grads times scale, for the owner of the buffers: it is
    written into those of params and state, and grads are overwritten. Counters (leaves []) are not written, so that a
    buffer can be updated in parts. None where there is no such form."""
    hyperparameter_group: Callable[[str], Hashable] = str
    """Dotted name -> what is equal for leaves that are treated alike: laid behind one another, they may be updated as
    one leaf with the name of any of them."""


class AdamState(NamedTuple):
    """State of `adamw`."""

    step: Tensor
    """[] int64, on the CPU: updates made."""
    mu: Tree
    """Like params: running mean of the gradient."""
    nu: Tree
    """Like params: running mean of its square."""


def adamw(
    learning_rate: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Callable[[str], bool] | None = None,
    lr_multiplier: Callable[[str], float] | None = None,
) -> Optimizer:
    """AdamW: Adam with weight decay decoupled from the gradient.

        mu = b1 mu + (1 - b1) g,   nu = b2 nu + (1 - b2) g^2
        p  = p (1 - lr decay) - lr / (1 - b1^t) * mu / (sqrt(nu / (1 - b2^t)) + eps)

    Source: Loshchilov and Hutter 2019, algorithm 2, https://arxiv.org/abs/1711.05101, in the arrangement of
    `torch.optim.AdamW`, which it equals. An element's bits do not depend on how its buffer is cut: `update` is built
    from single multiplications, additions, divisions and roots, each correctly rounded; `update_inplace` is torch's
    fused kernel, which works on whole cache lines, so parts must begin at a multiple of 64 bytes (its rounding differs
    from `update`'s by one or two units in the last place).

    Args:
        learning_rate: maps the number of updates made to the rate (`rlhf.schedules`).
        b1: in [0, 1).
        b2: in [0, 1).
        eps: above 0, added to the root.
        weight_decay: at least 0, per unit of learning rate.
        decays: whether the leaf of this dotted name decays; None is `is_matrix`: all but biases and norms.
        lr_multiplier: factor on the learning rate for the leaf of this dotted name; 0 keeps its bits; None is 1.

    Returns:
        An `Optimizer`; `update` changes none of its arguments, `update_inplace` writes into the buffers of all
        three. The keyword `rate` of both replaces the schedule's rate in that step.

    Raises:
        ValueError: a number is out of range.
    """
    check_value("adamw", 0 <= b1 < 1, "in [0, 1)", b1=b1)
    check_value("adamw", 0 <= b2 < 1, "in [0, 1)", b2=b2)
    check_value("adamw", eps > 0, "above 0", eps=eps)
    check_value("adamw", weight_decay >= 0, "at least 0", weight_decay=weight_decay)
    decays = decays or is_matrix

    def hyperparameter_group(name: str) -> tuple[float, float]:
        """Factor on the rate, and weight decay."""
        return lr_multiplier(name) if lr_multiplier else 1.0, weight_decay if decays(name) else 0.0

    def init(params: Tree) -> AdamState:
        step = torch.zeros((), dtype=torch.int64)  # the CPU needs the rate
        return AdamState(step, tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))

    def update(grads: Tree, state: AdamState, params: Tree, rate: Any = None) -> tuple[Tree, AdamState]:
        step = state.step + 1
        rate = learning_rate(state.step) if rate is None else rate
        step_size = rate / (1.0 - b1 ** step.double())
        root_scale = (1.0 - b2 ** step.double()).sqrt()
        mu = tree_map(lambda m, g: m * b1 + g * (1.0 - b1), state.mu, grads)
        nu = tree_map(lambda v, g: v * b2 + g * g * (1.0 - b2), state.nu, grads)

        def leaf(name: str, p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            factor, decay = hyperparameter_group(name)
            if factor == 0:
                return p
            decayed = p * (1.0 - rate * (decay * factor)) if decay else p
            return (decayed - m / (v.sqrt() / root_scale + eps) * (step_size * factor)).to(p.dtype)

        return tree_map_named(leaf, params, mu, nu), AdamState(step, mu, nu)

    def update_inplace(
        grads: Tree, state: AdamState, params: Tree, scale: float, rate: float | None = None
    ) -> AdamState:
        step = state.step + 1
        rate = float(learning_rate(state.step)) if rate is None else rate
        groups: defaultdict[tuple[float, float], list[list[Tensor]]] = defaultdict(list)
        for name, parts in zip_named(params, grads, state.mu, state.nu):
            groups[hyperparameter_group(name)].append(parts)
        for (factor, decay), group in groups.items():
            p, g, m, v = map(list, zip(*group, strict=True))
            if factor == 0:  # subtracting 0.0 turns -0.0 into 0.0
                p = [leaf.clone() for leaf in p]
            steps = [step.float().to(p[0].device, non_blocking=True)] * len(p)
            divisor = torch.tensor(1.0 / scale, dtype=torch.float32).to(p[0].device, non_blocking=True)
            torch._fused_adamw_(
                p, g, m, v, [], steps, lr=rate * factor, beta1=b1, beta2=b2, weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False, grad_scale=divisor,
            )  # fmt: skip
        return state._replace(step=step)

    return Optimizer(init, update, update_inplace, hyperparameter_group)


def clip_by_global_norm(grads: Tree, max_norm: float, *, norm: Tensor | None = None) -> tuple[Tree, Tensor]:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`.

        g * min(1, max_norm / (norm + 1e-6))

    Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, as `torch.nn.utils.clip_grad_norm_`.

    Args:
        grads: any pytree.
        max_norm: above 0; `inf` leaves everything as it is.
        norm: [] the global norm, where `grads` is only a part of the whole; None computes it.

    Returns:
        (the scaled tree, the norm before scaling as [] float64).

    Raises:
        ValueError: max_norm is not positive.
    """
    check_value("clip_by_global_norm", max_norm > 0, "above 0", max_norm=max_norm)
    norm = global_norm(grads) if norm is None else norm.double()
    if max_norm == float("inf"):
        return grads, norm
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * factor.to(g.dtype), grads), norm


def is_matrix(name: str) -> bool:
    """Whether the dotted name of a GPT-2 leaf is that of a matrix or an embedding: neither a bias nor a norm."""
    return not name.endswith("bias") and "ln_" not in name
