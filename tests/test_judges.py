"""Python functions that judge: told apart by their arguments, asked in both orders, and never trusted."""

import math

import pytest

from rlhf.errors import NonFiniteError, UserError
from rlhf.evaluate.judges import Judge, open_judges, prefer, score

PROMPTS, COLUMNS = ["p", "q"], [{"prompt": "p", "item": "tea"}, {"prompt": "q", "item": "mug"}]


def names_item(prompts, completions, item):
    return [float(own in text) for own, text in zip(item, completions, strict=True)]


def longer(prompts, first, second):
    return [0.5 * (1 + (len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def always_first(prompts, first, second, item):
    assert item == ["tea", "mug"]
    return [1.0] * len(prompts)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def scores(prompts, completions): return [0.0] * len(prompts)\n"
        "def compares(prompts, first, second): return [0.5] * len(prompts)\n"
        "class Both:\n    def __call__(self, prompts, first, second, **columns): return [1] * len(prompts)\n"
        "both = Both()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_judges"


def test_pairwise_judges_are_told_apart_by_their_arguments(module):
    judges = open_judges([f"{module}:scores", f"{module}.py:compares", f"{module}:both"])
    assert [(judge.name, judge.pairwise) for judge in judges] == [("scores", False), ("compares", True), ("both", True)]


def test_scorers_get_the_columns_that_they_accept():
    judge = Judge("names_item", names_item, pairwise=False)
    assert score(judge, PROMPTS, ["tea!", "tea!"], COLUMNS).tolist() == [1.0, 0.0]


def test_both_orders_are_asked():
    preferences = prefer(Judge("longer", longer, pairwise=True), PROMPTS, ["aaa", "a"], ["bb", "b"], COLUMNS)
    assert preferences.first.tolist() == preferences.second.tolist() == preferences.outcome.tolist() == [1.0, 0.5]


def test_a_judge_that_always_names_the_first_place_gives_ties():
    preferences = prefer(Judge("f", always_first, pairwise=True), PROMPTS, ["a", "b"], ["c", "d"], COLUMNS)
    assert preferences.outcome.tolist() == [0.5, 0.5]
    assert (preferences.first.tolist(), preferences.second.tolist()) == ([1.0, 1.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        pytest.param([math.nan, 0.5], NonFiniteError, "judge j is nan for the completion 'b' of 'p'", id="nan"),
        pytest.param([1.5, 0.5], UserError, r"judge j: returned 1.5, expected the probability in \[0, 1\]", id="range"),
        pytest.param([1.0], UserError, "judge j: expected a list of 2 numbers, got 1", id="count"),
        pytest.param("ab", UserError, "judge j: expected a list of 2 numbers", id="text"),
    ],
)
def test_bad_verdicts_are_refused(answer, error, message):
    with pytest.raises(error, match=message):
        prefer(Judge("j", lambda prompts, first, second: answer, pairwise=True), PROMPTS, "ab", "bc", COLUMNS)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nothing"], "--judge nothing: it is not module:function or file.py:function"),
        (["no_such_module:f"], "--judge no_such_module:f: no_such_module cannot be imported"),
        (["my_judges:absent"], "--judge my_judges:absent: my_judges.* has no function 'absent'"),
        (["my_judges:Both"], r"--judge my_judges:Both: got an unexpected keyword argument '\w+'; it is called with"),
        (["my_judges:scores", "my_judges.py:scores"], "--judge: two judges are called scores; rename one"),
    ],
)
def test_what_is_no_judge_is_refused(module, specs, message):
    with pytest.raises(UserError, match=message):
        open_judges(specs)
