"""Every setting has a docstring and a range, and no value outside of its range gets through."""

import ast
import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from rlhf import config as module
from rlhf.config import PipelineRun, PPOConfig, PPORun, RewardRun, RunConfig, SFTRun, flat_fields
from rlhf.ranges import Interval, Section

SECTIONS = {
    name: kind
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, Section) and kind is not Section
}


def fields_of(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, annotation) of every field that is not a section itself."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if not dataclasses.is_dataclass(hint):
            yield name, hint


def intervals_in(hint: Any) -> list[tuple[type, Interval]]:
    """(number type, range) of each alternative of an annotation that has a range."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        return [(kind, extra) for extra in extras if isinstance(extra, Interval)]
    return [found for part in get_args(hint) for found in intervals_in(part)]


def plain_types(hint: Any) -> set[type]:
    if get_origin(hint) is Annotated:
        return plain_types(get_args(hint)[0])
    parts = get_args(hint)
    return {found for part in parts for found in plain_types(part)} if parts else {hint}


def outside(kind: type, interval: Interval) -> list[float]:
    """Numbers just beyond each end of a range."""
    low, high = (part.strip() for part in interval.text[1:-1].split(","))
    step = 1 if kind is int else 1e-9
    values: list[float] = [kind(low) if interval.text[0] == "(" else kind(low) - step, kind(low) - 10**6]
    if high != "inf":
        values += [kind(high) if interval.text[-1] == ")" else kind(high) + step, kind(high) + 10**20]
    if kind is float:
        values += [math.nan, -math.inf] + ([math.inf] if interval.text[-1] == ")" or high != "inf" else [])
    return values


def ends(kind: type, interval: Interval) -> list[float]:
    """The ends of a range that belong to it, and numbers just inside."""
    low, high = (part.strip() for part in interval.text[1:-1].split(","))
    step = 1 if kind is int else 1e-9
    values = [kind(low) if interval.text[0] == "[" else kind(low) + step]
    if high == "inf":
        return values + ([math.inf] if interval.text[-1] == "]" else [10**9 if kind is int else 1e300])
    return [*values, kind(high) if interval.text[-1] == "]" else kind(high) - step]


RANGED = [
    (name, field, kind, interval)
    for name, section in SECTIONS.items()
    for field, hint in fields_of(section)
    for kind, interval in intervals_in(hint)
]
RANGED_IDS = [f"{name}.{field}" for name, field, _, _ in RANGED]


def test_there_are_sections_to_test():
    assert {"ModelConfig", "SFTConfig", "RewardConfig", "PPOConfig", "PipelineRun"} <= SECTIONS.keys()
    assert len(RANGED) > 60


@pytest.mark.parametrize(("section", "field", "kind", "interval"), RANGED, ids=RANGED_IDS)
def test_every_value_outside_its_range_is_refused_by_name(section, field, kind, interval):
    for value in outside(kind, interval):
        with pytest.raises(ValueError, match=f"^{field} must be ") as caught:
            SECTIONS[section](**{field: value})
        assert f"got {value}" in str(caught.value)


@pytest.mark.parametrize(("section", "field", "kind", "interval"), RANGED, ids=RANGED_IDS)
def test_the_ends_of_every_range_belong_to_it(section, field, kind, interval):
    for value in ends(kind, interval):
        try:
            assert getattr(SECTIONS[section](**{field: value}), field) == value
        except ValueError as error:  # another rule, about two fields together
            assert str(interval) not in str(error)  # noqa: PT017 (either is right)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_has_a_range(section):
    for field, hint in fields_of(SECTIONS[section]):
        numbers = plain_types(hint) & {int, float}
        assert len(intervals_in(hint)) == len(numbers), field


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_docstring(section):
    """Sections have one of their own; every other field is followed by one, which also is its help text."""
    assert SECTIONS[section].__doc__
    (node,) = ast.parse(inspect.getsource(SECTIONS[section])).body
    assert isinstance(node, ast.ClassDef)
    for statement, follower in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        if dataclasses.is_dataclass(get_type_hints(SECTIONS[section])[name]):
            continue
        is_text = isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant)
        assert is_text, name
        assert isinstance(follower.value.value, str), name
        assert follower.value.value.rstrip().endswith("."), name


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_frozen_keyword_only_and_equal_by_value(section):
    made = SECTIONS[section]()
    assert made == SECTIONS[section]()
    hash(made)
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, None)
    with pytest.raises(TypeError):
        SECTIONS[section](None)


@pytest.mark.parametrize(
    ("text", "inside", "beyond", "words"),
    [
        ("[1, inf)", [1, 10**30, 1e308], [0, math.inf, math.nan, -1], "at least 1"),
        ("(0, inf)", [1e-320, 1e308], [0, -0.0, math.inf, math.nan], "above 0"),
        ("(0, inf]", [1e-320, math.inf], [0, math.nan], "above 0"),
        ("[0, 1)", [0, 0.5, 1 - 1e-12], [1, -1e-12, math.nan], "in [0, 1)"),
        ("(0, 1]", [1e-12, 1], [0, 1 + 1e-12, math.nan], "in (0, 1]"),
        ("[-2, 3]", [-2, 0, 3], [-2.01, 3.01], "in [-2, 3]"),
        ("[0, 18446744073709551615]", [0, 2**64 - 1], [-1, 2**64, 2**64 + 1], "in [0, 18446744073709551615]"),
    ],
)
def test_interval_holds_its_numbers_exactly(text, inside, beyond, words):
    interval = Interval(text)
    assert [value for value in inside if value not in interval] == []
    assert [value for value in beyond if value in interval] == []
    assert str(interval) == words


def test_ppo_refuses_settings_that_contradict_each_other():
    for settings, message in (
        (
            {"batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 9},
            "minibatch_size must be at most .* = 8, got 9",
        ),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens must be at most max_new_tokens = 5, got 6"),
        ({"num_iterations": 6, "critic_warmup": 6}, "critic_warmup must be at most num_iterations - 1 = 5, got 6"),
        (
            {"kl_adaptive": True, "kl_horizon": 7, "batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 8},
            "kl_horizon must be at least an iteration's 8 completions, got 7",
        ),
        ({"kl_in_loss": True, "kl_estimator": "k1"}, "kl_estimator must be k2, k3 or exact with kl_in_loss"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOConfig(**settings)
    PPOConfig(batch_size=4, samples_per_prompt=2, minibatch_size=8)
    PPOConfig(max_new_tokens=5, min_new_tokens=5)
    PPOConfig(num_iterations=6, critic_warmup=5)
    PPOConfig(batch_size=8, minibatch_size=8, kl_adaptive=True, kl_horizon=8)
    PPOConfig(kl_in_loss=True, kl_estimator="k3")


def test_the_pipeline_has_every_setting_of_every_stage():
    pipeline = flat_fields(PipelineRun())
    for kind in (RunConfig, SFTRun, RewardRun, PPORun):
        for name, value in flat_fields(kind()).items():
            assert pipeline[name] == value


def test_flat_fields_are_dotted_names_of_leaves():
    leaves = flat_fields(PipelineRun(seed=3))
    assert leaves["seed"] == 3
    assert leaves["ppo.clip_eps"] == 0.2
    assert "ppo" not in leaves
    assert not any(dataclasses.is_dataclass(value) for value in leaves.values())


def test_reading_the_configuration_imports_nothing_heavy(tmp_path):
    program = "import sys, rlhf.config, rlhf.io.presets; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ
    )
    assert not {"torch", "ray", "transformers", "numpy", "tokenizers"} & set(done.stdout.split())


def test_the_help_of_the_two_kl_targets_tells_them_apart():
    """TRL and OpenAI's code have made both names familiar."""
    source = inspect.getsource(PPOConfig)
    for name, other in (("kl_target", "target_kl"), ("target_kl", "kl_target")):
        (text,) = re.findall(rf'{name}: Positive.*\n    """(.*)"""\n', source)
        assert other in text
        assert "nats per" in text
