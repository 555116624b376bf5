"""Attention against loops over queries and keys, in every form, dtype and case."""

import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch

from rlhf import random
from rlhf.accelerate import reference_of
from rlhf.kernels import fused_attention
from rlhf.models.attention import attend_to_cache, attention, attention_layout

B, N, T, H = 2, 3, 7, 4
GROUPS = [(3, 3), (6, 3), (6, 2), (4, 1)]
"""Query heads and the key-value heads that they share."""
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [3, 3, 0, 0, 3, 3, 3]])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def draws(number: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return random.normal(random.fold_in(random.key(9), number), shape).to(dtype)


def segment_bias(segments):
    return attention_layout(segments, None, torch.zeros(1), H).bias


def oracle(q, keys, values, seen):
    """Of one query [H] over keys and values [n][H]: those whose number is in `seen`."""
    scores = [math.exp(sum(float(a) * float(b) for a, b in zip(q, keys[s], strict=True)) / math.sqrt(H)) for s in seen]
    weights = [score / sum(scores) for score in scores]
    return [sum(w * float(values[s][h]) for w, s in zip(weights, seen, strict=True)) for h in range(H)]


def expected(q, k, v, segments):
    """[B, N, T, H] float64: each query over earlier keys, of its segment where there are any."""
    share = q.shape[1] // k.shape[1]
    return torch.tensor(
        [
            [
                [
                    oracle(
                        q[b, n, t],
                        k[b, n // share],
                        v[b, n // share],
                        [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]],
                    )
                    for t in range(T)
                ]
                for n in range(q.shape[1])
            ]
            for b in range(B)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["causal", "segments"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plain", [0, 512], ids=["torch's kernel", "plain"])
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_attention_value(heads, kv_heads, dtype, segments, plain, compiling, monkeypatch):
    monkeypatch.setattr(fused_attention, "_PLAIN", plain)  # of consequence in bf16, as the next
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    q, k, v = (draws(number, B, n, T, H, dtype=dtype) for number, n in enumerate((heads, kv_heads, kv_heads)))
    bias = segment_bias(segments)
    found = attention(q, k, v, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected(q, k, v, segments), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_attention_gradient_in_bfloat16(heads, kv_heads, compiling, monkeypatch):
    def gradients(dtype, weights):
        def loss(q, k, v):
            return (attention(q, k, v, segment_bias(SEGMENTS)).double() * weights).sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))(
            *(draws(number, B, n, T, H, dtype=dtype) for number, n in enumerate((heads, kv_heads, kv_heads)))
        )

    weights = draws(6, B, heads, T, H)
    wanted = gradients(torch.float64, weights)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for found, exact in zip(gradients(torch.bfloat16, weights), wanted, strict=True):
        torch.testing.assert_close(
            found.double(), exact, atol=TOLERANCE[torch.bfloat16] * float(exact.abs().max()), rtol=0
        )


def test_segment_bias_value():
    bias = segment_bias(SEGMENTS)
    assert (bias.shape, bias.dtype) == ((B, 1, T, T), torch.float32)
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(T) if bias[b, 0, t, s] == 0]
            assert seen == [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
            assert (bias[b, 0, t] == -torch.inf).sum() == T - len(seen)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_attend_once_value(heads, kv_heads, dtype, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    q, share = draws(3, B, heads, H, dtype=dtype), heads // kv_heads
    keys, values = draws(4, B, kv_heads, H, T, dtype=dtype), draws(5, B, kv_heads, T, H, dtype=dtype)
    seen = [[0, 1, 2, 3, 4], [0, 2]]
    bias = torch.full((B, T), -torch.inf)
    for row, slots in zip(bias, seen, strict=True):
        row[slots] = 0.0
    wanted = [
        [oracle(q[b, n], keys[b, n // share].T, values[b, n // share], seen[b]) for n in range(heads)] for b in range(B)
    ]
    found = attend_to_cache(q, keys, values, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=TOLERANCE[dtype], rtol=0)


def curvature(function, q, k, v):
    """Second derivatives by autograd alone."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(function(*leaves, None).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(gradient.sin().sum() for gradient in gradients), leaves)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS[:2])
def test_attention_differentiated_twice_is_the_reference_differentiated_twice(heads, kv_heads):
    tensors = [draws(number, B, n, T, H) for number, n in enumerate((heads, kv_heads, kv_heads))]
    torch.testing.assert_close(curvature(attention, *tensors), curvature(reference_of(attention), *tensors))


@pytest.mark.parametrize("transform", ["jvp", "jvp of grad", "vmap of grad"])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS[:2])
def test_attention_under_transforms_is_the_reference(heads, kv_heads, transform):
    tensors = tuple(draws(number, B, n, T, H) for number, n in enumerate((heads, kv_heads, kv_heads)))

    def outcome(function):
        def loss(*tensors):
            return function(*tensors, None).square().sum()

        if transform == "jvp":
            return torch.func.jvp(loss, tensors, tensors)
        if transform == "jvp of grad":
            return torch.func.jvp(torch.func.grad(loss, argnums=(0, 1, 2)), tensors, tensors)
        return torch.func.vmap(torch.func.grad(loss))(*(torch.stack([x, x.cos()]) for x in tensors))

    torch.testing.assert_close(outcome(attention), outcome(reference_of(attention)))


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_the_backward_pass_frees_what_attention_kept_while_the_graph_is_alive():
    kept = weakref.WeakSet()

    def keep(tensor):
        saved = Saved(tensor)
        kept.add(saved)
        return saved

    leaves = [draws(number, B, N, T, H).requires_grad_() for number in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        output = attention(*leaves, None)
        assert len(kept)
        output.backward(torch.ones_like(output))
        gc.collect()
        assert not len(kept)


def test_a_retained_graph_of_attention_gives_the_same_gradients_again():
    leaves = [draws(number, B, N, T, H).requires_grad_() for number in range(3)]
    loss = attention(*leaves, segment_bias(SEGMENTS)).square().sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_attention_and_its_gradient_import_no_sympy():
    """SymPy takes half a second and 36 MB of every training process."""
    program = (
        "import sys, torch; from rlhf.models.attention import attention\n"
        "q, k, v = torch.ones(3, 1, 1, 2, 4).requires_grad_()\n"
        "attention(q, k, v, None).sum().backward(); print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
