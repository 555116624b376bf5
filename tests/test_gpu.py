"""CUDA tensors through the Ray layer; skipped, with the reason, where there is no NVIDIA GPU."""

import os

import pytest
import torch
import toy

from rlhf.config import DistConfig
from rlhf.distributed import connected, open_executor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here: NCCL and CUDA not run"),
]


@pytest.mark.parametrize(
    ("workers", "servers", "gpus", "backend"),
    [(1, 0, 1.0, "nccl"), (2, 0, 0.25, "gloo"), (2, 1, 0.25, "gloo")],
    ids=["one rank through NCCL", "two ranks on a GPU through gloo", "with a server of its own"],
)
@pytest.mark.parametrize("mode", ["tree", "ring"])
def test_workers_on_a_gpu_agree_with_the_cpu(monkeypatch, workers, servers, gpus, backend, mode):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(toy.__file__))
    dist = DistConfig(
        num_workers=workers, num_servers=servers, gpus_per_worker=gpus, backend=backend, reduce=mode, snapshot_every=2
    )
    states = []
    for settings in (DistConfig(), dist):
        with (
            connected(settings),
            open_executor(toy.make_program, toy.models(), settings, device=torch.device("cpu"), tell=print) as executor,
        ):
            states.append(toy.drive(executor, 5)[1])
    for name, leaf in states[0].items():
        torch.testing.assert_close(states[1][name], leaf, rtol=1e-3, atol=1e-4)
