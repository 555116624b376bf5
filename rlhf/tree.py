"""Pytrees: nested dicts, lists, tuples and NamedTuples of tensors. No other module imports a pytree library.

Data that leaves the process (checkpoints, the parameter server, allreduce buffers) is ordered by the sorted dotted
names of its leaves instead of traversal order, so that all processes agree on the order.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rlhf.field_docs import documented
from rlhf.types import Tree

ALIGNMENT = 64
"""Alignment of the leaves in a flat buffer, in elements: 256 bytes of fp32, at least a cache line on every machine."""

CHUNK = 4096
"""Elements of a chunk of a flat buffer. Buffers are padded to chunks, and shards are cut between them."""


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree of the results of a function on every leaf.

    The `function` is called with a leaf of `tree` and the leaves at the same place in each tree of `rest`.

    Example:
        >>> tree_map(torch.add, {"w": torch.ones(1)}, {"w": torch.ones(1)})
        {'w': tensor([2.])}
    """
    return pytree.tree_map(function, tree, *rest)


def tree_map_named(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree of the results of a function on the dotted name and value of every leaf.

    The `function` is called with a name, a leaf of `tree` and the leaves at the same place in each tree of `rest`.

    Example:
        >>> tree_map_named(lambda name, leaf: f"{name}: {list(leaf.shape)}", {"h": [torch.ones(2, 3)]})
        {'h': ['h.0: [2, 3]']}
    """
    return pytree.tree_map_with_path(lambda path, *same: function(_dotted(path), *same), tree, *rest)


def leaves(tree: Tree) -> list[Tensor]:
    """Return the leaves of a tree in traversal order: dicts in order of insertion, lists by index.

    Example:
        >>> leaves({"b": torch.tensor(1), "a": [torch.tensor(2)]})
        [tensor(1), tensor(2)]
    """
    return pytree.tree_leaves(tree)


def named_leaves(tree: Tree) -> dict[str, Tensor]:
    """Return the leaves of a tree by dotted name, sorted by name.

    Example:
        >>> list(named_leaves({"h": [{"w": torch.ones(1)}], "b": torch.ones(1)}))
        ['b', 'h.0.w']

    Raises:
        ValueError: two leaves have the same name, because a key contains a dot.
    """
    with_paths, _ = pytree.tree_flatten_with_path(tree)
    named = {_dotted(path): leaf for path, leaf in with_paths}
    if len(named) < len(with_paths):
        raise ValueError("named_leaves: two leaves have the same dotted name; keys must not contain dots")
    return dict(sorted(named.items()))


def with_leaves(tree: Tree, named: dict[str, Tensor]) -> Tree:
    """Return a tree with other leaves.

    Args:
        tree: tree with the structure of the result.
        named: the new leaves, by dotted name.

    Raises:
        ValueError: a name is missing from or unknown to `tree`.

    Example:
        >>> with_leaves({"h": [torch.tensor(1)]}, {"h.0": torch.tensor(2)})
        {'h': [tensor(2)]}
    """
    with_paths, spec = pytree.tree_flatten_with_path(tree)
    names = [_dotted(path) for path, _ in with_paths]
    missing, unknown = sorted(set(names) - set(named)), sorted(set(named) - set(names))
    if missing or unknown:
        raise ValueError(
            f"with_leaves: missing {missing[:3]} and unknown {unknown[:3]}, expected the names of the tree"
        )
    return pytree.tree_unflatten([named[name] for name in names], spec)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Return the tree with floating-point leaves in `dtype`. Other leaves are unchanged.

    Example:
        >>> cast({"weight": torch.ones(1), "step": torch.tensor(3)}, torch.bfloat16)
        {'weight': tensor([1.], dtype=torch.bfloat16), 'step': tensor(3)}
    """
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def to_device(tree: Tree, device: torch.device | str) -> Tree:
    """Return the tree with every leaf on `device`. Copies to a GPU are asynchronous.

    Example:
        >>> to_device({"weight": torch.ones(1)}, "cpu")
        {'weight': tensor([1.])}
    """
    to_gpu = torch.device(device).type == "cuda"
    return tree_map(lambda leaf: leaf.to(device, non_blocking=to_gpu), tree)


def realign(tree: Tree) -> Tree:
    """Return the tree with contiguous leaves that start at multiples of 64 bytes, as new tensors do.

    The last bits of a matrix product depend on the alignment and strides of its operands, which differ between new
    tensors, tensors from files or shared memory, and slices. Leaves that are not aligned are copied.

    Example:
        >>> realign({"weight": torch.ones(4, 2).T})["weight"].is_contiguous()
        True
    """

    def align(leaf: Tensor) -> Tensor:
        if leaf.is_contiguous() and leaf.data_ptr() % 64 == 0:
            return leaf
        return leaf.clone(memory_format=torch.contiguous_format)

    return tree_map(align, tree)


def all_finite(tree: Tree) -> bool:
    """Return True if every element of every floating-point leaf of a tree is finite. Waits for the device.

    Example:
        >>> all_finite({"weight": torch.tensor([1.0, torch.inf])})
        False
    """
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves(tree) if leaf.is_floating_point())


def tree_sum(trees: Iterable[Tree], *, add: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tree:
    """Return the sum of trees, added along one fixed binary tree over 0..M-1.

        sum(0..M) = sum(0..P) + sum(P..M),   P the largest power of two below M

    The order of additions depends only on M, so any division of the work into aligned subtrees gives the same bits. At
    most log2(M) + 1 partial sums are alive at once. Pass a generator to keep memory low.

    Args:
        trees: trees of the same structure.
        add: function that adds two leaves. `Tensor.add_` saves memory but overwrites the trees.

    Raises:
        ValueError: there are no trees.

    Example:
        >>> tree_sum({"w": torch.tensor(float(n))} for n in range(4))
        {'w': tensor(6.)}
    """
    partial: list[tuple[int, Tree]] = []  # (how many were added, their sum), sizes falling: a binary counter
    for tree in trees:
        total, size = tree, 1
        while partial and partial[-1][0] == size:
            _, left = partial.pop()
            total, size = tree_map(add, left, total), 2 * size
        partial.append((size, total))
    if not partial:
        raise ValueError("tree_sum: got no trees, expected at least one")
    _, total = partial.pop()
    while partial:
        _, left = partial.pop()
        total = tree_map(add, left, total)
    return total


@documented
class FlatLayout(NamedTuple):
    """Layout of the leaves of a tree in one flat buffer: sorted by name, each aligned to `ALIGNMENT` elements."""

    names: tuple[str, ...]
    """Dotted names of the leaves, sorted."""
    shapes: tuple[torch.Size, ...]
    """Shapes of the leaves, in the order of `names`."""
    offsets: tuple[int, ...]
    """First elements of the leaves in the buffer, in the order of `names`."""
    size: int
    """Number of elements of the buffer, a multiple of `CHUNK`."""
    spec: Any
    """Structure of the tree, for `unflatten`."""
    order: tuple[int, ...]
    """Positions in `names` of the leaves in traversal order."""


def flat_layout(tree: Tree) -> FlatLayout:
    """Return the layout of `tree` in a flat buffer, which depends only on the names and shapes of its leaves.

    Example:
        >>> tree = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> layout = flat_layout(tree)
        >>> layout.names, layout.offsets, layout.size
        (('b', 'w'), (0, 64), 4096)
    """
    named = named_leaves(tree)
    with_paths, spec = pytree.tree_flatten_with_path(tree)
    position = {name: index for index, name in enumerate(named)}
    offsets, size = [], 0
    for leaf in named.values():
        offsets.append(size)
        size += _round_up(leaf.numel(), ALIGNMENT)
    return FlatLayout(
        names=tuple(named),
        shapes=tuple(leaf.shape for leaf in named.values()),
        offsets=tuple(offsets),
        size=_round_up(size, CHUNK),
        spec=spec,
        order=tuple(position[_dotted(path)] for path, _ in with_paths),
    )


def flatten(tree: Tree, layout: FlatLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return all leaves of a tree in one new [layout.size] buffer of a `dtype`, with zeros between the leaves.

    Raises:
        ValueError: structure or shapes of the tree are not those of `layout`.

    Example:
        >>> tree = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
        >>> flatten(tree, flat_layout(tree)).sum()
        tensor(4.)
    """
    in_order, spec = pytree.tree_flatten(tree)
    shapes = [layout.shapes[index] for index in layout.order]
    if spec != layout.spec or [leaf.shape for leaf in in_order] != shapes:
        raise ValueError("flatten: the tree has another structure or other shapes than its layout")
    by_index = dict(zip(layout.order, in_order, strict=True))
    parts = [by_index[index].reshape(-1) for index in range(len(in_order))]
    ends = (*layout.offsets[1:], layout.size)
    padded = []
    for part, begin, end in zip(parts, layout.offsets, ends, strict=True):
        padded += [part.to(dtype), part.new_zeros(end - begin - part.numel(), dtype=dtype)]
    return torch.cat(padded)


def unflatten(flat: Tensor, layout: FlatLayout) -> Tree:
    """Return the tree of a `layout` whose leaves are views of the buffer `flat`, and so follow its changes.

    Example:
        >>> layout = flat_layout({"weight": torch.ones(2)})
        >>> unflatten(torch.ones(layout.size), layout)
        {'weight': tensor([1., 1.])}
    """
    views = [
        flat[offset : offset + shape.numel()].view(shape)
        for shape, offset in zip(layout.shapes, layout.offsets, strict=True)
    ]
    return pytree.tree_unflatten([views[index] for index in layout.order], layout.spec)


def chunked_squared_norms(flat: Tensor) -> Tensor:
    """Return the sum of squares of each chunk of a buffer, [n / CHUNK] float64, with a relative error of about 1e-6.

    Shards are cut between chunks, so a norm computed from these sums has the same bits for any number of shards. Within
    a chunk, squares are added in float32, so a chunk with a norm above 1.8e19 counts as infinite.

    Args:
        flat: [n] float32, a flat buffer.

    Example:
        >>> chunked_squared_norms(torch.ones(2 * CHUNK))
        tensor([4096., 4096.], dtype=torch.float64)
    """
    return torch.linalg.vector_norm(flat.view(-1, CHUNK), dim=1).double().square()


def global_norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm over all leaves of a tree, [] float64.

    Example:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5., dtype=torch.float64)
    """
    return torch.stack([leaf.double().square().sum() for leaf in leaves(tree)]).sum().sqrt()


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", "")))) for entry in path)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
