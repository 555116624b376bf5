"""A small program for the executors' tests, and a worker that dies when it is told to; Ray workers import it too."""

import json
import os
import signal
from pathlib import Path

import torch

from rlhf import random
from rlhf.data.collate import Prefetch
from rlhf.distributed import shared_memory
from rlhf.distributed.worker import Worker
from rlhf.execution.program import MetricLimit, ModelState, Program, StepSpec
from rlhf.optim import adamw
from rlhf.schedules import linear_schedule
from rlhf.tree import tree_map

KEY = random.key(3)
WIDTH = 200


def displaced(tensor):
    """The same numbers, 4 bytes past where a new tensor would begin, as parts of files and of other tensors lie."""
    longer = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    return longer[1:].view(tensor.shape)


def objective(params, frozen, batch):
    """Least squares of a small network: a batch is (inputs [B, 64], targets [B])."""
    inputs, targets = batch
    constant = (inputs @ frozen["offset"]["w"]).sum(1) + inputs @ frozen["head"]["v"]
    errors = torch.tanh(inputs @ params["w"]).sum(1) + params["b"] + constant - targets
    loss = errors.square().sum()
    return loss, {"loss/squares_sum": loss.detach(), "count": torch.tensor(len(targets))}


def predict(params, frozen, batch):
    return torch.tanh(batch[0] @ params["w"]).sum(1) + params["b"]


def follow(frozen, params):
    return tree_map(lambda old, new: 0.5 * old + 0.5 * new, frozen, {"w": params["w"]})


def make_program(max_norm=0.5):
    optimizer = adamw(linear_schedule(0.01, 50), weight_decay=0.1)
    return Program(
        {
            "main": StepSpec(objective, optimizer, max_norm),
            "limited": StepSpec(objective, optimizer, max_norm, MetricLimit("loss/squares", 0.0)),
        },
        {"predict": predict},
        {"offset": follow},
        prepare_frozen=lambda name, model: tree_map(lambda leaf: leaf.bfloat16().float(), model),
    )


def models():
    return ModelState(
        {"w": random.normal(random.fold_in(KEY, 0), (64, WIDTH)), "b": torch.zeros(1)},
        {
            "offset": {"w": displaced(torch.ones(64, WIDTH))},
            "head": {"v": displaced(random.normal(random.fold_in(KEY, 1), (64,)))},
        },
    )


def batch(size, seed):
    key = random.fold_in(KEY, seed)
    return displaced(random.normal(random.fold_in(key, 0), (size, 64))), random.normal(random.fold_in(key, 1), (size,))


def drive(executor, steps, micro_batches=7):
    """Everything an executor can do, in turn; (what it returned, its state)."""
    seen = []
    prefetched = Prefetch([batch(6, 100 * step + number) for number in range(micro_batches)] for step in range(steps))
    for step, batches in enumerate(prefetched):
        seen.append(executor.step("limited", batches))  # passed over
        rate = 0.02 if step % 2 else None  # the caller's, or the schedule's
        seen.append(executor.step("main", batches, rate, overlap=prefetched.prepare))
        seen.append(torch.cat(executor.map("predict", [batch(3, number) for number in range(5)])).tolist())
        if step % 3 == 1:
            executor.reset_optimizer()
    return seen, executor.snapshot()


class LargeWorker(Worker):
    """Shares memory as workers of a large model do."""

    def __init__(self, **settings):
        shared_memory._SMALL = 0
        super().__init__(**settings)


class FaultyWorker(Worker):
    """Sends itself a signal, once, at the moment that the file named by RLHF_TEST_FAULT describes."""

    def _at(self, moment):
        path = Path(os.environ["RLHF_TEST_FAULT"])
        try:
            fault = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if (moment, self._rank_info.rank, self._version) == (fault["moment"], fault["rank"], fault["version"]):
            path.unlink(missing_ok=True)
            os.kill(os.getpid(), getattr(signal, fault["signal"]))

    def map(self, *arguments):
        self._at("map")
        return super().map(*arguments)

    def sum_gradients(self, *arguments):
        self._at("sum_gradients")
        return super().sum_gradients(*arguments)

    def reduce(self, *arguments):
        self._at("reduce")
        return super().reduce(*arguments)

    def add_up(self, *arguments):  # the exchange has begun
        self._at("add_up")
        return super().add_up(*arguments)

    def decide(self, *arguments):
        self._at("decide")
        return super().decide(*arguments)

    def publish(self):  # the shard has applied the step
        self._at("publish")
        return super().publish()

    def snapshot(self, version):
        self._at("snapshot")
        return super().snapshot(version)


class ScatteredWorker(FaultyWorker):
    """Is on one of two machines, as its process id says, so that neighbours in the order of the start are apart."""

    def load(self, *arguments):
        super().load(*arguments)
        return os.getpid() % 2
