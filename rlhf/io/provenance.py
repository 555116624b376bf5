"""The provenance of a run: the software, machine and command that its bits depend on, beside settings and data."""

import functools
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rlhf

Provenance = dict[str, Any]
"""JSON values by name: rlhf, torch, ray, python, commit, processor, device, precision, threads, compile, command
and digests. A value that does not exist is None."""

PROMISE = "the same processor, torch and threads give the same bits"


def provenance_of(
    device: torch.device, *, precision: str, threads: int, compiled: bool | None, digests: dict[str, Any]
) -> Provenance:
    """Return the provenance of what this process computes now.

    Args:
        device: device of the computation. The field `device` has the name of a GPU; `processor` is always the CPU.
        precision: precision of the models, fp32 or bf16.
        threads: number of CPU threads of each computing process.
        compiled: True if the training step is compiled; None if nothing is trained.
        digests: digests of data and models by name.
    """
    return {
        "rlhf": rlhf.__version__,
        "torch": torch.__version__,
        "ray": _version("ray"),
        "python": platform.python_version(),
        "commit": code_commit(Path(rlhf.__file__).parent),
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "threads": threads,
        "compile": compiled,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "digests": digests,
    }


def describe_provenance(provenance: Provenance) -> str:
    """Return versions, processor and threads in one line, with the promise of equal bits."""
    threads = f"{provenance['threads']} thread{'s' * (provenance['threads'] != 1)}"
    where = provenance["processor"] if provenance["device"] == "cpu" else provenance["device"]
    return f"rlhf {provenance['rlhf']}, torch {provenance['torch']}, {threads} on {where}: {PROMISE}"


@functools.cache
def code_commit(package: Path) -> str | None:
    """Return the commit of the repository whose top folder contains a package, with -dirty if it has been changed.

    The result is None without such a repository, as for an installed package, or without git.
    """
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def processor_name() -> str:
    """Return the processor's model name and the instruction set that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(names), "") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
