"""Memory of this process: the policy of the allocator, and the peak."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # parameters of mallopt, as in malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next buffer instead of returning it to the system.

    Otherwise the large buffers of a step cause page faults at every step, which take a quarter of its time. This
    setting affects the whole process, so only programs and workers call it. It has no effect on other C libraries.

    Example:
        >>> keep_freed_memory()
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**26)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes since the start or the last `reset_peak`, or 0 if it is unknown.

    Args:
        device: the GPU whose memory is measured, or the CPU for the memory of this process.

    Example:
        >>> peak_bytes(torch.device("cpu")) >= 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


def reset_peak(device: torch.device) -> None:
    """Return freed memory to the system and reset the peak, if the system supports it.

    Without the former, a stage would occupy what the stage before it has freed.

    Args:
        device: a GPU, or the CPU for this process.

    Example:
        >>> reset_peak(torch.device("cpu"))
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)
    if Path("/proc/self/clear_refs").exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # some containers forbid it: the peak then includes earlier stages


def _glibc(name: str) -> Callable[..., int] | None:
    """Return a function of the GNU C library, or None with other libraries."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
