"""Computing again and in chunks, against the plain function: the same values and gradients, with less kept."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad_and_value

from rlhf.remat import in_chunks, remat

WEIGHTS = {"a": torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7), "b": [torch.linspace(0, 2, 7).double()]}
INPUTS = torch.linspace(-2, 2, 55, dtype=torch.float64).view(11, 5).sin()
TARGETS = torch.arange(11) * 3 % 7


def per_token(weights, inputs, targets):
    """Log-probs, and something without a gradient."""
    logits = torch.tanh(inputs @ weights["a"]) + weights["b"][0]
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], logits.detach().amax(-1)


def gradients(function):
    """((weights', inputs') gradient, loss) of a sum in which every token counts differently."""

    def loss(weights, inputs):
        log_probs, largest = function(weights, inputs, TARGETS)
        return (log_probs * torch.arange(11)).sum() + largest.square().sum()

    return grad_and_value(loss, argnums=(0, 1))(WEIGHTS, INPUTS)


def test_remat_changes_no_bit_of_values_and_gradients():
    torch.testing.assert_close(gradients(remat(per_token)), gradients(per_token), atol=0, rtol=0)
    assert gradients(per_token)[0][0]["a"].abs().sum() > 1


def test_remat_under_plain_autograd():
    leaf = INPUTS.clone().requires_grad_()
    remat(per_token)(WEIGHTS, leaf, TARGETS)[0].sum().backward()
    again = INPUTS.clone().requires_grad_()
    per_token(WEIGHTS, again, TARGETS)[0].sum().backward()
    assert torch.equal(leaf.grad, again.grad)


def test_remat_nests():
    def outer(weights, inputs, targets):
        return remat(per_token)(weights, remat(torch.sin)(inputs), targets)

    torch.testing.assert_close(
        gradients(remat(outer)), gradients(lambda w, x, t: per_token(w, torch.sin(x), t)), atol=0, rtol=0
    )


@pytest.mark.parametrize(
    ("around", "kept"), [(lambda function: function, True), (remat, False)], ids=["plain", "remat"]
)
def test_remat_keeps_nothing_in_between(around, kept):
    between = []

    def function(x):
        middle = x.exp()
        between.append(weakref.ref(middle.untyped_storage()))
        return middle.exp()

    out = around(function)(torch.ones(3, requires_grad=True))
    assert (between[0]() is not None) == kept
    assert out.requires_grad


def test_remat_computes_again_only_for_the_backward_pass():
    calls = []

    def function(x):
        calls.append(len(x))
        return x.exp()

    with torch.no_grad():
        remat(function)(INPUTS)
    assert len(calls) == 1
    grad_and_value(lambda x: remat(function)(x).sum())(INPUTS)
    assert len(calls) == 3


@given(size=st.integers(1, 14))
def test_in_chunks_equals_the_plain_function_with_that_many_tokens_at_once(size):
    seen = []

    def watched(weights, inputs, targets):
        seen.append(len(inputs))
        return per_token(weights, inputs, targets)

    torch.testing.assert_close(gradients(in_chunks(watched, size)), gradients(per_token), atol=1e-12, rtol=1e-12)
    assert max(seen) == min(size, 11)
    assert len(seen) == (1 if size >= 11 else 2 * -(-11 // size))
