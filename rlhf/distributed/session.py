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
from collections.abc import Iterator
from pathlib import Path

from rlhf.config import DistConfig
from rlhf.distributed import janitor
from rlhf.errors import UserError

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",  # we say so ourselves, in one line
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


@contextlib.contextmanager
def connected(dist: DistConfig) -> Iterator[None]:
    """Connect to `dist.address`, or run a cluster on this machine; nested, and where Ray is up already, take that.

    Raises:
        UserError: the cluster cannot be reached, or Ray does not start here.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    with _own_cluster(dist) if dist.address is None else _connection(dist.address):
        yield


@contextlib.contextmanager
def _own_cluster(dist: DistConfig) -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="rlhf-", dir="/tmp" if Path("/tmp").is_dir() else None)  # sockets: a short path
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # Ray, once interrupted, writes to it again at our exit
    watch = subprocess.Popen([sys.executable, janitor.__file__, folder], stdin=subprocess.PIPE, start_new_session=True)
    try:
        with _environment(_OWN_CLUSTER | {"RAY_AUTH_TOKEN": _token()}):
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
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        assert watch.stdin is not None
        watch.stdin.close()  # the janitor ends what is left, as it does when this process is killed
        watch.wait()


@contextlib.contextmanager
def _connection(address: str) -> Iterator[None]:
    if address != "auto":
        _check_reachable(address)
    with _environment(_QUIET):
        import ray

        try:
            with _signals_kept():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--dist.address {address}: no Ray cluster answers there ({error})") from error
        try:
            yield
        finally:
            ray.shutdown()


@functools.cache
def _token() -> str:
    """One for this process, which Ray reads once; by default it would lie in the user's home."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def _check_reachable(address: str) -> None:
    """Ray itself would try for half a minute."""
    import socket

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--dist.address {address}: expected auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=START_S).close()
    except OSError as error:
        raise UserError(f"--dist.address {address}: no Ray cluster answers there ({error})") from error


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
