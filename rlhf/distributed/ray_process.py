"""The actor of a process, which checks its machine before it imports anything but the standard library.

Ray sends this module by value: it runs on machines that have another rlhf than the driver, or none.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import platform
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

_CONNECT_S = 10.0
"""Time-out of the connection to the driver, in seconds."""

_INSTALL = "install its module there, or keep it in a folder that all machines share"
"""Remedy for a function that cannot be imported."""


class LoadReport(NamedTuple):
    """Result of `Process.load`."""

    address: str
    """Address of the machine."""
    problem: str
    """Reason why the machine cannot run the program, with the remedy; empty if it can."""
    processor: str
    """Name of the processor or GPU that computes; empty if there is a problem."""
    machine: int = 0
    """Number of the machine, by which processes that share memory know each other; 0 if there is a problem."""


class Process:
    """A process of the parameter server. It answers pings while it computes."""

    def ping(self) -> int:
        """Return the process id."""
        return os.getpid()

    def load(self, versions: dict[str, str] | None, driver: tuple[str, int], program: bytes, frozen: Any) -> LoadReport:
        """Create the `Worker` and load its program, unless this machine cannot run it.

        Args:
            versions: `software_versions` of the driver; None if this process is on its machine.
            driver: host and port of the driver's store.
            program: pickle of (function that makes the worker, device, first arguments of `Worker.load`).
            frozen: last argument of `Worker.load`.
        """
        import ray

        address = ray.util.get_node_ip_address()
        if versions is not None and (different := find_differences(versions, software_versions())):
            return LoadReport(address, different, "")
        if obstacle := find_obstacle(*driver):
            return LoadReport(address, obstacle, "")
        from rlhf.distributed.machine_check import check_machine, describe_processor
        from rlhf.distributed.shared_memory import machine_number
        from rlhf.errors import UserError

        try:
            make_worker, device, make_program, *arguments = pickle.loads(program)
        except (ImportError, AttributeError) as error:
            problem = f"it cannot import a function of the program ({error}); {_INSTALL}"
            return LoadReport(address, problem, "")
        self.worker = make_worker()
        try:
            made = make_program()
            check_machine(device, made)
            self.worker.load(lambda: made, *arguments, frozen)
        except UserError as error:
            return LoadReport(address, str(error), "")
        return LoadReport(address, "", describe_processor(device), machine_number())

    def call(self, method: str, *arguments: Any) -> Any:
        """Return the result of a method of the `Worker`."""
        return getattr(self.worker, method)(*arguments)


def software_versions() -> dict[str, str]:
    """Return the versions of packages that must be equal in all processes of a run, without importing them."""
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "rlhf": _code_of_rlhf()}
    for package in ("torch", "numpy", "ray"):
        try:
            versions[package] = importlib.metadata.version(package).partition("+")[0]  # without the build, as in +cpu
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def find_differences(driver: dict[str, str], here: dict[str, str]) -> str:
    """Return how this process differs from the driver, and the remedy; an empty text if it does not."""
    different = [
        f"{name} {here[name]} instead of {version}" for name, version in driver.items() if here[name] != version
    ]
    remedy = f"install what the driver has, for {sys.executable}, with which `ray start` was run there"
    return f"it has {', '.join(different)}; {remedy}" if different else ""


def find_obstacle(host: str, port: int) -> str:
    """Return why this process cannot connect to the driver, and the remedy; an empty text if it can."""
    try:
        socket.create_connection((host, port), _CONNECT_S).close()
    except OSError as error:
        return f"it cannot connect to the driver at {host}:{port} ({error}); open all TCP ports between the machines"
    return ""


def _code_of_rlhf() -> str:
    """Return a digest of the source code of rlhf, such as `code 1a2b3c4d`, or `none` if it is not installed."""
    spec = importlib.util.find_spec("rlhf")
    if spec is None or spec.origin is None:
        return "none"
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"code {digest.hexdigest()[:8]}"
