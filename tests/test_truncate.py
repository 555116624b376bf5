"""The rule for records longer than the context, against an enumeration that follows its words."""

import itertools

import pytest

from rlhf.data.truncate import Truncation, truncate


def by_the_words(prompt: int, completion: int, max_length: int, longest: int) -> Truncation:
    """Take tokens away one at a time, in the order the rule names."""
    kept = prompt
    while kept + longest + 1 > max_length and kept > max_length // 2:
        kept -= 1  # 1. the prompt loses its beginning, but keeps at least half of the context
    answer = completion
    while kept + answer > max_length:
        answer -= 1  # 2. the completion loses its end
    ends = answer == completion and kept + answer + 1 <= max_length  # … and with it the end-of-text token
    return Truncation(kept, answer, ends)


@pytest.mark.parametrize("max_length", range(2, 14))
def test_fit_follows_the_rule(max_length):
    for prompt, completion in itertools.product(range(1, 18), range(18)):
        expected = by_the_words(prompt, completion, max_length, completion)
        assert truncate(prompt, completion, max_length) == expected, (prompt, completion)


@pytest.mark.parametrize("max_length", [2, 3, 7, 10])
def test_fit_of_pairs_follows_the_rule(max_length):
    for prompt, first, second in itertools.product(range(1, 14), range(1, 14), range(1, 14)):
        fits = [truncate(prompt, answer, max_length, longest=max(first, second)) for answer in (first, second)]
        for kept, answer in zip(fits, (first, second), strict=True):
            assert kept == by_the_words(prompt, answer, max_length, max(first, second)), (prompt, first, second)
        assert fits[0].prompt == fits[1].prompt


def test_fit_keeps_what_it_promises():
    for max_length, prompt, completion in itertools.product(range(2, 20), range(1, 25), range(1, 25)):
        kept = truncate(prompt, completion, max_length)
        assert kept.prompt + kept.completion + kept.ends <= max_length
        assert 1 <= kept.prompt <= prompt
        assert 1 <= kept.completion <= completion
        assert not kept.ends or kept.completion == completion
        if prompt + completion + 1 <= max_length:
            assert kept == Truncation(prompt, completion, ends=True)
        else:
            assert kept.prompt + kept.completion + kept.ends == max_length  # nothing is cut that fits


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((3, 4, 8), Truncation(3, 4, True)),  # just fits
        ((6, 2, 8), Truncation(5, 2, True)),  # the prompt loses one
        ((9, 3, 8), Truncation(4, 3, True)),  # … up to half
        ((9, 4, 8), Truncation(4, 4, False)),  # no room for the end-of-text token
        ((9, 9, 8), Truncation(4, 4, False)),  # both are cut
        ((2, 9, 8), Truncation(2, 6, False)),  # a short prompt stays whole
        ((9, 9, 9), Truncation(4, 5, False)),  # half is rounded down
        ((1, 1, 2), Truncation(1, 1, False)),  # the smallest context
        ((5, 0, 4), Truncation(3, 0, True)),  # nothing to complete
    ],
)
def test_fit_examples(lengths, expected):
    assert truncate(*lengths) == expected
