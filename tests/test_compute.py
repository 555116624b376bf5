"""What is refused about workers before anything starts."""

import pytest

from rlhf.config import DistConfig
from rlhf.distributed import compute_context as compute
from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({"num_workers": 0, "threads_per_worker": 99}, True),
        ({"num_workers": 6, "num_servers": 2}, True),
        ({"num_workers": 6, "num_servers": 3}, False),
        ({"num_workers": 2, "threads_per_worker": 5}, False),
        ({"num_workers": 64}, False),
        ({"num_workers": 64, "address": "10.0.0.1:6379"}, True),
    ],
)
def test_more_than_four_threads_for_a_core_are_refused(monkeypatch, settings, accepted):
    monkeypatch.setattr(compute, "available_cores", lambda: 2)
    if accepted:
        compute.check_workers(DistConfig(**settings))
    else:
        with pytest.raises(UserError, match=r"threads, but this machine has 2 cores, for at most 8 threads; lower"):
            compute.check_workers(DistConfig(**settings))
