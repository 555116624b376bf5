"""What runs in the process of one side of a comparison: it makes one round of its work whenever it is asked.

    python -m benchmarks.session MODULE:FUNCTION SETTINGS      settings are JSON; the function gets a `Session` first

Peers run it in their own environment, so it imports the standard library and torch alone. Requests come as lines on the
standard input; answers leave as JSON lines on what was the standard output, which libraries may print to.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class Session:
    """The conversation with the program that measures."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        """Talk over two streams."""
        self._requests, self._answers = requests, answers
        self.device = "cpu"
        self.over = False
        """Whether no more rounds will be asked for."""

    def ready(self, **facts: Any) -> None:
        """Say that everything is set up: the conditions of measurement, and facts that must be alike on both sides."""
        self._send(conditions(self.device) | facts)

    def wait(self) -> bool:
        """Block until a round is asked for; False where there will be none."""
        self.over = self._requests.readline().strip() != "round"
        return not self.over

    def answer(self, **facts: Any) -> None:
        """Say that the round is done, and what was done in it (`tokens`: useful ones, prompts included)."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self._send({"peak_bytes": peak_bytes(self.device)} | facts)

    def rounds(self) -> Iterator[None]:
        """One item for every round; `answer` is called in the loop's body."""
        while self.wait():
            yield

    def _send(self, facts: dict[str, Any]) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()


def conditions(device: str) -> dict[str, Any]:
    """Threads, and what a float32 matrix product really is here, by deed: 1e-7 is IEEE, 1e-3 is bf16 in disguise."""
    import torch

    left = torch.rand(256, 256, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    exact = left.double() @ left.double()
    error = float(((left @ left).double() - exact).abs().max() / exact.abs().max())
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "fp32_error": error}


def peak_bytes(device: str) -> int:
    """The most memory this process ever held; on a GPU, the device's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory between fork and exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(target: str, settings: dict[str, Any]) -> None:
    """Run one side until no more rounds are asked for.

    Args:
        target: MODULE:FUNCTION.
        settings: keyword arguments of the function, and for every side `threads`, `device` and `matmul` (what torch
            may make of float32 matrix products: highest is IEEE).
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed goes to the log
    import torch

    torch.set_num_threads(settings.pop("threads"))
    torch.set_float32_matmul_precision(settings.pop("matmul", "highest"))
    session = Session(sys.stdin, answers)
    session.device = settings["device"]
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(session, **settings)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
