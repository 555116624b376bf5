"""Laws that pure functions obey, as assertions over any function, and the few tools that tests state them with.

Importing this module loads the hypothesis profile of the suite: few examples, the same ones in every run.
"""

import random

import numpy as np
import torch
from hypothesis import settings
from torch.utils import _pytree as pytree

settings.register_profile("rlhf", max_examples=30, deadline=None, derandomize=True, database=None)
settings.load_profile("rlhf")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
HIDDEN = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}


def floats(seed, *shape, dtype=torch.float64):
    """Standard normal numbers from NumPy: neither torch's generator nor the code under test has a part in them."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def coins(seed, *shape, share=0.7):
    """A mask that is True on about `share` of its positions."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < share)


def prefix_mask(lengths, width):
    """[B, width] bool, True on the first `lengths[b]` positions of row b."""
    return torch.arange(width) < torch.as_tensor(lengths)[:, None]


def ragged_mask(seed, rows, width):
    """A prefix mask whose first rows are full, empty and one token long; the others are anything between."""
    lengths = np.random.default_rng(seed).integers(0, width + 1, rows)
    lengths[: min(rows, 3)] = (width, 0, 1)[: min(rows, 3)]
    return prefix_mask(lengths, width)


def numpy(*tensors):
    """float64 (bool, int64) arrays for an oracle; a single array for a single tensor."""
    arrays = [x.double().numpy() if x.is_floating_point() else x.numpy() for x in tensors]
    return arrays if len(arrays) > 1 else arrays[0]


def assert_close(actual, expected, tolerance=1e-12):
    """The leaves of `actual` agree with what stands at their places to `tolerance`, relative and absolute."""

    def compare(leaf, other):
        left, right = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (leaf, other))
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)

    pytree.tree_map(compare, actual, expected)


def assert_same_bits(actual, expected):
    """Trees have the same structure, dtypes, shapes and bits; a NaN equals itself, and -0.0 is not 0.0."""
    (left, left_spec), (right, right_spec) = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.numel() == 0 or torch.equal(_raw(a), _raw(b))


def _raw(x):
    return x.detach().contiguous().view(-1).view(torch.uint8)


def assert_pure(function, *args):
    """Called twice under different global seeds: same bits out, same bits in, no generator moved, no graph left."""
    before = pytree.tree_map(lambda leaf: leaf.clone(), args)
    results = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            states = _generator_states()
            results.append(function(*args))
            assert _generator_states() == states
    assert_same_bits(*results)
    assert_same_bits(args, before)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(results[0]))


def _generator_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def assert_compiles(function, *args):
    """One graph without breaks gives the bits of eager execution."""
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(*args), function(*args))


def assert_vmaps(function, *args, tolerance=1e-12):
    """vmap over a leading axis is the loop over it; to rounding, where a batched kernel adds in another order."""
    slices = [function(*(arg[number] for arg in args)) for number in range(len(args[0]))]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *slices)
    torch.testing.assert_close(torch.vmap(function)(*args), stacked, rtol=tolerance, atol=tolerance)


def assert_rows_independent(function, *args):
    """A row's results are the same bits alone, among others, and wherever it stands."""
    whole = function(*args)
    rows = len(args[0])
    order = torch.from_numpy(np.random.default_rng(rows).permutation(rows))
    permuted = function(*(arg[order] for arg in args))
    assert_same_bits(permuted, pytree.tree_map(lambda leaf: leaf[order], whole))
    for row in range(rows):
        alone = function(*(arg[row : row + 1] for arg in args))
        assert_same_bits(alone, pytree.tree_map(lambda leaf, row=row: leaf[row : row + 1], whole))


def gradients(loss, args):
    """The gradient of the scalar `loss(*args)` with respect to each of `args`; zeros for one that has no part in it."""
    args = [arg.detach().clone().requires_grad_() for arg in args]
    return torch.autograd.grad(loss(*args), args, materialize_grads=True)


def assert_hidden_ignored(function, args, mask):
    """Whatever lies where `mask` is False, values and gradients keep their bits, and its own gradient is 0.

    `function(*args, mask)` is a tensor or a tree of them; the gradient is that of a weighted sum of its first leaf,
    with weights that differ, so that no cancellation hides an error.
    """

    def first(*inputs):
        leaf = pytree.tree_leaves(function(*inputs, mask))[0]
        return (leaf * torch.arange(1, leaf.numel() + 1).view(leaf.shape)).sum()

    shown = function(*args, mask), gradients(first, args)
    for value in HIDDEN.values():
        hidden = [torch.where(mask, arg, value) for arg in args]
        found = function(*hidden, mask), gradients(first, hidden)
        assert_same_bits(found, shown)
        for gradient in found[1]:
            assert not gradient[~mask].any()
