"""Our reduction and publication of a flat buffer, as the server does them, against gloo's bare allreduce."""

import functools
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import multiprocessing
from torch.distributed import PrefixStore

from benchmarks.timing import interleave, loopback_bytes, ratio, report, summary
from rlhf.distributed.collectives import RankInfo, connect_store, serve_store
from rlhf.distributed.messages import ShardState
from rlhf.distributed.worker import Worker
from rlhf.execution.program import Program, StepSpec
from rlhf.optim import Optimizer
from rlhf.tree import flat_layout, flatten

CASES = ((2, 1, 1), (2, 1, 64), (2, 1, 500), (4, 1, 1), (4, 1, 64), (4, 1, 500), (8, 2, 1), (8, 2, 64))
"""Ranks, simulated machines that they are on, MB."""
BACKENDS = ("shared", "gloo")
"""Through memory that the ranks of a machine share, and through gloo's connections alone, all to all."""


def run(output: Path, *, rounds: int = 9) -> list[Path]:
    """Print and write the figures."""
    rows = []
    for ranks, machines, size in CASES:
        store, turns = serve_store("127.0.0.1"), rounds * max(1, 128 // size // machines)  # short ones vary more
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "times.json"
            multiprocessing.spawn(_rank, (ranks, machines, store.port, size, turns, str(result)), nprocs=ranks)
            times, sent, seconds = json.loads(result.read_text())
        bare = summary(times["bare"])
        for backend in BACKENDS:
            ours = summary(times[backend])
            rows.append(
                {
                    "ranks": ranks,
                    "machines": machines,
                    "MB": size,
                    "backend": backend,
                    "ours ms": 1e3 * ours["median"],
                    "ours quartiles": f"{1e3 * ours['low']:.3g} to {1e3 * ours['high']:.3g}",
                    "bare ms": 1e3 * bare["median"],
                    "bare quartiles": f"{1e3 * bare['low']:.3g} to {1e3 * bare['high']:.3g}",
                    "ratio": ratio(times[backend], times["bare"]),
                    "CPU ms": 1e3 * seconds[backend],
                    "sent, in sizes": sent[backend],
                }
            )
    return [report("allreduce", rows, output)]


def _rank(rank: int, ranks: int, machines: int, port: int, megabytes: int, rounds: int, result: str) -> None:
    buffer = torch.ones(megabytes * 250_000)
    params = {"x": buffer.clone()}
    layout = flat_layout(params)
    gradient = flatten(params, layout)
    shares = [(number, number + 1) for number in range(ranks)]

    def open_worker(generation: int, backend: str) -> Worker:
        worker = Worker(device="cpu", threads=1, backend=backend, timeout_s=60)
        worker.load(_program, layout, {})
        places = range(ranks) if backend == "gloo" else [number * machines // ranks for number in range(ranks)]
        worker.join(RankInfo(generation, rank, ranks, 0, tuple(places)), "127.0.0.1", port)
        worker.restore(0, {}, ShardState(0, flatten(params, layout).numpy(), None))
        return worker

    def ours(worker: Worker) -> None:
        worker._sums = {(rank, rank + 1): gradient}
        worker.reduce(shares, "tree")
        worker.publish()

    def bare() -> None:
        torch_dist.all_reduce(buffer)

    workers = {backend: open_worker(number, backend) for number, backend in enumerate(BACKENDS)}
    store = PrefixStore("bare", connect_store("127.0.0.1", port, 60))
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    sides = {backend: functools.partial(ours, worker) for backend, worker in workers.items()} | {"bare": bare}
    times = interleave(sides, rounds, warmup=2, before=torch_dist.barrier)
    sent, seconds = {}, {}
    for backend, side in sides.items():
        torch_dist.barrier()
        before, begun = loopback_bytes(), time.process_time()
        for _ in range(rounds):
            side()
        spent = torch.tensor((time.process_time() - begun) / rounds)
        torch_dist.all_reduce(spent)
        sent[backend] = (loopback_bytes() - before) / rounds / buffer.nbytes
        seconds[backend] = float(spent)
    torch_dist.destroy_process_group()
    if rank == 0:
        Path(result).write_text(json.dumps([times, sent, seconds]))
    for worker in workers.values():
        worker.leave()


def _program() -> Program:
    optimizer = Optimizer(lambda params: (), lambda grads, state, params: (params, state))
    return Program({"main": StepSpec(lambda params, frozen, batch: (torch.zeros(()), {}), optimizer, 1.0)}, {}, {})
