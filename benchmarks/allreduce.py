"""Our reduction and publication of a flat buffer, as the server does them, against gloo's bare allreduce."""

import functools
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import multiprocessing
from torch.distributed import PrefixStore

from benchmarks.timing import interleave, ratio, report, summary
from rlhf.distributed.collectives import RankInfo, connect_store, serve_store
from rlhf.distributed.messages import ShardState
from rlhf.distributed.worker import Worker
from rlhf.execution.program import Program, StepSpec
from rlhf.optim import Optimizer
from rlhf.tree import flat_layout, flatten

MEGABYTES = (1, 64, 500)
BACKENDS = ("shared", "gloo")
"""Through memory that the ranks share, and through gloo's connections as between machines."""


def run(output: Path, *, rounds: int = 9) -> list[Path]:
    """Print and write the figures."""
    rows = []
    for ranks in (2, 4):
        for size in MEGABYTES:
            store, turns = serve_store("127.0.0.1"), rounds * max(1, 128 // size)  # short ones vary more
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "times.json"
                multiprocessing.spawn(_rank, (ranks, store.port, size, turns, str(result)), nprocs=ranks)
                times = json.loads(result.read_text())
            bare = summary(times["bare"])
            for backend in BACKENDS:
                ours = summary(times[backend])
                rows.append(
                    {
                        "ranks": ranks,
                        "MB": size,
                        "backend": backend,
                        "ours ms": 1e3 * ours["median"],
                        "ours quartiles": f"{1e3 * ours['low']:.3g} to {1e3 * ours['high']:.3g}",
                        "bare ms": 1e3 * bare["median"],
                        "bare quartiles": f"{1e3 * bare['low']:.3g} to {1e3 * bare['high']:.3g}",
                        "ratio": ratio(times[backend], times["bare"]),
                    }
                )
    return [report("allreduce", rows, output)]


def _rank(rank: int, ranks: int, port: int, megabytes: int, rounds: int, result: str) -> None:
    buffer = torch.ones(megabytes * 250_000)
    params = {"x": buffer.clone()}
    layout = flat_layout(params)
    gradient = flatten(params, layout)
    shares = [(number, number + 1) for number in range(ranks)]

    def open_worker(generation: int, backend: str) -> Worker:
        worker = Worker(device="cpu", threads=1, backend=backend, timeout_s=60)
        worker.load(_program, layout, {})
        worker.join(RankInfo(generation, rank, ranks, 0), "127.0.0.1", port)
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
    torch_dist.destroy_process_group()
    if rank == 0:
        Path(result).write_text(json.dumps(times))
    for worker in workers.values():
        worker.leave()


def _program() -> Program:
    optimizer = Optimizer(lambda params: (), lambda grads, state, params: (params, state))
    return Program({"main": StepSpec(lambda params, frozen, batch: (torch.zeros(()), {}), optimizer, 1.0)}, {}, {})
