"""Optimisers as pairs of pure functions (init, update) over pytrees.

The executor of a stage keeps all parameters in one flat buffer, which is cut into shards, and calls `update` on trees
of parts of leaves. `Optimizer` states what this requires of an optimiser.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_value
from rlhf.field_docs import documented
from rlhf.schedules import Schedule
from rlhf.tree import global_norm, tree_map
from rlhf.types import Tree


@documented
class Optimizer(NamedTuple):
    """An optimiser: a pair of pure functions. The other fields tell executors how they may call it.

    Example:
        >>> def step(grads, state, params, *, learning_rate=None):
        ...     rate = 0.1 if learning_rate is None else learning_rate
        ...     return tree_map(lambda p, g: p - rate * g, params, grads), state
        >>> sgd = Optimizer(init=lambda params: {}, update=step)
        >>> sgd.update({"w": torch.tensor(1.0)}, {}, {"w": torch.tensor(2.0)})
        ({'w': tensor(1.9000)}, {})
    """

    init: Callable[[Tree], Any]
    """params -> state, which consists of trees like params and of counters ([] tensors)."""
    update: Callable[..., tuple[Tree, Any]]
    """(grads, state, params, *, learning_rate=None) -> (params, state). If `learning_rate` is given, it replaces the
    schedule's rate in that step."""
    elementwise: bool = True
    """True if the update of an element reads only that element and the counters. Executors cut leaves into parts and
    refuse an optimiser that needs whole leaves."""
    hyperparameters: Callable[[Tree], Tree] | None = None
    """params -> a hashable record for each leaf, chosen by its name and shape. None treats all leaves alike. Executors
    compute the records once, from whole leaves, and pass them to `update` as the keyword `hyperparameters`. A kernel
    may replace `update` if it knows the type of the records, so an optimiser with another update needs another type."""


@documented
class AdamState(NamedTuple):
    """State of `adamw`."""

    step: Tensor
    """[] int64, on the CPU: number of updates made."""
    mu: Tree
    """Running mean of the gradient; a tree like params."""
    nu: Tree
    """Running mean of the squared gradient; a tree like params."""


@documented
@dataclass(frozen=True)
class AdamWHyperparameters:
    """Hyperparameters of one leaf under `adamw`."""

    learning_rate: Schedule
    b1: float
    b2: float
    eps: float
    weight_decay: float
    """Weight decay; 0 if the mask of the leaf is False."""
    lr_multiplier: float


def adamw(
    learning_rate: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Callable[[Tree], Tree] | None = None,
    lr_multiplier: Callable[[Tree], Tree] | None = None,
) -> Optimizer:
    """Return AdamW: Adam with weight decay decoupled from the gradient.

        mu = b1 mu + (1 - b1) g,   nu = b2 nu + (1 - b2) g^2
        p  = p (1 - lr decay) - lr / (1 - b1^t) * mu / (sqrt(nu / (1 - b2^t)) + eps)

    Source: Loshchilov and Hutter 2019, algorithm 2, https://arxiv.org/abs/1711.05101, in the arrangement of
    `torch.optim.AdamW`, whose results it reproduces. The bits of an element do not depend on how its leaf is cut,
    because `update` consists of single, correctly rounded multiplications, additions, divisions and roots.

    Args:
        learning_rate: schedule, from the number of updates made to the learning rate (`rlhf.schedules`).
        b1: decay rate of the running mean of the gradient, in [0, 1).
        b2: decay rate of the running mean of the squared gradient, in [0, 1).
        eps: term added to the root, above 0.
        weight_decay: weight decay per unit of learning rate, at least 0.
        weight_decay_mask: params -> a tree of bools, True for the leaves that decay. It may read names and shapes, but
            not values. None selects leaves of two or more dimensions: matrices and embeddings, but not biases or norms.
        lr_multiplier: params -> a tree of factors on the learning rate. A factor of 0 leaves the bits of a leaf
            unchanged. None stands for 1.

    Returns:
        An `Optimizer`. Its `update` changes none of its arguments.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from rlhf.schedules import constant_schedule
        >>> optimizer = adamw(constant_schedule(0.1), weight_decay=0.01)
        >>> params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        >>> params, state = optimizer.update(params, optimizer.init(params), params)
        >>> params["weight"][0, 0] < params["bias"][0]
        tensor(True)
    """
    check_value("adamw", (b1 >= 0) & (b1 < 1), "in [0, 1)", b1=b1)
    check_value("adamw", (b2 >= 0) & (b2 < 1), "in [0, 1)", b2=b2)
    check_value("adamw", eps > 0, "above 0", eps=eps)
    check_value("adamw", weight_decay >= 0, "at least 0", weight_decay=weight_decay)

    schedule = learning_rate

    def leaf_hyperparameters(params: Tree) -> Tree:
        def record(decays: bool, factor: float) -> AdamWHyperparameters:
            return AdamWHyperparameters(schedule, b1, b2, eps, weight_decay if decays else 0.0, factor)

        return tree_map(record, (weight_decay_mask or _is_matrix)(params), (lr_multiplier or _ones)(params))

    def init(params: Tree) -> AdamState:
        step = torch.zeros((), dtype=torch.int64)  # the CPU needs the rate
        return AdamState(step, tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))

    def update(
        grads: Tree, state: AdamState, params: Tree, *, learning_rate: Any = None, hyperparameters: Tree = None
    ) -> tuple[Tree, AdamState]:
        hyperparameters = leaf_hyperparameters(params) if hyperparameters is None else hyperparameters
        step = state.step + 1
        rate = schedule(state.step) if learning_rate is None else learning_rate
        step_size = rate / (1.0 - b1 ** step.double())
        root_scale = (1.0 - b2 ** step.double()).sqrt()
        mu = tree_map(lambda m, g: m * b1 + g * (1.0 - b1), state.mu, grads)
        nu = tree_map(lambda v, g: v * b2 + g * g * (1.0 - b2), state.nu, grads)

        def leaf(p: Tensor, m: Tensor, v: Tensor, record: AdamWHyperparameters) -> Tensor:
            decay, factor = record.weight_decay, record.lr_multiplier
            if factor == 0:  # subtracting 0.0 may turn -0.0 into 0.0
                return p
            decayed = p * (1.0 - rate * (decay * factor))
            return (decayed - m / (v.sqrt() / root_scale + eps) * (step_size * factor)).to(p.dtype)

        return tree_map(leaf, params, mu, nu, hyperparameters), AdamState(step, mu, nu)

    return Optimizer(init, update, hyperparameters=leaf_hyperparameters)


def clip_by_global_norm(grads: Tree, max_norm: float, *, norm: Tensor | None = None) -> tuple[Tree, Tensor]:
    """Return gradients scaled so that their global Euclidean norm is at most `max_norm`.

    The factor is that of `clip_scale`.

    Args:
        grads: any pytree.
        max_norm: maximum norm, above 0; `inf` changes nothing.
        norm: [] global norm, to pass if `grads` is only a part of the gradient. None computes it.

    Returns:
        (scaled tree, [] float64 norm before scaling).

    Raises:
        ValueError: max_norm is not positive.

    Example:
        >>> clip_by_global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 10.0)
        ({'a': tensor([3.]), 'b': tensor([4.])}, tensor(5., dtype=torch.float64))
    """
    check_value("clip_by_global_norm", max_norm > 0, "above 0", max_norm=max_norm)
    norm = global_norm(grads) if norm is None else norm.double()
    factor = clip_scale(norm, max_norm)
    return tree_map(lambda g: g * factor.to(g.dtype), grads), norm


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that clips gradients of a given global norm.

        min(1, max_norm / (norm + 1e-6))

    Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, in the form of `torch.nn.utils.clip_grad_norm_`.

    Args:
        norm: [] float64, global norm before clipping.
        max_norm: maximum norm, above 0; `inf` gives the factor 1.

    Example:
        >>> clip_scale(torch.tensor(4.0, dtype=torch.float64), 2.0)
        tensor(0.5000, dtype=torch.float64)
    """
    if not isinstance(max_norm, Tensor) and max_norm == math.inf:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _is_matrix(params: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.ndim >= 2, params)


def _ones(params: Tree) -> Tree:
    return tree_map(lambda leaf: 1.0, params)
