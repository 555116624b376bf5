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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import DistConfig
from rlhf.distributed import reaper
from rlhf.distributed.cluster_address import PROBE_S, check_reachable, find_address, find_raylet
from rlhf.distributed.ray_calls import (
    Daemon,
    RayCalls,
    RayLostError,
    daemons_of_driver,
    is_alive,
)
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
    lost = lost or not all(is_alive(daemon, PROBE_S) for daemon in session.daemons)
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
        host, port = find_address(address)
        check_reachable(address, host, port)
        _connect(address, host, port)
        with _register(None):
            yield


def _connect(address: str, host: str, port: int) -> None:
    """Connect to a cluster, or raise UserError if it ends or falls silent meanwhile.

    Ray itself would end this process after half a minute, with messages of its own.
    """
    import ray

    gcs = Daemon("GCS", host, port, restarts=False)
    try:
        raylet = _call_while([gcs], find_raylet, address, host, port)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        _call_while([gcs, raylet], ray.init, address=f"{host}:{port}", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "version mismatch" in str(error).lower():
            reason = "the cluster there runs another version of Ray or Python than this program"
        else:
            reason = "no Ray cluster answers there"
        raise UserError(f"--dist.address {address}: {reason} ({error})") from error
    except RayLostError as error:
        atexit.unregister(ray.shutdown)  # which would also wait
        remedy = "start it again with `ray stop` and `ray start`, or leave --dist.address out"
        raise UserError(f"--dist.address {address}: lost {error} while connecting; {remedy}") from error


def _call_while(daemons: Sequence[Daemon], function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return the result of a function, or raise RayLostError as soon as a daemon does not answer."""
    run = RayCalls(daemons, START_S)
    try:
        return run(function, *arguments, **options)
    finally:
        run.close()


@functools.cache
def _token() -> str:
    """Return the token of this process, which Ray reads once. By default Ray would write one to the home folder."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


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
