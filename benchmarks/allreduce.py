"""Our reduction and publication of a flat buffer, as the server does them, against the backend's bare allreduce."""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import multiprocessing
from torch.distributed import PrefixStore

from benchmarks.timing import interleave, ratio, report, summary
from rlhf.distributed.collectives import Place, serve_store
from rlhf.distributed.messages import ShardState
from rlhf.distributed.worker import Worker
from rlhf.execution.executor import Program, StepSpec
from rlhf.optim import Optimizer
from rlhf.tree import flat_layout, flatten

MEGABYTES = (1, 64, 500)


def run(output: Path, *, rounds: int = 9) -> None:
    """Print and write the figures."""
    rows = []
    for ranks in (2, 4):
        for size in MEGABYTES:
            store, turns = serve_store("127.0.0.1"), rounds * max(1, 128 // size)  # short ones vary more
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "times.json"
                multiprocessing.spawn(_rank, (ranks, store.port, size, turns, str(result)), nprocs=ranks)
                times = json.loads(result.read_text())
            ours, bare = summary(times["ours"]), summary(times["bare"])
            rows.append(
                {
                    "ranks": ranks,
                    "MB": size,
                    "ours ms": 1e3 * ours["median"],
                    "ours quartiles": f"{1e3 * ours['low']:.3g} to {1e3 * ours['high']:.3g}",
                    "bare ms": 1e3 * bare["median"],
                    "bare quartiles": f"{1e3 * bare['low']:.3g} to {1e3 * bare['high']:.3g}",
                    "ratio": ratio(times["ours"], times["bare"]),
                }
            )
    report("allreduce", rows, output)


def _rank(rank: int, ranks: int, port: int, megabytes: int, rounds: int, result: str) -> None:
    worker = Worker(device="cpu", threads=1, backend="gloo", timeout_s=60)
    params = {"x": torch.ones(megabytes * 250_000)}
    layout = flat_layout(params)
    worker.load(_program, layout, {})
    worker.join(Place(0, rank, ranks, 0), "127.0.0.1", port)
    worker.restore(0, {}, ShardState(0, flatten(params, layout).numpy(), None))
    gradient, buffer = worker._flat.clone(), worker._flat.clone()
    shares = [(number, number + 1) for number in range(ranks)]

    def ours() -> None:
        worker._sums = {(rank, rank + 1): gradient}
        worker.reduce(shares, "tree")
        worker.publish()

    def bare() -> None:
        torch_dist.all_reduce(buffer)

    torch_dist.init_process_group("gloo", store=PrefixStore("bare", worker._store), rank=rank, world_size=ranks)
    times = interleave({"ours": ours, "bare": bare}, rounds, warmup=2, before=torch_dist.barrier)
    torch_dist.destroy_process_group()
    if rank == 0:
        Path(result).write_text(json.dumps(times))
    worker.leave()


def _program() -> Program:
    optimizer = Optimizer(lambda params: (), lambda grads, state, params: (params, state))
    return Program({"main": StepSpec(lambda params, frozen, batch: (torch.zeros(()), {}), optimizer, 1.0)}, {}, {})
