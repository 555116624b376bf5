"""The connection to Ray: to a private cluster on this machine, or to an existing cluster.

A private cluster is bound to the loopback device, has its own token, writes only to a temporary folder, and ends with
this process, even if the process is killed.
"""

import atexit
import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import DistConfig
from rlhf.distributed import reaper
from rlhf.distributed.ray_calls import Daemon, daemons_of_driver, first_answer, is_alive, speaks_grpc
from rlhf.errors import UserError, WorkersLostError

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # the executor logs it in one line
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",  # by default Ray ends this process after a minute
}
_PRIVATE_CLUSTER = _QUIET | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: sets the node's address to 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # by default 15, with which workers get hardly any core beside other programs
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that Ray reads when it is imported, so they are set before."""

START_S = 10.0
"""Time-out after which a cluster is considered unreachable, in seconds."""

_PROBE_S = 5.0
"""Time-out of the process at an address, in seconds."""

_REMEDY = "start one with `ray start --head`, or leave --dist.address out"

_LEAVE_S = 15.0
"""Time-out of disconnecting from Ray, in seconds."""

_REAPER_S = 15.0
"""Time-out of the reaper, in seconds."""


@dataclass
class _Session:
    """Connection of this process to Ray."""

    folder: str | None
    """Folder of a private cluster; None for an existing cluster."""
    daemons: list[Daemon]
    """Daemons that this process depends on."""
    is_closed: bool = False
    """True if the connection was closed early."""


_sessions: list[_Session] = []
"""Sessions, of which the last is the current one. A session that was closed early may precede it."""

_reapers: list[int] = []
"""Process ids of the reapers."""


@contextlib.contextmanager
def open_session(dist: DistConfig) -> Iterator[None]:
    """Connect to `dist.address`, or start a private cluster. An existing connection is used again.

    Raises:
        UserError: the cluster is unreachable, or Ray does not start on this machine.
        WorkersLostError: the existing connection is lost.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        if _sessions and _sessions[-1].is_closed:
            raise WorkersLostError("Ray does not answer any more; continue with --resume")
        yield
        return
    with _private_cluster(dist) if dist.address is None else _connection(dist.address):
        yield


def daemons() -> list[Daemon]:
    """Return the daemons that this connected process depends on."""
    return _sessions[-1].daemons if _sessions else daemons_of_driver()


def is_private() -> bool:
    """Return True if the cluster of this connected process was started by it, on this machine."""
    return bool(_sessions) and _sessions[-1].folder is not None


def leave(*, lost: bool = False) -> None:
    """Disconnect from Ray, even if it is `lost`. Does nothing if this module has not connected."""
    if not _sessions or _sessions[-1].is_closed:
        return
    session = _sessions[-1]
    session.is_closed = True
    lost = lost or not all(is_alive(daemon, _PROBE_S) for daemon in session.daemons)
    if session.folder is not None and lost:
        reaper.kill(reaper.processes_of(session.folder, spared=(os.getpid(), *_reapers)))
    import ray

    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_LEAVE_S)
    if thread.is_alive():
        atexit.unregister(ray.shutdown)  # which would also wait for ever


@contextlib.contextmanager
def _register(folder: str | None) -> Iterator[None]:
    """Register the new connection as the current session, and close it when the block ends."""
    _sessions.append(_Session(folder, daemons_of_driver()))
    try:
        yield
    finally:
        leave()
        _sessions.pop()


@contextlib.contextmanager
def _private_cluster(dist: DistConfig) -> Iterator[None]:
    folder = tempfile.mkdtemp(
        prefix="rlhf-", dir="/tmp" if Path("/tmp").is_dir() else None
    )  # sockets need a short path
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # an interrupted Ray writes to it at exit
    with _reaper(folder), _environment(_PRIVATE_CLUSTER | _authentication()):
        import ray

        cores = dist.threads_per_worker * (dist.num_workers + dist.num_servers)
        try:
            with _restore_sigterm():
                ray.init(
                    address="local",
                    num_cpus=max(cores, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                )
        except Exception as error:  # Ray raises no class of its own
            raise UserError(
                f"Ray does not start on this machine ({error}): start one with `ray start --head` and name it with "
                "--dist.address auto, or use --dist.num-workers 0"
            ) from error
        with _register(folder):
            yield


@functools.cache
def _authentication() -> dict[str, str]:
    """Return the settings that restrict a private cluster to this process.

    Ray reads its mode once, when it is imported. If a program has imported it before, the cluster has no token.
    """
    return {"RAY_AUTH_MODE": "disabled"} if "ray" in sys.modules else {"RAY_AUTH_TOKEN": _token()}


@contextlib.contextmanager
def _reaper(folder: str) -> Iterator[None]:
    """Run a reaper that cleans up after a cluster. If the reaper is dead or stopped, clean up in this process."""
    watch = subprocess.Popen([sys.executable, reaper.__file__, folder], stdin=subprocess.PIPE, start_new_session=True)
    _reapers.append(watch.pid)
    try:
        yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()  # starts the reaper, as the death of this process does
        with contextlib.suppress(subprocess.TimeoutExpired):
            watch.wait(_REAPER_S)
        if watch.returncode != 0:
            watch.kill()
            watch.wait()
            reaper.kill_process_group(folder, os.getpid())
        _reapers.remove(watch.pid)


@contextlib.contextmanager
def _connection(address: str) -> Iterator[None]:
    with _environment(_QUIET):
        host, port = _find_address(address)
        _check_reachable(address, host, port)
        import ray

        try:
            with _restore_sigterm():
                ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if "version mismatch" in str(error).lower():
                reason = "the cluster there runs another version of Ray or Python than this program"
            else:
                reason = "no Ray cluster answers there"
            raise UserError(f"--dist.address {address}: {reason} ({error})") from error
        with _register(None):
            yield


@functools.cache
def _token() -> str:
    """Return the token of this process, which Ray reads once. By default Ray would write one to the home folder."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def _find_address(address: str) -> tuple[str, int]:
    """Return host and port of a cluster. `auto` stands for RAY_ADDRESS, or for the cluster that Ray finds here."""
    where = address
    if address == "auto":
        from ray._private.services import get_ray_address_from_environment

        try:
            where = get_ray_address_from_environment("auto", None)
        except ConnectionError as error:
            raise UserError(f"--dist.address auto: no Ray cluster runs on this machine; {_REMEDY}") from error
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        shown = address if where == address else f"{address} ({where})"
        raise UserError(f"--dist.address {shown}: expected auto or HOST:PORT")
    if (host := host.strip("[]")) in ("127.0.0.1", "localhost", "::1"):
        from ray.util import get_node_ip_address

        host = get_node_ip_address()  # as Ray does, which then waits without end for a cluster on loopback alone
    return host, int(port)


def _check_reachable(address: str, host: str, port: int) -> None:
    """Raise UserError if no gRPC server answers. Ray itself would try for minutes and print its own messages."""
    where = f"{host}:{port}"
    try:
        if speaks_grpc(first_answer(host, port, _PROBE_S)):
            return
        reason = "the server there is not a Ray cluster"
    except TimeoutError:
        reason = f"no answer within {_PROBE_S:g} s"
    except OSError as error:
        reason = str(error)
    shown = address if address == where else f"{address} ({where})"
    raise UserError(f"--dist.address {shown}: no Ray cluster answers there ({reason}); {_REMEDY}")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _restore_sigterm() -> Iterator[None]:
    """Restore the run's handler of SIGTERM after Ray has set its own, and pass on a signal that Ray has caught."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
    finally:
        with contextlib.suppress(ValueError):  # outside the main thread, where Ray sets none either
            signal.signal(signal.SIGTERM, before)
