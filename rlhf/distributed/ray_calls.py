"""Calls of Ray that end even if Ray does not answer.

Calls of Ray have no time-out if one of its daemons is stopped, and may end the process if a daemon has died. A separate
thread therefore makes the calls, and only while the daemons answer, which is checked without Ray.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

SILENCE_S = 10.0
"""Time without an answer from a daemon after which Ray is considered lost, in seconds."""

_CHECK_S = 0.5
"""Interval of checks of the daemons during a call, in seconds."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""Start of a gRPC connection: the preface of HTTP/2 and an empty settings frame."""

_SETTINGS = 4
"""Type of the first HTTP/2 frame of a server."""

_Result = TypeVar("_Result")


class LostError(Exception):
    """Processes died or stopped answering, or their group failed."""

    def __init__(self, what: str, members: Sequence[Any] = ()) -> None:
        """Store the lost members, or none if only the group has failed. `what` describes the loss."""
        super().__init__(what)
        self.members = members


class RayLostError(LostError):
    """Ray itself is lost, or no machine has resources for a worker, so that nothing can be replaced."""


class Daemon(NamedTuple):
    """One of the processes of Ray itself."""

    name: str
    """Name for the user."""
    host: str
    """Host of its server."""
    port: int
    """Port of its server."""
    restarts: bool
    """True if Ray may restart the daemon, in which case callers wait for a daemon that has ended."""


def first_answer(host: str, port: int, timeout_s: float) -> bytes:
    """Return the first bytes that a server answers to the start of a gRPC connection, or none if it hangs up.

    Raises:
        OSError: no server listens there, or it does not answer within `timeout_s`.
    """
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(_HELLO)
        return connection.recv(9)


def speaks_grpc(answer: bytes) -> bool:
    """Return True if `first_answer` comes from a gRPC server. With TLS enabled, every answer is accepted."""
    tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    return tls or (len(answer) > 3 and answer[3] == _SETTINGS)


def is_alive(daemon: Daemon, silence_s: float) -> bool:
    """Return True if a daemon answers within `silence_s`."""
    deadline = time.monotonic() + silence_s
    while (remaining_s := deadline - time.monotonic()) > 0:
        try:
            first_answer(daemon.host, daemon.port, remaining_s)
            return True
        except ConnectionRefusedError:
            if not daemon.restarts:
                return False
            time.sleep(min(_CHECK_S, remaining_s))
        except ConnectionError:  # it has hung up, as a process that is ending does
            time.sleep(min(0.01, remaining_s))
        except OSError:
            return False
    return False


class RayCalls:
    """A thread that makes calls one after the other, while all daemons answer."""

    def __init__(self, daemons: Sequence[Daemon], silence_s: float = SILENCE_S) -> None:
        """Start the thread.

        Args:
            daemons: daemons that a call may wait for.
            silence_s: time without an answer after which a daemon is considered lost, in seconds.
        """
        self._daemons, self._silence_s = daemons, silence_s
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
        """Return the function's result.

        Raises:
            RayLostError: a daemon has ended or does not answer. The call may never end, so make no other call.
        """
        self.check()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def job() -> None:
            try:
                answer.put((function(*arguments, **options), None))
            except BaseException as error:  # the caller's thread raises it
                answer.put((None, error))

        self._jobs.put(job)
        while True:
            try:
                result, error = answer.get(timeout=_CHECK_S)
            except queue.Empty:
                self.check()
                continue
            if error is not None:
                raise error
            return result

    def check(self) -> None:
        """Raise RayLostError if a daemon does not answer."""
        for daemon in self._daemons:
            if not is_alive(daemon, self._silence_s):
                raise RayLostError(f"Ray (its {daemon.name} at {daemon.host}:{daemon.port} does not answer)")

    def close(self) -> None:
        """End the thread after its current call."""
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()


def daemons_of_driver() -> list[Daemon]:
    """Return the daemons that this connected process depends on: the cluster's GCS and this machine's raylet."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    node_id = context.get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    return [
        Daemon("raylet", node["NodeManagerAddress"], node["NodeManagerPort"], restarts=False),
        Daemon("GCS", host.strip("[]"), int(port), restarts=True),
    ]
