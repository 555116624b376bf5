"""A running Ray: one of our own on this machine, or a cluster that is there already.

One of our own is bound to the loopback device, has a token of its own, writes only to a temporary folder, and goes with
this process, however that ends.
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
from rlhf.distributed import reaper as janitor
from rlhf.distributed.ray_calls import Daemon, daemons_of_driver, first_answer, is_alive, speaks_grpc
from rlhf.errors import UserError, WorkersLostError

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # we say so ourselves, in one line
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",  # by default Ray ends our process after a minute
}
_OWN_CLUSTER = _QUIET | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name notwithstanding: the node's address is 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # by default 15: beside any other program workers would hardly get a core
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that Ray reads when it is imported, so they are set before."""

START_S = 10.0
"""Within this a cluster answers, or is taken to be unreachable."""

_PROBE_S = 5.0
"""Within this the process behind an address answers."""

_REMEDY = "start one with `ray start --head`, or leave --dist.address out"

_LEAVE_S = 15.0
"""Within this Ray lets go of a process."""

_JANITOR_S = 15.0
"""Within this the janitor is done."""


@dataclass
class _Session:
    """This process's connection to Ray."""

    folder: str | None
    """Of the cluster, where it is our own."""
    daemons: list[Daemon]
    left: bool = False


_sessions: list[_Session] = []
"""The last one is that of now; one that was left early may lie below it."""

_janitors: list[int] = []
"""Their process numbers."""


@contextlib.contextmanager
def connected(dist: DistConfig) -> Iterator[None]:
    """Connect to `dist.address`, or run a cluster on this machine; nested, and where Ray is up already, take that.

    Raises:
        UserError: the cluster cannot be reached, or Ray does not start here.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        if _sessions and _sessions[-1].left:
            raise WorkersLostError("Ray does not answer any more; continue with --resume")
        yield
        return
    with _own_cluster(dist) if dist.address is None else _connection(dist.address):
        yield


def daemons() -> list[Daemon]:
    """What this process, which is connected, depends on."""
    return _sessions[-1].daemons if _sessions else daemons_of_driver()


def leave(*, lost: bool = False) -> None:
    """Disconnect from Ray, also where it is `lost`; does nothing where others have connected."""
    if not _sessions or _sessions[-1].left:
        return
    session = _sessions[-1]
    session.left = True
    lost = lost or not all(is_alive(daemon, _PROBE_S) for daemon in session.daemons)
    if session.folder is not None and lost:
        janitor.kill(janitor.processes_of(session.folder, spared=(os.getpid(), *_janitors)))
    import ray

    thread = threading.Thread(target=ray.shutdown, daemon=True)
    thread.start()
    thread.join(_LEAVE_S)
    if thread.is_alive():
        atexit.unregister(ray.shutdown)  # which would wait for ever, too


@contextlib.contextmanager
def _joined(folder: str | None) -> Iterator[None]:
    """Remember the connection that has just been made, and end it with the block."""
    _sessions.append(_Session(folder, daemons_of_driver()))
    try:
        yield
    finally:
        leave()
        _sessions.pop()


@contextlib.contextmanager
def _own_cluster(dist: DistConfig) -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="rlhf-", dir="/tmp" if Path("/tmp").is_dir() else None)  # sockets: a short path
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # Ray, once interrupted, writes to it again at our exit
    with _swept(folder), _environment(_OWN_CLUSTER | _authentication()):
        import ray

        cores = dist.threads_per_worker * (dist.num_workers + dist.num_servers)
        try:
            with _signals_kept():
                ray.init(
                    address="local",
                    num_cpus=max(cores, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                )
        except Exception as error:  # what Ray raises has no class of its own
            raise UserError(
                f"Ray does not start on this machine ({error}): start one with `ray start --head` and name it with "
                "--dist.address auto, or use --dist.num-workers 0"
            ) from error
        with _joined(folder):
            yield


@functools.cache
def _authentication() -> dict[str, str]:
    """Return the settings by which only we may use a cluster of our own.

    Ray reads its mode once, at import: where a program has imported it before us, the cluster can only do without.
    """
    return {"RAY_AUTH_MODE": "disabled"} if "ray" in sys.modules else {"RAY_AUTH_TOKEN": _token()}


@contextlib.contextmanager
def _swept(folder: str) -> Iterator[None]:
    """Have a janitor end what a cluster leaves behind; where it is dead or stopped itself, do its work."""
    watch = subprocess.Popen([sys.executable, janitor.__file__, folder], stdin=subprocess.PIPE, start_new_session=True)
    _janitors.append(watch.pid)
    try:
        yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()  # the janitor begins, as it does when this process is killed
        with contextlib.suppress(subprocess.TimeoutExpired):
            watch.wait(_JANITOR_S)
        if watch.returncode != 0:
            watch.kill()
            watch.wait()
            janitor.sweep(folder, os.getpid())
        _janitors.remove(watch.pid)


@contextlib.contextmanager
def _connection(address: str) -> Iterator[None]:
    with _environment(_QUIET):
        host, port = _find_address(address)
        _check_reachable(address, host, port)
        import ray

        try:
            with _signals_kept():
                ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if "version mismatch" in str(error).lower():
                reason = "the cluster there runs another version of Ray or Python than this program"
            else:
                reason = "no Ray cluster answers there"
            raise UserError(f"--dist.address {address}: {reason} ({error})") from error
        with _joined(None):
            yield


@functools.cache
def _token() -> str:
    """One for this process, which Ray reads once; by default it would lie in the user's home."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def _find_address(address: str) -> tuple[str, int]:
    """Host and port of a cluster; `auto` is what RAY_ADDRESS says, or the cluster that Ray finds on this machine."""
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
    return host.strip("[]"), int(port)


def _check_reachable(address: str, host: str, port: int) -> None:
    """Raise UserError if no gRPC server answers: Ray itself would try for minutes, with lines of its own."""
    where = f"{host}:{port}"
    try:
        if speaks_grpc(first_answer(host, port, _PROBE_S)):
            return
        reason = "what listens there is no Ray cluster"
    except TimeoutError:
        reason = f"silent for {_PROBE_S:g} s"
    except OSError as error:
        reason = str(error)
    shown = address if address == where else f"{address} ({where})"
    raise UserError(f"--dist.address {shown}: no Ray cluster answers there ({reason}); {_REMEDY}")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
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
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own on SIGTERM, which exits; the run's handler shall stay, and learn of the signal."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where Ray sets none either
            signal.signal(signal.SIGTERM, before)
