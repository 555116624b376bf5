import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, assert_pure
from torch._dynamo.testing import CompileCounter

from rlhf.schedules import constant_schedule, cosine_schedule, linear_schedule

FALLING = pytest.mark.parametrize(
    ("make", "oracle"), [(linear_schedule, oracles.linear), (cosine_schedule, oracles.cosine)]
)
SCHEDULES = {
    "constant": lambda: constant_schedule(3e-4),
    "constant_warmup": lambda: constant_schedule(3e-4, warmup_steps=3),
    "linear": lambda: linear_schedule(3e-4, 10, warmup_steps=3, final=1e-5),
    "cosine": lambda: cosine_schedule(3e-4, 10, warmup_steps=3, final=1e-5),
}
SCHEDULE_CASES = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)


@given(value=st.floats(1e-6, 1.0), warmup_steps=st.integers(0, 20))
def test_constant_value(value, warmup_steps):
    schedule = constant_schedule(value, warmup_steps=warmup_steps)
    for step in range(25):
        assert_close(schedule(torch.tensor(step)), oracles.warmed(value, step, warmup_steps))


@FALLING
@given(
    value=st.floats(1e-6, 1.0), final=st.floats(0.0, 1.0), warmup_steps=st.integers(0, 6), falling=st.integers(1, 12)
)
def test_falling_schedule_value(make, oracle, value, final, warmup_steps, falling):
    options = {"value": value, "total_steps": warmup_steps + falling, "warmup_steps": warmup_steps, "final": final}
    schedule = make(**options)
    for step in range(warmup_steps + falling + 3):
        assert_close(schedule(torch.tensor(step)), oracle(step, **options))


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        pytest.param(lambda: constant_schedule(8.0), [8, 8, 8, 8, 8, 8], id="constant"),
        pytest.param(lambda: constant_schedule(8.0, warmup_steps=3), [2, 4, 6, 8, 8, 8], id="constant_warmup"),
        pytest.param(lambda: linear_schedule(8.0, 4), [8, 6, 4, 2, 0, 0], id="linear"),
        pytest.param(
            lambda: linear_schedule(8.0, 5, warmup_steps=1, final=4.0), [4, 8, 7, 6, 5, 4], id="linear_warmup_final"
        ),
        pytest.param(lambda: cosine_schedule(8.0, 3), [8, 6, 2, 0, 0, 0], id="cosine"),
        pytest.param(
            lambda: cosine_schedule(8.0, 5, warmup_steps=1, final=4.0),
            [4, 8, 6 + math.sqrt(2), 6, 6 - math.sqrt(2), 4],
            id="cosine_warmup_final",
        ),
    ],
)
def test_schedule_known_values(make, rates):
    schedule = make()
    assert_close([schedule(torch.tensor(step)) for step in range(6)], rates)


@FALLING
def test_falling_schedules_do_no_update_at_rate_0(make, oracle):
    assert all(make(1.0, 10, warmup_steps=3)(torch.tensor(step)) > 0 for step in range(10))


@SCHEDULE_CASES
def test_schedules_give_float64_scalars(make):
    rate = make()(torch.tensor(2))
    assert (rate.dtype, rate.shape) == (torch.float64, ())


@SCHEDULE_CASES
def test_schedules_are_pure(make):
    assert_pure(make(), torch.tensor(2))


@SCHEDULE_CASES
def test_schedules_compile_once_for_all_steps(make):
    torch.compiler.reset()
    schedule, counter = make(), CompileCounter()
    compiled = torch.compile(schedule, backend=counter, fullgraph=True)
    for step in range(5):
        assert_close(compiled(torch.tensor(step)), schedule(torch.tensor(step)))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: constant_schedule(1.0, warmup_steps=-1),
            "constant_schedule: warmup_steps is -1, expected at least 0",
            id="constant",
        ),
        pytest.param(
            lambda: linear_schedule(1.0, 5, warmup_steps=5),
            r"linear_schedule: warmup_steps is 5, expected in \[0, 5\)",
            id="linear_above",
        ),
        pytest.param(
            lambda: linear_schedule(1.0, 5, warmup_steps=-1),
            r"linear_schedule: warmup_steps is -1, expected in \[0, 5\)",
            id="linear_below",
        ),
        pytest.param(
            lambda: cosine_schedule(1.0, 5, warmup_steps=5),
            r"cosine_schedule: warmup_steps is 5, expected in \[0, 5\)",
            id="cosine_above",
        ),
        pytest.param(
            lambda: cosine_schedule(1.0, 5, warmup_steps=-1),
            r"cosine_schedule: warmup_steps is -1, expected in \[0, 5\)",
            id="cosine_below",
        ),
    ],
)
def test_schedules_reject_impossible_warmups(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
