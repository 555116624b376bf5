"""Memory of this process: what the allocator keeps, and the most that was ever held."""

import ctypes
import sys
from pathlib import Path

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # parameters of mallopt, as in malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next buffer instead of giving it back to the system.

    The large buffers of a step would else be faulted in anew, page by page, at every step: a quarter of its time. It
    changes the whole process, so whoever starts the process calls it: programs and workers. Other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**26)


def peak_bytes(device: torch.device) -> int:
    """The most memory held since the start or `reset_peak`: a GPU's, or the process's; 0 if it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


def reset_peak(device: torch.device) -> None:
    """Begin to measure anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # a container may forbid it: the peak is then that of all stages so far
