"""Machines of a cluster, simulated by namespaces of Linux: each has its own network, processes, /tmp and /mnt."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RAY = (sys.executable, "-m", "ray.scripts.scripts")
"""The program `ray`."""

_numbers = itertools.count(1)
"""Numbers of network devices, whose names are freed only some time after a machine has ended."""

START = """
set -e
if [ -n "$3" ]; then mount --bind "$3" /mnt; else mount -t tmpfs tmpfs /mnt; fi
mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /dev/shm; mkdir /tmp/home
printf '127.0.0.1 localhost\\n127.0.1.1 node\\n' > /tmp/hosts; mount --bind /tmp/hosts /etc/hosts
hostname node
echo ready; read begin
ip link set lo up; ip link set "$1" name eth0; ip addr add "$2/24" dev eth0; ip link set eth0 up
ip route add default dev eth0
echo ready; read end
"""
"""All machines have one host name, which stands for an address of the machine itself, as on Debian."""

_SPACES = ("--net", "--mount", "--uts", "--pid")


def can_simulate() -> bool:
    """True if this process may make namespaces and networks."""
    if sys.platform != "linux" or os.getuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        return False
    trial = ["unshare", *_SPACES, "--fork", "ip", "link", "add", "bridge0", "type", "bridge"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


class Machine:
    """A machine of a `network`, which ends with the process that has made it."""

    def __init__(self, bridge: str, link: str, address: str, files: Path | None) -> None:
        self.address = address
        command = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", START, "sh"]
        self._holder = subprocess.Popen(
            [*command, f"{link}p", address, files or ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect_ready()
        self.init = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0]
        _ip("link", "add", link, "type", "veth", "peer", "name", f"{link}p", "netns", self.init)
        _ip("link", "set", link, "master", bridge, "up")
        assert self._holder.stdin is not None
        self._holder.stdin.write("begin\n")
        self._holder.stdin.flush()
        self._expect_ready()

    def command(self, *words: Any, **environment: str) -> list[str]:
        """The command that runs `words` in /mnt of this machine."""
        settings = {"HOME": "/tmp/home", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"} | environment
        inside = ["nsenter", "-t", self.init, *_SPACES, "env", "-C", "/mnt"]
        return [*inside, *(f"{name}={value}" for name, value in settings.items()), *map(str, words)]

    def run(self, *words: Any, check: bool = True, timeout: float = 600, **environment: str) -> Any:
        """Run a command to its end, and return its code and output."""
        command = self.command(*words, **environment)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        assert not (check and done.returncode), done.stderr
        return done

    def start_ray(self, *words: str, cores: int = 1, **environment: str) -> None:
        """Start the processes of Ray as a user does, again if they take longer than the half minute that Ray allows."""
        command = [
            *RAY, "start", *words, f"--node-ip-address={self.address}", f"--num-cpus={cores}", "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]  # fmt: skip
        for attempt in range(5):
            if self.run(*command, check=attempt == 4, RAY_worker_niceness="0", **environment).returncode == 0:
                return
            self.stop_ray()

    def stop_ray(self) -> None:
        """End the processes of Ray."""
        self.run(*RAY, "stop", "--force")

    def processes(self, words: str) -> list[int]:
        """Ids, on this machine, of the processes whose command has these words."""
        return [int(line) for line in self.run("pgrep", "-f", words, check=False).stdout.split()]

    def kill(self) -> None:
        """End the machine at once, with all its processes and its network."""
        self._holder.kill()
        self._holder.communicate()

    def _expect_ready(self) -> None:
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"


@contextlib.contextmanager
def network() -> Iterator[Callable[..., Machine]]:
    """A function (files=None) that makes machines. Their folder /mnt is `files`, or a new one."""
    machines = list[Machine]()
    bridge = f"rlhf{os.getpid() % 100000}b{next(_numbers)}"
    _ip("link", "add", bridge, "type", "bridge")
    _ip("link", "set", bridge, "up")

    def make(files: Path | None = None) -> Machine:
        link, address = f"rlhf{os.getpid() % 100000}v{next(_numbers)}", f"10.77.0.{len(machines) + 1}"
        machines.append(Machine(bridge, link, address, files))
        return machines[-1]

    try:
        yield make
    finally:
        for machine in reversed(machines):
            machine.kill()
        _ip("link", "delete", bridge)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
