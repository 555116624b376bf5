"""Types that all modules share.

Shape letters, used in docstrings and as suffixes of local names throughout the package:

    B  sequences in a batch          R  packed rows in a micro-batch
    T  tokens of a sequence or row   C  completion tokens of a micro-batch, flattened
    V  vocabulary                    L  layers
    D  model width                   N  attention heads
    H  width of one head             S  slots of a key-value cache

Time index: `rewards[:, t]`, `values[:, t]` and `log_probs[:, t]` belong to the choice of completion token t.
`values[:, t]` is the value of the state in which that token is chosen.
"""

from typing import Any

from torch import Tensor

Tree = Any
"""A pytree: nested dicts, lists, tuples and NamedTuples whose leaves are tensors."""

Params = dict[str, Any]
"""A pytree of parameter tensors with `requires_grad=False`: nested dicts and lists."""

FrozenParams = dict[str, Params]
"""Constant models by name: the reference and the reward models."""

Metrics = dict[str, Tensor]
"""Detached [] tensors by metric name."""

MetricSums = dict[str, Tensor]
"""Detached [] sums over a batch, named by their metric and `_sum`, and `"count"`, by which `rlhf.ops.mean_metrics`
divides them once."""

__all__ = ["FrozenParams", "MetricSums", "Metrics", "Params", "Tensor", "Tree"]
