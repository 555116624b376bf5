"""The parameter server alone, against torch's own optimiser and the in-process form."""

import doctest

import pytest
import torch

from rlhf import ParameterServer
from rlhf.config import DistConfig
from rlhf.distributed import connected, parameter_server
from rlhf.optim import adamw
from rlhf.schedules import constant_schedule
from rlhf.tree import tree_map


def loss(params, batch):
    inputs, targets = batch
    errors = torch.tanh(inputs @ params["hidden"][0]) @ params["hidden"][1] - targets
    return errors.square().sum(), {"loss/mse_sum": errors.detach().square().sum(), "count": len(targets)}


def data(size, seed):
    inputs = torch.sin(torch.arange(size * 4, dtype=torch.float32).reshape(size, 4) * (seed + 1))
    return inputs, inputs.sum(dim=1)


def params():
    return {"hidden": [torch.linspace(-1, 1, 32).reshape(4, 8), torch.zeros(8)]}


def batches(seed):
    return list(zip(*(tensor.split(7) for tensor in data(30, seed)), strict=True))


def test_it_is_torchs_adamw_on_the_mean_loss():
    leaves = [leaf.clone().requires_grad_() for leaf in params()["hidden"]]
    groups = [{"params": [leaf], "weight_decay": 0.1 if leaf.ndim == 2 else 0.0} for leaf in leaves]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    with ParameterServer(loss, params(), adamw(constant_schedule(0.02), weight_decay=0.1), DistConfig()) as server:
        for step in range(20):
            metrics = server.step(batches(step))
            optimizer.zero_grad()
            total, _ = loss({"hidden": leaves}, data(30, step))
            (total / 30).backward()
            optimizer.step()
            assert metrics["loss/mse"] == pytest.approx(total.item() / 30, rel=1e-4)
        assert server.version == 20
        for ours, theirs in zip(server.params()["hidden"], leaves, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def one_ray():
    with connected(DistConfig(num_workers=4)):
        yield


def test_the_example_of_its_docstring_runs(one_ray):
    assert doctest.testmod(parameter_server).failed == 0


def test_any_loss_and_tree_on_workers_of_its_own(one_ray):
    states = []
    for dist in (DistConfig(), DistConfig(num_workers=2, num_servers=1)):
        with ParameterServer(loss, params(), adamw(constant_schedule(0.02)), dist, max_grad_norm=0.1) as server:
            seen = [server.step(batches(step)) for step in range(4)]
            middle, kept = server.snapshot(), server.params()
            saved = tree_map(torch.clone, (middle, kept))
            seen += [server.step(batches(step)) for step in range(4, 8)]
            states.append((seen, server.snapshot()))
            unchanged = tree_map(torch.equal, (middle, kept), saved)  # copies: later steps do not show in them
            assert unchanged == tree_map(lambda leaf: True, saved)
            server.restore(middle, 4)
            assert server.version == 4
            assert [server.step(batches(step)) for step in range(4, 8)] == seen[4:]
            assert server.faults() == []
    assert states[0][0] == states[1][0]
    assert all(torch.equal(leaf, states[1][1][name]) for name, leaf in states[0][1].items())
