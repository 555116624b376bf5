"""Where programs compute: what is refused about workers, the dtype, and what the user is told."""

import pytest
import torch

from rlhf.config import ComputeConfig, DistConfig
from rlhf.distributed import compute_context as compute
from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({"num_workers": 0, "threads_per_worker": 99}, True),
        ({"num_workers": 1, "num_servers": 1}, True),
        ({"num_workers": 2, "num_servers": 1}, False),
        ({"num_workers": 64, "oversubscribe": True}, True),
        ({"num_workers": 2, "threads_per_worker": 5}, False),
        ({"num_workers": 64}, False),
        ({"num_workers": 64, "address": "10.0.0.1:6379"}, True),
    ],
)
def test_more_threads_than_cores_are_refused_unless_the_user_insists(monkeypatch, settings, accepted):
    monkeypatch.setattr(compute, "available_cores", lambda: 2)
    monkeypatch.setattr(compute, "_CROWD", 1)
    if accepted:
        compute.check_workers(DistConfig(**settings))
    else:
        with pytest.raises(UserError, match=r"threads, but this machine has 2 cores; lower .*--dist.oversubscribe"):
            compute.check_workers(DistConfig(**settings))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_names_the_dtype(precision, dtype):
    context = compute.ComputeContext(ComputeConfig(precision=precision), torch.device("cpu"), [])
    assert context.dtype == compute.compute_dtype(precision) == dtype


@pytest.mark.parametrize(
    ("precision", "device", "capability", "is_warned"),
    [
        ("bf16", "cpu", "AVX2", True),
        ("bf16", "cpu", "AVX512", False),
        ("bf16", "cuda", "AVX2", False),
        ("fp32", "cpu", "AVX2", False),
    ],
)
def test_bf16_is_warned_of_where_the_cpu_has_no_instructions_for_it(
    monkeypatch, precision, device, capability, is_warned
):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    lines = compute.precision_warnings(ComputeConfig(precision=precision), torch.device(device))
    assert [("--precision fp32" in line) for line in lines] == [True] * is_warned


def test_a_context_keeps_what_it_tells_and_tells_lines_about_models_once(caplog):
    caplog.set_level("INFO", "rlhf")
    context = compute.ComputeContext(ComputeConfig(), torch.device("cpu"), [], stage="ppo")
    context.note("a")
    context.note_all(["b", "a", "b", "c"])
    assert context.notes == caplog.messages == ["a", "b", "c"]
    assert {record.stage for record in caplog.records} == {"ppo"}
