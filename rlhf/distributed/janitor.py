"""Ends a cluster's processes and removes its folder once the process that started it is gone, however it went.

Run as a program with the folder as its argument: it waits until its standard input is closed. Every process of the
cluster carries the folder in its environment, under the name MARK.
"""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

MARK = "RLHF_CLUSTER"


def sweep(folder: str) -> None:
    """Kill all processes marked with `folder` but this one, and remove it."""
    mark = f"{MARK}={folder}".encode()
    for entry in Path("/proc").glob("[0-9]*"):  # where there is no /proc, Ray's own fate sharing has to do
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    sweep(sys.argv[1])
