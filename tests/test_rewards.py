"""Sources of reward: how they are written, what a function is called with, and whatever it may do wrong."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf import random
from rlhf.errors import NonFiniteError, UserError
from rlhf.io.model_folder import LanguageModel, RewardModel, RewardStatistics, save_language_model, save_reward_model
from rlhf.io.reward_sources import RewardSource, call_reward_function, check_columns, open_sources
from rlhf.io.tokenizer import Tokenizer
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config
from rlhf.train.ppo import _without_rounding_std
from rlhf.train.reward import _statistics

FUNCTIONS = """
from __future__ import annotations

import dataclasses
import typing

@dataclasses.dataclass
class Judge:
    limit: typing.ClassVar[int] = 3
    bonus: float = 0.5

def length(prompts, completions):
    return [float(len(text)) for text in completions]

def shouting(completions, **columns):
    return [Judge().bonus * text.isupper() for text in completions]

class Callable:
    def __call__(self, prompts, completions):
        return [1.0] * len(prompts)

instance = Callable()
number = 5
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Each test works in a folder of its own, and leaves no module or search path behind."""
    monkeypatch.chdir(tmp_path)
    before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before[0]
    for name in set(sys.modules) - before[1]:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> Path:
    """rm/ and other/rm/ with the same vocabulary, foreign/ with another, lm/ a language model."""
    folder = tmp_path_factory.mktemp("models")
    foreign = Tokenizer.train([f"other words {number}" for number in range(99)], 300)
    for name, words in (("rm", tokenizer), ("other/rm", tokenizer), ("foreign", foreign)):
        config = GPT2Config(vocab_size=words.vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        params = {"trunk": gpt2.init(config, key=random.key(0)), "head": {"weight": torch.ones(1, 16)}}
        save_reward_model(folder / name, RewardModel(params, config, words, RewardStatistics(1.0, 2.0, 3)), facts={})
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = LanguageModel(gpt2.init(config, key=random.key(0)), config, tokenizer)
    save_language_model(folder / "lm", model, facts={})
    return folder


def source_of(function: Any) -> RewardSource:
    return RewardSource("mine", 1.0, None, function)


def call(function: Any, columns: list[dict] | None = None) -> list[float]:
    columns = columns or [{"prompt": "p"}, {"prompt": "q"}]
    return call_reward_function(source_of(function), ["p", "q"], ["a", "b"], columns)


_fresh = itertools.count()


def module_with(text: str) -> str:
    """The name of a new module in the working directory."""
    name = f"rewards_of_test_{next(_fresh)}"
    Path(f"{name}.py").write_text(text)
    return name


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("", 1.0),
        ("0.5*", 0.5),
        ("2*", 2.0),
        ("-1*", -1.0),
        ("+.25*", 0.25),
        ("1e-3*", 1e-3),
        ("1E2*", 100.0),
        ("3.*", 3.0),
    ],
)
def test_open_sources_reads_weights(tokenizer, models, weight, value):
    module = module_with(FUNCTIONS)
    for target, name in ((f"{module}:length", "length"), (f"{module}.py:length", "length"), (f"{models}/rm", "rm")):
        (source,) = open_sources([weight + target], tokenizer)
        assert (source.name, source.weight) == (name, value)
        assert (source.model is None) == (name == "length")
        assert (source.function is None) == (name == "rm")


def test_open_sources_takes_weight_0_as_gold_unless_nothing_else_is_there(tokenizer, models):
    module = module_with(FUNCTIONS)
    sources = open_sources([f"0*{models}/other/rm", f"0*{module}:length", f"{models}/rm"], tokenizer)
    assert [source.metric for source in sources] == ["reward/rm#2", "gold/rm", "gold/length"], "optimised ones first"
    with pytest.raises(UserError, match="every weight is 0, so there is nothing to optimise"):
        open_sources([f"0*{models}/rm", f"-0.0*{module}:length"], tokenizer)


def test_open_sources_reads_a_reward_model_with_its_statistics(tokenizer, models):
    (source,) = open_sources([str(models / "rm") + "/"], tokenizer)
    assert source.model.statistics == RewardStatistics(1.0, 2.0, 3)
    assert torch.equal(source.model.params["head"]["weight"], torch.ones(1, 16))


def test_open_sources_finds_modules_and_files(tokenizer, tmp_path):
    module = module_with(FUNCTIONS)
    (tmp_path / "sub folder").mkdir()
    elsewhere = tmp_path / "sub folder" / "with-dash.py"
    elsewhere.write_text(FUNCTIONS)
    package = tmp_path / f"{module}_package"
    package.mkdir()
    (package / "inner.py").write_text(FUNCTIONS)
    specs = [
        f"{module}:shouting",
        f"{elsewhere}:shouting",
        "sub folder/with-dash.py:shouting",
        f"{package.name}.inner:shouting",
    ]
    for source in open_sources(specs, tokenizer):
        assert call_reward_function(source, ["p", "q"], ["A", "b"], [{}, {}]) == [0.5, 0.0]


def test_open_sources_takes_any_callable(tokenizer):
    module = module_with(FUNCTIONS)
    (source,) = open_sources([f"{module}:instance"], tokenizer)
    assert call_reward_function(source, ["p"], ["c"], [{}]) == [1.0]


def test_open_sources_keeps_two_of_the_same_name_apart(tokenizer, models):
    module = module_with(FUNCTIONS)
    other = module_with(FUNCTIONS)
    specs = [f"{models}/rm", f"{module}:length", f"2*{other}.py:length", f"{models}/other/rm", f"3*{module}:length"]
    sources = open_sources(specs, tokenizer)
    assert [source.name for source in sources] == ["rm", "length", "length#2", "rm#2", "length#3"]
    assert [source.weight for source in sources] == [1.0, 1.0, 2.0, 1.0, 3.0]


def test_open_sources_of_nothing_is_nothing(tokenizer):
    assert open_sources([], tokenizer) == []


REFUSED = {
    "": "a source is empty",
    "no_such_folder": "there is no such folder, and it is not module:function or file.py:function",
    "no/such/folder": "there is no such folder",
    "2*no_such_folder": "there is no such folder",
    "2*": "there is no such folder",
    "{module}.py": "there is no such folder, and it is not module:function or file.py:function",
    "{module}:": "it is not module:function",
    ":length": "it is not module:function",
    "{module}:missing": "has no function 'missing'",
    "{module}:number": "has no function 'number'",
    "{module}.py:missing": "has no function 'missing'",
    "no_such_module:f": "no_such_module cannot be imported (No module named 'no_such_module')",
    "{module}.missing:f": "cannot be imported",
    "missing.py:f": "missing.py cannot be imported",
    "folder.py:f": "folder.py cannot be imported",
    ".{module}:length": "cannot be imported",
    "..:length": "cannot be imported",
    "two words:f": "cannot be imported",
    ".*{module}:length": "the weight '.' is not a number",
    "1.2.3*{module}:length": "the weight '1.2.3' is not a number",
    "1e400*{module}:length": "the weight '1e400' is not",
    "{broken}:f": "cannot be imported (invalid syntax",
    "{broken}.py:f": "cannot be imported (invalid syntax",
    "{importing}:f": "cannot be imported (No module named 'no_such_library')",
    "{raising}:f": "cannot be imported (NameError: name 'undefined_name' is not defined",
    "{raising}.py:f": "cannot be imported (NameError: name 'undefined_name' is not defined",
    "{quitting}:f": "cannot be imported (SystemExit",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_a_source_that_cannot_be_opened_is_refused_as_it_was_written(tokenizer, spec):
    Path("folder.py").mkdir()
    spelt = spec.format(
        module=module_with(FUNCTIONS),
        broken=module_with("def f(:\n"),
        importing=module_with("import no_such_library\n"),
        raising=module_with("x = undefined_name\n"),
        quitting=module_with("raise SystemExit(3)\n"),
    )
    with pytest.raises(UserError) as caught:
        open_sources([spelt], tokenizer)
    assert str(caught.value).startswith("--ppo.reward")
    assert spelt in str(caught.value)
    assert REFUSED[spec] in str(caught.value)


def test_a_reward_model_of_another_vocabulary_is_refused(tokenizer, models):
    with pytest.raises(UserError, match=r"foreign: the reward model's vocabulary \(\d+ entries\) is not the policy's"):
        open_sources([f"{models}/foreign"], tokenizer)
    open_sources([f"{models}/foreign"], None)


def test_a_folder_that_holds_no_reward_model_is_refused(tokenizer, models, tmp_path):
    with pytest.raises(UserError, match="holds a GPT2LMHeadModel, expected a GPT2ForSequenceClassification"):
        open_sources([f"{models}/lm"], tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        open_sources(["empty"], tokenizer)


COLUMNS = [{"prompt": "p", "answer": 1, "x": [1]}, {"prompt": "q", "answer": None, "extra": "e"}]


def test_a_function_gets_prompts_and_completions_by_keyword():
    seen = {}

    def reward(*, completions, prompts):
        seen.update(prompts=prompts, completions=completions)
        return [1, 2.5]

    values = call(reward, COLUMNS)
    assert values == [1.0, 2.5]
    assert all(type(value) is float for value in values)
    assert seen == {"prompts": ["p", "q"], "completions": ["a", "b"]}


def test_a_function_gets_the_columns_it_names():
    seen = {}

    def reward(prompts, completions, answer, extra="default", absent="default"):
        seen.update(answer=answer, extra=extra, absent=absent)
        return [0.0, 0.0]

    call(reward, COLUMNS)
    assert seen == {"answer": [1, None], "extra": [None, "e"], "absent": "default"}


def test_a_function_that_takes_anything_gets_every_column():
    seen = {}

    def reward(**everything):
        seen.update(everything)
        return [0.0, 0.0]

    call(reward, COLUMNS)
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "b"],
        "answer": [1, None],
        "x": [[1], None],
        "extra": [None, "e"],
    }


def test_columns_never_hide_the_texts_themselves():
    columns = [{"prompt": "file", "prompts": 1, "completions": 2, "completion": 3}] * 2
    seen = {}

    def reward(**everything):
        seen.update(everything)
        return [0.0, 0.0]

    call(reward, columns)
    assert (seen["prompts"], seen["completions"], seen["completion"]) == (["p", "q"], ["a", "b"], [3, 3])


def test_a_function_cannot_change_the_callers_texts():
    prompts, completions = ["p"], ["c"]

    def reward(prompts, completions):
        prompts.clear()
        completions.append("x")
        return [1.0]

    assert call_reward_function(source_of(reward), prompts, completions, [{}]) == [1.0]
    assert (prompts, completions) == (["p"], ["c"])


@pytest.mark.parametrize(
    "returned",
    [(1, 2), torch.tensor([1.0, 2.0]), iter([1.0, 2.0]), [True, 2], [torch.tensor(1.0), "2"][:1] * 2],
    ids=["tuple", "tensor", "iterator", "bool", "scalars"],
)
def test_anything_that_yields_numbers_is_taken(returned):
    values = call(lambda prompts, completions: returned)
    assert values in ([1.0, 2.0], [1.0, 1.0])
    assert all(type(value) is float for value in values)


RETURNED = {
    "nothing": (None, "expected a list of 2 numbers, got 'None'"),
    "a number": (1.0, "expected a list of 2 numbers, got '1.0'"),
    "too few": ([1.0], "expected a list of 2 numbers, got 1"),
    "too many": ([1.0, 2.0, 3.0], "expected a list of 2 numbers, got 3"),
    "empty": ([], "expected a list of 2 numbers, got 0"),
    "texts": (["a", "b"], "expected a list of 2 numbers, got \"['a', 'b']\""),
    "nulls": ([None, 1.0], "expected a list of 2 numbers"),
    "lists": ([[1.0], [2.0]], "expected a list of 2 numbers"),
    "a text": ("12", "expected a list of 2 numbers, got '12'"),
    "a dict": ({0: 1.0, 1: 2.0}, "expected a list of 2 numbers"),
    "complex": ([1j, 2j], "expected a list of 2 numbers"),
    "too large": ([10**400, 1], "expected a list of 2 numbers"),
    "a matrix": (torch.ones(2, 2), "expected a list of 2 numbers"),
}


@pytest.mark.parametrize("wrong", RETURNED)
def test_a_function_that_returns_anything_else_is_refused(wrong):
    returned, piece = RETURNED[wrong]
    with pytest.raises(UserError) as caught:
        call(lambda prompts, completions: returned)
    assert str(caught.value).startswith("reward mine: ")
    assert piece in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_number_that_is_not_finite_is_named_with_its_texts(value):
    with pytest.raises(NonFiniteError, match=f"reward mine is {value} for the completion 'b' of 'q'"):
        call(lambda prompts, completions: [1.0, value])


def test_what_a_function_raises_is_told_in_one_line_with_its_place():
    def reward(prompts, completions):
        return {}["missing"]

    with pytest.raises(
        UserError, match=r"^reward mine: raised KeyError: 'missing' \(.*test_rewards\.py:\d+\)$"
    ) as caught:
        call(reward)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("function", "piece"),
    [
        (lambda prompts, completions, missing: [1.0, 1.0], "missing 1 required positional argument: 'missing'"),
        (lambda prompts: [1.0, 1.0], "unexpected keyword argument 'completions'"),
        (lambda: [1.0, 1.0], "unexpected keyword argument"),
        (lambda prompts, completions, /: [1.0, 1.0], "positional-only"),
        (max, "raised"),
    ],
    ids=["a column that is not there", "no completions", "nothing", "positional", "builtin"],
)
def test_a_function_of_another_signature_is_refused(function, piece):
    with pytest.raises(UserError, match=r"^reward mine: ") as caught:
        call(function, COLUMNS)
    assert piece in str(caught.value)
    if function is not max:  # which takes anything, and does not say what
        with pytest.raises(
            UserError, match=r"^reward mine: .*; it is called with prompts, completions and .* \(answer"
        ):
            check_columns([source_of(function)], {"prompt", "answer"})


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions: 0,
        lambda completions, **everything: 0,
        lambda *, prompts, completions, answer, absent=None: 0,
        max,
    ],
)
def test_a_function_that_can_be_called_is_taken(function):
    check_columns([source_of(function)], {"prompt", "answer", "extra"})


def test_a_function_that_quits_the_program_is_refused():
    def reward(prompts, completions):
        sys.exit(7)

    with pytest.raises(UserError, match=r"^reward mine: raised SystemExit: 7"):
        call(reward)


def test_interrupting_a_function_is_no_error_of_its():
    def reward(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(reward)


def noting(**fields: Any) -> Any:
    """A run as far as notes go."""
    lines: list[str] = []
    return SimpleNamespace(lines=lines, note=lines.append, **fields)


@pytest.mark.parametrize(
    ("chosen", "std"),
    [
        ([2.4, 2.4, 2.4], None),
        ([2.4, 2.4 + 2e-7, 2.4], None),
        ([1e-9, 2e-8, 3e-8], None),  # the rejected texts' scores say how large scores are
        ([5.0], None),
        ([1.0, 2.0, 3.0], 1.0),
        ([2.4, 2.5, 2.6], 0.1),
    ],
)
def test_statistics_of_scores_that_vary_by_rounding_alone_do_not_scale(chosen, std):
    run = noting(dtype=torch.float32)
    statistics = _statistics(run, torch.tensor(chosen), torch.full((len(chosen),), -1.0))
    assert statistics.std == pytest.approx(1.0 if std is None else std, rel=1e-5)
    assert [line.startswith("WARNING") for line in run.lines] == [True] * (std is None)


@pytest.mark.parametrize(
    ("mean", "std", "scales"), [(2.4, 5.4e-8, False), (0.0, 5e-8, False), (2.4, 0.1, True), (1e-3, 1e-3, True)]
)
def test_ppo_does_not_scale_by_a_stored_spread_of_rounding(mean, std, scales):
    run = noting()
    model: Any = RewardModel({}, None, None, RewardStatistics(mean, std, 40))  # type: ignore[arg-type]
    source = _without_rounding_std(run, RewardSource("judge", 1.0, model, None))
    assert source.model is not None
    assert source.model.statistics == RewardStatistics(mean, std if scales else 1.0, 40)
    assert len(run.lines) == (not scales)
    function = RewardSource("length", 1.0, None, len)
    assert _without_rounding_std(run, function) is function


@pytest.mark.parametrize("name", ["accuracy", "margin", "disagreement"])
def test_a_source_does_not_take_the_name_of_a_metric(tokenizer, name):
    module = module_with(f"def {name}(prompts, completions):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(UserError, match=f"reward/{name} in the log is another metric; rename {name}"):
        open_sources([f"{module}:{name}"], tokenizer)
