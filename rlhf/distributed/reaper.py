"""A program that ends the processes of a cluster and removes its folder after the starting process has ended.

Its argument is the folder. It waits until its standard input is closed, also if the starting process is killed.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def processes_of(folder: str, *, spared: tuple[int, ...] = ()) -> list[int]:
    """Return the processes, except `spared`, that name the folder in their command or have a file of it open.

    Without /proc the list is empty, and only Ray ends its processes.
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
    except OSError:  # it has ended, or belongs to another user
        return False


def kill(processes: list[int]) -> None:
    """Kill processes, including stopped ones."""
    for number in processes:
        with contextlib.suppress(OSError):  # it has ended
            os.kill(number, signal.SIGKILL)


def kill_process_group(folder: str, starter: int) -> None:
    """Kill the processes of a folder except the one that started the cluster, and remove the folder."""
    for _ in range(50):  # a process that is just starting has no file open yet
        processes = processes_of(folder, spared=(os.getpid(), starter))
        kill(processes)
        shutil.rmtree(folder, ignore_errors=True)
        if not processes and not Path(folder).exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    kill_process_group(sys.argv[1], parent)
