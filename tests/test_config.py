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
from annotated_types import Ge, Gt, Interval, Le, Lt

from rlhf import config as module
from rlhf.config import DataPaths, PipelineRun, PPOConfig, PPORun, RewardRun, RunConfig, SFTRun
from rlhf.ranges import (
    BatchSize,
    Bound,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFloatOrInf,
    PositiveInt,
    Section,
    Seed,
    ThreadCount,
    UnitInterval,
    bounds_of,
    flat_fields,
    range_error,
)
from rlhf.stages import STAGES

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


def ranges_in(hint: Any) -> list[tuple[type, list[Bound]]]:
    """(number type, bounds) of each alternative of an annotation that has a range."""
    if get_origin(hint) is Annotated:
        return [(get_args(hint)[0], bounds_of(hint))]
    return [found for part in get_args(hint) for found in ranges_in(part)]


def plain_types(hint: Any) -> set[type]:
    if get_origin(hint) is Annotated:
        return plain_types(get_args(hint)[0])
    parts = get_args(hint)
    return {found for part in parts for found in plain_types(part)} if parts else {hint}


def limits(bounds: list[Bound]) -> tuple[float, bool, float, bool]:
    """(lower limit, whether it belongs to the range, upper limit, whether it does)."""
    parts = [part for bound in bounds for part in (bound if isinstance(bound, Interval) else (bound,))]
    lows = [
        (part.gt, False) if isinstance(part, Gt) else (part.ge, True) for part in parts if isinstance(part, Gt | Ge)
    ]
    highs = [
        (part.lt, False) if isinstance(part, Lt) else (part.le, True) for part in parts if isinstance(part, Lt | Le)
    ]
    return *lows[0], *(highs or [(math.inf, True)])[0]


def outside(kind: type, bounds: list[Bound]) -> list[float]:
    """Numbers just beyond each end of a range."""
    low, with_low, high, with_high = limits(bounds)
    step = 1 if kind is int else 1e-6
    values: list[float] = [kind(low) - step if with_low else kind(low), kind(low) - 10**6]
    if high != math.inf:
        values += [
            kind(high) + (step if kind is int else 1e-6 * high) if with_high else kind(high),
            kind(high) + 10**20,
        ]
    if kind is float:
        values += [math.nan, -math.inf, 1e300, *([] if (high, with_high) == (math.inf, True) else [math.inf])]
        values += [1e-50] if low == 0 else []
    return values


def ends(kind: type, bounds: list[Bound]) -> list[float]:
    """The ends of a range that belong to it, and numbers just inside."""
    low, with_low, high, with_high = limits(bounds)
    step = 1 if kind is int else 1e-6
    if high == math.inf:
        return [kind(low) if with_low else kind(low) + step, 3e38, *([math.inf] if with_high else [])]
    return [kind(low) if with_low else kind(low) + step, kind(high) if with_high else kind(high) - step]


RANGED = [
    (name, field, kind, bounds)
    for name, section in SECTIONS.items()
    for field, hint in fields_of(section)
    for kind, bounds in ranges_in(hint)
]
RANGED_IDS = [f"{name}.{field}" for name, field, _, _ in RANGED]


def test_there_are_sections_to_test():
    assert {"ModelConfig", "SFTConfig", "RewardConfig", "PPOConfig", "PipelineRun"} <= SECTIONS.keys()
    assert len(RANGED) > 60


@pytest.mark.parametrize(("section", "field", "kind", "bounds"), RANGED, ids=RANGED_IDS)
def test_every_value_outside_its_range_is_refused_by_name(section, field, kind, bounds):
    for value in outside(kind, bounds):
        with pytest.raises(ValueError, match=f"^{field} must be ") as caught:
            SECTIONS[section](**{field: value})
        assert f"got {value}" in str(caught.value)


@pytest.mark.parametrize(("section", "field", "kind", "bounds"), RANGED, ids=RANGED_IDS)
def test_the_ends_of_every_range_belong_to_it(section, field, kind, bounds):
    for value in ends(kind, bounds):
        try:
            assert getattr(SECTIONS[section](**{field: value}), field) == value
        except ValueError as error:  # another rule, about two fields together
            assert not range_error(bounds, value), error  # noqa: PT017 (either is right)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_has_a_range(section):
    for field, hint in fields_of(SECTIONS[section]):
        numbers = plain_types(hint) & {int, float}
        assert len(ranges_in(hint)) == len(numbers), field


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
    ("hint", "inside", "beyond"),
    [
        (PositiveInt, [1, 2**31 - 1], {0: "at least 1", -1: "at least 1", 2**31: "at most 2147483647"}),
        (BatchSize, [1, 2**20], {0: "at least 1", 10**8: "at most 1048576", 2**62: "at most 1048576"}),
        (ThreadCount | None, [1, 1024], {0: "at least 1", 100_000: "at most 1024", 2**40: "at most 1024"}),
        (Seed, [0, 2**64 - 1], {-1: "in [0, 18446744073709551615]", 2**64: "in [0, 18446744073709551615]"}),
        (UnitInterval, [0.0, 1.0], {-1e-12: "in [0, 1]", 1.1: "in [0, 1]", math.nan: "in [0, 1]"}),
        (HalfOpenUnitInterval, [0.0, 0.999999], {1.0: "in [0, 1)", 1 - 1e-12: "in [0, 1) in float32"}),
        (
            PositiveFloat,
            [1.2e-38, 3.4e38],
            {0.0: "above 0", math.inf: "finite and above 0", 1e-50: "between 1.2e-38 and"},
        ),
        (NonNegativeFloat, [0.0, -0.0, 3.4e38], {-1.0: "at least 0", 1e300: "0 or between", 1e-50: "0 or between"}),
        (PositiveFloatOrInf, [1.2e-38, math.inf], {0.0: "above 0", 1e300: "between", math.nan: "above 0"}),
    ],
)
def test_a_range_holds_its_numbers_and_says_what_is_broken(hint, inside, beyond):
    bounds = bounds_of(hint)
    assert [value for value in inside if range_error(bounds, value)] == []
    for value, words in beyond.items():
        assert range_error(bounds, value).startswith(words), value


def test_ppo_refuses_settings_that_contradict_each_other():
    for settings, message in (
        (
            {"batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 9},
            "minibatch_size must be at most .* = 8, got 9; lower --ppo.minibatch-size or raise --ppo.batch-size",
        ),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens must be at most max_new_tokens = 5, got 6"),
        ({"num_iterations": 6, "critic_warmup": 6}, "critic_warmup must be at most num_iterations - 1 = 5, got 6"),
        (
            {"kl_adaptive": True, "kl_horizon": 7, "batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 8},
            "kl_horizon must be at least an iteration's 8 completions, got 7; raise --ppo.kl-horizon",
        ),
        ({"kl_in_loss": True, "kl_estimator": "k1"}, "kl_estimator must be k2, k3 or exact with kl_in_loss"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOConfig(**settings)
    PPOConfig(batch_size=4, samples_per_prompt=2, minibatch_size=8)
    assert [PPOConfig(batch_size=size, samples_per_prompt=2).update_size for size in (4, 8, 9)] == [8, 16, 16]
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
        (text,) = re.findall(rf'{name}: PositiveFloat.*\n    """(.*)"""\n', source)
        assert other in text
        assert "nats per" in text


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_data_setting_takes_files_and_folders(stage):
    hints = get_type_hints(stage.config)
    names = [name for name, content in stage.files.items() if content in ("data", "validation")]
    assert names
    assert all(hints[name] == DataPaths for name in names)
