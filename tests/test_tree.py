import gc
from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_pure, assert_same_bits, floats
from torch import Tensor

from rlhf.tree import (
    ALIGNMENT,
    CHUNK,
    all_finite,
    cast,
    chunked_squared_norms,
    flat_layout,
    flatten,
    global_norm,
    leaves,
    named_leaves,
    realign,
    to_device,
    tree_map,
    tree_map_named,
    tree_sum,
    unflatten,
    with_leaves,
)


class Pair(NamedTuple):
    left: object
    right: object


SHAPES = st.sampled_from([(), (1,), (3,), (2, 5), (64,), (65,), (0,), (5, 1, 13)])
LEAVES = st.builds(lambda shape, seed: floats(seed, *shape, dtype=torch.float32), SHAPES, st.integers(0, 99))
NAMES = st.sampled_from(["w", "b", "ln_1", "h", "10", "9", "Z"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=2).map(tuple),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


def example_tree():
    """Every container, in an order that is neither sorted nor that of numbers."""
    return {
        "wte": floats(0, 3, 2, dtype=torch.float32),
        "h": [{"b": floats(number, 2, dtype=torch.float32)} for number in range(11)],
        "b": Pair(left=floats(1, 1, dtype=torch.float32), right=(floats(2, 70, dtype=torch.float32),)),
    }


def reordered(tree):
    """The same tree with every dict's keys inserted in the opposite order."""
    if isinstance(tree, dict):
        return {name: reordered(tree[name]) for name in reversed(tree)}
    if isinstance(tree, Pair):
        return Pair(*(reordered(child) for child in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(reordered(child) for child in tree)
    return tree


def by_hand(tree, prefix=""):
    """(dotted name, leaf) pairs, by walking the containers."""
    if isinstance(tree, Tensor):
        return [(prefix.removesuffix("."), tree)]
    if isinstance(tree, dict):
        children = list(tree.items())
    elif isinstance(tree, Pair):
        children = [("left", tree.left), ("right", tree.right)]
    else:
        children = list(enumerate(tree))
    return [pair for name, child in children for pair in by_hand(child, f"{prefix}{name}.")]


def test_tree_map_applies_to_leaves_at_the_same_place():
    tree = example_tree()
    doubled = tree_map(torch.add, tree, tree)
    assert_same_bits(doubled, tree_map(lambda leaf: 2 * leaf, tree))
    assert_same_bits(tree_map(torch.sub, reordered(doubled), tree), reordered(tree))


def test_tree_map_named_passes_dotted_names():
    tree = example_tree()
    seen = []
    result = tree_map_named(lambda name, a, b: seen.append(name) or a - b, tree, tree)
    assert sorted(seen) == list(named_leaves(tree))
    assert_same_bits(result, tree_map(torch.zeros_like, tree))


def test_leaves_are_in_traversal_order():
    tree = example_tree()
    assert [id(leaf) for leaf in leaves(tree)] == [id(leaf) for _, leaf in by_hand(tree)]


@given(tree=TREES)
def test_named_leaves_are_sorted_by_dotted_name(tree):
    found = named_leaves(tree)
    assert list(found) == sorted(found)
    expected = dict(by_hand(tree))
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in expected)


def test_named_leaves_sort_as_text():
    names = list(named_leaves(example_tree()))
    assert names[:5] == ["b.left", "b.right.0", "h.0.b", "h.1.b", "h.10.b"]
    assert names[-1] == "wte"


@given(tree=TREES)
def test_named_leaves_do_not_depend_on_insertion_order(tree):
    assert_same_bits(named_leaves(reordered(tree)), named_leaves(tree))


@given(tree=TREES)
def test_with_leaves_is_the_inverse_of_named_leaves(tree):
    assert_same_bits(with_leaves(tree_map(torch.zeros_like, tree), named_leaves(reordered(tree))), tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda named: named.pop("wte"), r"missing \['wte'\] and unknown \[\]", id="missing"),
        pytest.param(
            lambda named: named.update(wpe=torch.ones(1)), r"missing \[\] and unknown \['wpe'\]", id="unknown"
        ),
    ],
)
def test_with_leaves_rejects_other_names(change, message):
    named = named_leaves(example_tree())
    change(named)
    with pytest.raises(ValueError, match=rf"^with_leaves: {message}, expected the tree's names$"):
        with_leaves(example_tree(), named)


def test_cast_changes_floating_leaves_only():
    tree = {"w": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, dtype=torch.bool)}
    found = cast(tree, torch.bfloat16)
    assert [leaf.dtype for leaf in leaves(found)] == [torch.bfloat16, torch.int64, torch.bool]
    assert all(after is before for after, before in zip(leaves(cast(tree, torch.float32)), leaves(tree), strict=True))


def test_to_device_moves_every_leaf():
    assert all(leaf.device.type == "meta" for leaf in leaves(to_device(example_tree(), "meta")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_all_finite_sees_one_element(bad):
    tree = {"w": torch.ones(3), "ids": torch.ones(2, dtype=torch.int64), "b": [torch.zeros(2, 2)]}
    assert all_finite(tree) is True
    tree["b"][0][1, 0] = bad
    assert all_finite(tree) is False


@pytest.mark.parametrize("count", range(1, 34))
def test_tree_sum_is_the_documented_binary_tree(count):
    # Numbers of very different size, so that any other order of additions rounds differently.
    terms = [floats(number, 40, dtype=torch.float32) * 10.0 ** (number % 7) for number in range(count)]
    found = tree_sum({"g": [term]} for term in terms)
    np.testing.assert_array_equal(found["g"][0].numpy(), oracles.tree_sum([term.numpy() for term in terms]))


def test_tree_sum_in_place_has_the_same_bits_and_needs_no_memory():
    terms = [torch.linspace(-1, 1, 7) / (n + 1) ** 3 for n in range(6)]
    buffers = [term.clone() for term in terms]
    found = tree_sum((buffer for buffer in buffers), add=torch.Tensor.add_)
    assert torch.equal(found, tree_sum(terms))
    assert any(found is buffer for buffer in buffers)


def test_tree_sum_terms_tell_orders_apart():
    """The terms of the test above would not pass a plain running sum."""
    terms = [(floats(number, 40, dtype=torch.float32) * 10.0 ** (number % 7)).numpy() for number in range(33)]
    assert not np.array_equal(oracles.tree_sum(terms), sum(terms[1:], terms[0]))


@given(count=st.integers(1, 40), level=st.integers(0, 5))
def test_invariant_3_tree_sum_of_aligned_subtrees_has_the_same_bits(count, level):
    terms = [floats(number, 20, dtype=torch.float32) * 10.0 ** (number % 7) for number in range(count)]
    size = 2**level
    subtrees = (tree_sum(terms[start : start + size]) for start in range(0, count, size))
    assert_same_bits(tree_sum(subtrees), tree_sum(terms))


def test_tree_sum_keeps_few_partial_sums_alive():
    shape = (2, 3, 5, 7, 11)  # found again among all tensors of the process

    def terms():
        for number in range(32):
            if number == 31:
                alive.append(sum(type(x) is Tensor and x.shape == shape for x in gc.get_objects()))
            yield torch.ones(shape)

    alive = []
    assert tree_sum(terms())[0, 0, 0, 0, 0] == 32
    assert alive[0] <= 6  # log2(32) + 1; all of them would be 31


def test_tree_sum_rejects_nothing():
    with pytest.raises(ValueError, match=r"^tree_sum: got no trees, expected at least one$"):
        tree_sum(iter([]))


@given(tree=TREES)
def test_flatten_and_unflatten_are_inverse(tree):
    layout = flat_layout(tree)
    flat = flatten(tree, layout)
    assert (flat.dtype, flat.shape) == (torch.float32, (layout.size,))
    assert_same_bits(unflatten(flat, layout), tree)
    assert_same_bits(flatten(unflatten(flat, layout), layout), flat)


def test_models_of_a_layout_begin_at_chunks_if_asked():
    tree = {"b": {"x": torch.ones(CHUNK + 1), "y": torch.ones(3)}, "a": torch.ones(2), "b-c": torch.ones(1)}
    layout = flat_layout(tree, chunk_models=True)
    assert dict(zip(layout.names, layout.offsets, strict=True)) == {
        "a": 0, "b-c": CHUNK, "b.x": 2 * CHUNK, "b.y": 3 * CHUNK + 64
    }  # fmt: skip
    assert layout.size == 4 * CHUNK
    assert_same_bits(unflatten(flatten(tree, layout), layout), tree)
    assert flat_layout(tree["b"], chunk_models=True).offsets == (0, 2 * CHUNK)


@given(tree=TREES)
def test_flat_layout_is_sorted_aligned_padded_and_without_overlap(tree):
    layout = flat_layout(tree)
    named = named_leaves(tree)
    assert layout.names == tuple(named)
    assert layout.shapes == tuple(leaf.shape for leaf in named.values())
    end = 0
    for shape, offset in zip(layout.shapes, layout.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + shape.numel()
    assert layout.size % CHUNK == 0
    assert end <= layout.size < end + ALIGNMENT + CHUNK


@given(tree=TREES)
def test_flat_buffer_does_not_depend_on_insertion_order(tree):
    other, layout, other_layout = reordered(tree), flat_layout(tree), flat_layout(reordered(tree))
    assert (layout.names, layout.shapes, layout.offsets, layout.size) == (
        other_layout.names,
        other_layout.shapes,
        other_layout.offsets,
        other_layout.size,
    )
    assert_same_bits(flatten(other, other_layout), flatten(tree, layout))


def test_flatten_leaves_gaps_zero():
    layout = flat_layout({"a": torch.ones(3), "b": torch.ones(70)})
    assert (layout.offsets, layout.size) == ((0, 64), 4096)
    flat = flatten({"a": torch.ones(3), "b": torch.ones(70)}, layout, torch.float64)
    assert flat.dtype == torch.float64
    assert flat.nonzero().flatten().tolist() == [0, 1, 2, *range(64, 134)]


def test_flatten_does_not_alias_its_leaves():
    tree = {"a": torch.ones(CHUNK)}
    flatten(tree, flat_layout(tree)).zero_()
    assert torch.equal(tree["a"], torch.ones(CHUNK))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"a": torch.ones(2, 3)}, id="missing"),
        pytest.param({"a": torch.ones(2, 3), "c": torch.ones(4)}, id="other_name"),
        pytest.param({"a": torch.ones(3, 2), "b": torch.ones(4)}, id="other_shape"),
        pytest.param({"a": torch.ones(2, 3), "b": [torch.ones(4)]}, id="other_structure"),
    ],
)
def test_flatten_rejects_what_its_layout_does_not_describe(other):
    layout = flat_layout({"a": torch.ones(2, 3), "b": torch.ones(4)})
    with pytest.raises(ValueError, match=r"^flatten: the tree has another structure or other shapes than its layout$"):
        flatten(other, layout)


def test_unflatten_gives_views():
    tree = example_tree()
    layout = flat_layout(tree)
    flat = flatten(tree, layout)
    views = unflatten(flat, layout)
    flat += 1.0
    assert_same_bits(views, tree_map(lambda leaf: leaf + 1.0, tree))


def test_chunk_square_sums_value():
    flat = floats(3, 3 * CHUNK, dtype=torch.float32)
    found = chunked_squared_norms(flat)
    assert found.dtype == torch.float64
    assert_close(found, np.square(flat.double().numpy()).reshape(3, CHUNK).sum(axis=1), 1e-6)


def test_chunk_square_sums_are_finite_as_far_as_float32_holds_a_square():
    flat = torch.cat([torch.full((CHUNK,), value) for value in (2.8e17, 2.9e17, float("nan"), float("inf"))])
    assert chunked_squared_norms(flat).isfinite().tolist() == [True, False, False, False]


@given(cut=st.integers(1, 4))
def test_chunk_square_sums_of_shards_have_the_bits_of_the_whole(cut):
    flat = floats(4, 5 * CHUNK, dtype=torch.float32)
    shards = [chunked_squared_norms(part) for part in (flat[: cut * CHUNK], flat[cut * CHUNK :])]
    assert_same_bits(torch.cat(shards), chunked_squared_norms(flat))


@given(tree=TREES)
def test_global_norm_value(tree):
    everything = np.concatenate([leaf.double().numpy().ravel() for leaf in leaves(tree)])
    found = global_norm(tree)
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert_close(found, np.sqrt(np.square(everything).sum()))


@given(tree=TREES)
def test_global_norm_is_that_of_the_flat_buffer(tree):
    flat = flatten(tree, flat_layout(tree))
    assert_close(chunked_squared_norms(flat).sum().sqrt(), global_norm(tree), 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda tree: tree_map(torch.neg, tree), id="tree_map"),
        pytest.param(lambda tree: cast(tree, torch.float64), id="cast"),
        pytest.param(lambda tree: tree_sum([tree, tree, tree]), id="tree_sum"),
        pytest.param(lambda tree: flatten(tree, flat_layout(tree)), id="flatten"),
        pytest.param(global_norm, id="global_norm"),
        pytest.param(lambda tree: chunked_squared_norms(flatten(tree, flat_layout(tree))), id="chunked_squared_norms"),
    ],
)
def test_tree_functions_are_pure(function):
    assert_pure(function, example_tree())


def test_named_leaves_refuses_names_that_collide():
    with pytest.raises(ValueError, match="two leaves have the same dotted name"):
        named_leaves({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


@given(st.integers(0, 40), st.booleans())
def test_leaves_lie_as_new_tensors_do(start, turned):
    part = floats(3, 100, dtype=torch.float32)[start : start + 60].view(5, 12)
    leaf = part.T if turned else part
    (found,) = realign((leaf,))
    assert_same_bits(found, leaf)
    assert found.is_contiguous()
    assert found.data_ptr() % 64 == 0
    assert realign(found) is found
    assert (found is leaf) == (not turned and start % 16 == 0)
