"""Machines of a cluster, simulated by namespaces of Linux: each has its own network, processes, /tmp and host name."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_numbers = itertools.count(1)
_PORT = 6379

START = """
set -e
mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /dev/shm; mkdir /tmp/home
printf '127.0.0.1 localhost\\n127.0.1.1 node\\n' > /tmp/hosts; mount --bind /tmp/hosts /etc/hosts
hostname node
echo ready; read go
ip link set lo up; ip link set "$1" name eth0; ip addr add "$2/24" dev eth0; ip link set eth0 up
ip route add default dev eth0
echo ready; read end
"""
"""All machines have one host name, which stands for an address of the machine itself, as Debian has it."""


def can_simulate() -> bool:
    """True if this process may make namespaces and a network between them."""
    if not (sys.platform == "linux" and os.getuid() == 0 and shutil.which("ip") and shutil.which("nsenter")):
        return False
    trial = [
        "unshare",
        "--net",
        "--mount",
        "--uts",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "bridge0",
        "type",
        "bridge",
    ]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


class Machine:
    """A machine with an address in the network of a `Cluster`."""

    def __init__(self, bridge: str, name: str, address: str, hidden: Sequence[Path]) -> None:
        self.address = address
        command = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*command, "sh", "-c", START, "sh", f"{name}p", address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._expect_ready()
        self._init = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0]
        _ip("link", "add", name, "type", "veth", "peer", "name", f"{name}p", "netns", self._init)
        _ip("link", "set", name, "master", bridge, "up")
        assert self._holder.stdin is not None
        self._holder.stdin.write("go\n")
        self._holder.stdin.flush()
        self._expect_ready()
        for folder in hidden:
            self.run("mount", "-t", "tmpfs", "tmpfs", folder)

    def command(self, *words: Any, **environment: str) -> list[str]:
        """The command that runs `words` on this machine."""
        settings = {"HOME": "/tmp/home", "RAY_AUTH_MODE": "disabled"} | environment
        inside = ["nsenter", "-t", self._init, "--net", "--mount", "--uts", "--pid", "env"]
        return [*inside, *(f"{name}={value}" for name, value in settings.items()), *map(str, words)]

    def run(self, *words: Any, check: bool = True, timeout: float = 300, **environment: str) -> Any:
        """Run a command to its end, and return its code and output."""
        return subprocess.run(
            self.command(*words, **environment), capture_output=True, text=True, check=check, timeout=timeout
        )

    def start_ray(self, *words: str, cores: int = 1, **environment: str) -> None:
        """Start the processes of Ray."""
        self.run(
            sys.executable, "-m", "ray.scripts.scripts", "start", *words, f"--num-cpus={cores}",
            "--object-store-memory=100000000", "--disable-usage-stats", RAY_worker_niceness="0", **environment,
        )  # fmt: skip

    def kill(self) -> None:
        """End the machine at once, with all its processes and its network."""
        self._holder.kill()
        self._holder.communicate()

    def _expect_ready(self) -> None:
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"


@contextlib.contextmanager
def network() -> Iterator[Any]:
    """A function that makes machines, which end with the block."""
    bridge, machines = f"rl{os.getpid() % 100000}b", list[Machine]()
    _ip("link", "add", bridge, "type", "bridge")
    _ip("link", "set", bridge, "up")

    def make(*, hidden: Sequence[Path] = ()) -> Machine:
        number = next(_numbers)
        machines.append(Machine(bridge, f"rl{os.getpid() % 100000}v{number}", f"10.77.0.{number}", hidden))
        return machines[-1]

    try:
        yield make
    finally:
        for machine in reversed(machines):
            machine.kill()
        _ip("link", "delete", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
