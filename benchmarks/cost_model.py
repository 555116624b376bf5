"""What a step of GPT-2 124M would take on many GPUs: arithmetic on assumed hardware.

    step = computation + traffic + calls + snapshots

Nothing of it was measured on such hardware. What the driver takes to call a process was measured, on a CPU.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import report

TOKENS, MICRO_BATCH, TOKENS_PER_S = 2**19, 4096, 300e3
"""Tokens of a batch and of a micro-batch, and of a GPU in a second."""
PARAMETERS = 0.5e9
"""Bytes of the parameters."""
MACHINE, WITHIN, BETWEEN = 8, 300e9, 50e9
"""GPUs of a machine; bytes per second and GPU within and between machines, each way."""
COPIED, SNAPSHOT_EVERY = 10e9, 10
"""Bytes per second that the driver copies, and steps from one snapshot to the next."""
GPUS = (1, 8, 64, 512)


class Design(NamedTuple):
    """How the processes of a step are called, and what they send."""

    call_s: float = 0.7e-3
    """The driver's time for each process that it calls."""
    tree: bool = False
    """Past one machine, the driver calls the square root of all processes, and each of them calls as many."""
    by_machine: bool = True
    """Sums and parameters cross to another machine once per machine, not once per process."""
    neighbours: bool = False
    """Snapshots, of three times the parameters, go from each process to another one's memory, not to the driver's."""
    overlap: bool = False
    """Gradients are sent during the backward pass of the last micro-batch, two thirds of its time."""


DESIGNS = {
    "each process called by itself, sums from all to all": Design(call_s=1.75e-3, by_machine=False),
    "all processes called at once": Design(by_machine=False),
    "sums added within a machine first: what there is": Design(),
    "calls down a tree": Design(tree=True),
    "snapshots to a neighbour": Design(tree=True, neighbours=True),
    "gradients sent during the backward pass": Design(tree=True, neighbours=True, overlap=True),
}
"""From what there was to what there could be. Each has what the one before it has."""


def step_cost(gpus: int, design: Design) -> dict[str, float]:
    """Milliseconds of a step, in parts and in all, and the share of the computation in it."""
    near = min(gpus, MACHINE)  # on one machine
    computation = TOKENS / TOKENS_PER_S / gpus
    far_bytes = PARAMETERS * (gpus - near) / gpus / (near if design.by_machine else 1)
    one_way = PARAMETERS * (near - 1) / (near if design.by_machine else gpus) / WITHIN + far_bytes / BETWEEN
    backward = 2 / 3 * min(MICRO_BATCH / TOKENS_PER_S, computation) if design.overlap else 0.0
    relays = math.sqrt(gpus)
    calls = 2 * relays if design.tree and gpus > MACHINE else gpus
    copied = 3 * PARAMETERS / (BETWEEN * gpus if design.neighbours and gpus > 1 else COPIED)
    parts = {
        "computation": computation,
        "traffic": max(0.0, one_way - backward) + one_way,
        "calls": design.call_s * calls,
        "snapshots": copied / SNAPSHOT_EVERY,
    }
    step = sum(parts.values())
    return {name: 1e3 * seconds for name, seconds in (*parts.items(), ("ms", step))} | {"of ideal": computation / step}


def table() -> str:
    """The table of README.md."""
    lines = ["| " + " | ".join(["", *(f"{gpus} GPUs" for gpus in GPUS[1:])]) + " |", "|---" * len(GPUS) + "|"]
    for name, design in DESIGNS.items():
        costs = [step_cost(gpus, design) for gpus in GPUS[1:]]
        cells = (f"{cost['ms']:.0f} ms, {100 * cost['of ideal']:.2g}%" for cost in costs)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def run(output: Path) -> list[Path]:
    """Print and write the figures."""
    rows: list[dict[str, Any]] = [
        {"what": name, "GPUs": gpus} | step_cost(gpus, design) for name, design in DESIGNS.items() for gpus in GPUS
    ]
    print(table())
    return [report("cost-model", rows, output)]
