"""Ends a cluster's processes and removes its folder once the process that started it is gone, however it went.

Run as a program with the folder as its argument: it waits until its standard input is closed.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def processes_of(folder: str, *, spared: tuple[int, ...] = ()) -> list[int]:
    """All processes but the spared that name the folder in their command or have a file in it open.

    Where there is no /proc it finds none, and Ray's own fate sharing has to do.
    """
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if int(entry.name) not in spared and _belongs(entry, folder)
    ]


def _belongs(entry: Path, folder: str) -> bool:
    try:
        if folder.encode() in (entry / "cmdline").read_bytes():
            return True
        return any(os.readlink(link).startswith(folder + "/") for link in (entry / "fd").iterdir())
    except OSError:  # it has ended, or is not ours
        return False


def kill(processes: list[int]) -> None:
    """End processes at once, also stopped ones."""
    for number in processes:
        with contextlib.suppress(OSError):  # it has ended
            os.kill(number, signal.SIGKILL)


def sweep(folder: str, starter: int) -> None:
    """Kill what belongs to a folder, but the process that started it and may live on; and remove the folder."""
    for _ in range(50):  # a process that is being started now has no file open yet
        left = processes_of(folder, spared=(os.getpid(), starter))
        kill(left)
        shutil.rmtree(folder, ignore_errors=True)
        if not left and not Path(folder).exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    sweep(sys.argv[1], parent)
