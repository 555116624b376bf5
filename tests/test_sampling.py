"""Drawing tokens: against brute force, transformers' own filters, and the full forward pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from rlhf import random
from rlhf.sampling import filter_logits, sample_token


def logits_of(seed: int, rows: int = 4, vocabulary: int = 9) -> torch.Tensor:
    return 2.0 * random.normal(random.key(seed), (rows, vocabulary))


@pytest.mark.parametrize("top_k", [0, 1, 3, 9, 20])
def test_filter_logits_top_k_equals_transformers(top_k):
    logits = logits_of(0)
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    assert torch.equal(filter_logits(logits, top_k=top_k), expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999, 1.0])
def test_filter_logits_top_p_equals_transformers(top_p):
    logits = logits_of(1, rows=50)
    expected = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    assert torch.equal(filter_logits(logits, top_p=top_p), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_filter_logits_top_p_keeps_the_smallest_set_that_reaches_p(seed, top_p):
    logits = logits_of(seed, rows=1)[0]
    kept = filter_logits(logits, top_p=top_p) > -torch.inf
    probs = logits.double().softmax(-1)
    mass = probs[kept].sum().item()
    assert mass >= top_p - 1e-6
    assert mass - probs[kept].min().item() < top_p + 1e-6
    assert probs[kept].min() >= (probs[~kept].max() if (~kept).any() else 0)


def test_filter_logits_top_k_1_is_greedy_among_ties():
    logits = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    kept = filter_logits(logits, top_k=1) > -torch.inf
    assert kept.tolist() == [[False, True, False], [True, False, False]]


FORMS = pytest.mark.parametrize("sample", [sample_token, sample_token.__wrapped__], ids=["in parts", "at once"])


@FORMS
def test_a_token_is_drawn_though_logits_are_not_finite(sample):
    """So that it is the check of what was drawn that fails, with the state saved."""
    tokens = sample(torch.full((2, 300), torch.nan), torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 300)).all()


@FORMS
@pytest.mark.parametrize("vocabulary", [9, 256, 300])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(0, 2**53 - 1))
def test_sample_token_is_the_inverse_cdf(sample, vocabulary, seed, draw):
    logits, uniform = logits_of(seed, rows=1, vocabulary=vocabulary)[0], draw * 2.0**-53
    total, expected = 0.0, None
    for token, prob in enumerate(logits.double().softmax(-1).tolist()):
        if abs(total - uniform) < 1e-14:
            return  # a rounding of the cumulative sum may fall on either side
        total += prob
        if total > uniform:
            expected = token
            break
    assert sample(logits, torch.tensor(uniform, dtype=torch.float64)).item() == expected


@FORMS
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_sample_token_never_draws_a_filtered_token(sample, uniform):
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2:4] = torch.tensor([0.3, 0.1])
    assert sample(logits, torch.tensor([uniform], dtype=torch.float64)).item() in (2, 3)


@FORMS
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
def test_sample_token_never_draws_a_filtered_token_of_many(sample, seed, uniform):
    """Where most blocks are empty, and at the very edges between two tokens."""
    logits = logits_of(seed, rows=1, vocabulary=700)[0]
    logits = torch.where(random.uniform(random.key(seed), (700,)) < 0.02, logits, -torch.inf)
    logits[seed % 700] = 0.0
    edges = logits.double().softmax(-1).cumsum(-1).unique()
    below = edges.nextafter(torch.zeros_like(edges))
    uniforms = torch.cat([edges, below, torch.tensor([uniform]).double()]).clamp(max=1 - 2**-53)
    assert torch.isfinite(logits[sample(logits.expand(len(uniforms), -1), uniforms)]).all()


@FORMS
def test_sample_token_follows_the_distribution(sample):
    logits = logits_of(5, rows=1)
    count = 40_000
    draws = sample(logits.expand(count, -1), random.uniform_at(random.key(6), torch.arange(count)))
    expected = logits[0].double().softmax(-1) * count
    chi_square = ((torch.bincount(draws, minlength=9) - expected).square() / expected).sum().item()
    assert chi_square < 26.1  # 99.9% quantile at 8 degrees of freedom


@FORMS
def test_every_token_of_a_large_vocabulary_has_its_probability(sample):
    """1%, 50% and 99% of a token's interval in float64 softmax draw that token: nothing is lost or moved."""
    logits = 3.0 * random.normal(random.key(11), (50_257,))
    probs = logits.double().softmax(-1)
    starts = probs.cumsum(-1) - probs
    tokens = torch.cat([probs.argsort()[:300], torch.arange(0, len(probs), 200)])  # the unlikeliest, and some of all
    assert probs[tokens[0]] < 1e-11
    for share in (0.01, 0.5, 0.99):
        drawn = [sample(logits.expand(50, -1), (starts + share * probs)[part]) for part in tokens.split(50)[:-1]]
        assert torch.equal(torch.cat(drawn), tokens[: 50 * len(drawn)])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"filter_logits: top_k is -1"):
        filter_logits(logits_of(0), top_k=-1)
    with pytest.raises(ValueError, match="filter_logits: top_p is 0"):
        filter_logits(logits_of(0), top_p=0)


def test_filter_logits_may_be_mapped_over_top_p():
    values = torch.tensor([0.3, 0.8])
    found = torch.func.vmap(lambda p: filter_logits(logits_of(3), top_p=p))(values)
    assert torch.equal(found, torch.stack([filter_logits(logits_of(3), top_p=float(p)) for p in values]))
