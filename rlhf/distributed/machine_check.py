"""Requirements of a program on the machine of a worker, and the name of the processor that computes there."""

import torch

from rlhf.errors import UserError
from rlhf.execution.compiled import has_compiler
from rlhf.execution.program import Program
from rlhf.io.files import check_writable
from rlhf.io.provenance import processor_name


def check_machine(device: str, program: Program) -> None:
    """Raise UserError if a program cannot run on this machine: there is no GPU, no compiler, or no place for its code.

    Args:
        device: type of the device, cpu or cuda.
        program: program that a worker will run.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no NVIDIA GPU there; use --dist.gpus-per-worker 0, or a build of torch with CUDA")
    if program.compile_to is None:
        return
    if device == "cpu" and not has_compiler():
        raise UserError("no C++ compiler is on the PATH there: install g++, or use --compile off")
    check_writable(program.compile_to, "--cache-dir")


def describe_processor(device: str) -> str:
    """Return the name of the processor or GPU on which a worker computes, with the build of torch."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return f"{name}, torch {torch.__version__}"
