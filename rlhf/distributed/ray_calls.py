"""Calls of Ray that end also when Ray itself does not.

Ray's own calls have no time-out where one of its daemons is stopped, and where one has died they may end the process.
So they are made in a thread of their own, and only while the daemons answer, which is asked without Ray.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

SILENCE_S = 10.0
"""Ray is taken to be lost once a daemon has not answered for so long."""

_LOOK_S = 0.5
"""Between looks at the daemons, while a call takes its time."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The beginning of a gRPC connection: HTTP/2's preface and an empty frame of settings."""

_SETTINGS = 4
"""The type of HTTP/2 frame with which a server begins."""

_Result = TypeVar("_Result")


class LostError(Exception):
    """Processes died or fell silent, or their group failed."""

    def __init__(self, what: str, members: Sequence[Any] = ()) -> None:
        """Takes what was lost, in words; the members among it: none where only the group has failed."""
        super().__init__(what)
        self.members = members


class RayLostError(LostError):
    """Ray itself is lost, or has no place for a single worker: nothing can be replaced."""


class Daemon(NamedTuple):
    """One of Ray's own processes."""

    name: str
    host: str
    port: int
    restarts: bool
    """Whether another may take its place: one that has ended is then waited for."""


def first_answer(host: str, port: int, timeout_s: float) -> bytes:
    """The first bytes with which a server answers the beginning of a gRPC connection; none where it hangs up.

    Raises:
        OSError: nothing listens there, or what does is silent for `timeout_s`.
    """
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(_HELLO)
        return connection.recv(9)


def speaks_grpc(answer: bytes) -> bool:
    """Whether `first_answer` is that of a gRPC server; one that wants TLS cannot be told from others."""
    tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    return tls or (len(answer) > 3 and answer[3] == _SETTINGS)


def is_alive(daemon: Daemon, silence_s: float) -> bool:
    """Whether a daemon answers within `silence_s`."""
    deadline = time.monotonic() + silence_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            first_answer(daemon.host, daemon.port, left)
            return True
        except ConnectionRefusedError:
            if not daemon.restarts:
                return False
            time.sleep(min(_LOOK_S, left))
        except ConnectionError:  # it has hung up, as a process that has just ended: the next look tells
            time.sleep(min(0.01, left))
        except OSError:
            return False
    return False


class RayCalls:
    """Makes calls one after the other, for as long as all daemons answer."""

    def __init__(self, daemons: Sequence[Daemon], silence_s: float = SILENCE_S) -> None:
        """Args: the daemons that a call may wait for; after how much silence one is lost."""
        self._daemons, self._silence_s = daemons, silence_s
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
        """The function's result.

        Raises:
            RayLostError: a daemon has ended or fallen silent; the call may never end, and no other may be made.
        """
        self.check()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def job() -> None:
            try:
                answer.put((function(*arguments, **options), None))
            except BaseException as error:  # whatever it is, the caller's thread raises it
                answer.put((None, error))

        self._jobs.put(job)
        while True:
            try:
                result, error = answer.get(timeout=_LOOK_S)
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
        """End the thread, after the call that it is in."""
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()


def daemons_of_driver() -> list[Daemon]:
    """The daemons that this process, which is connected, depends on: the cluster's GCS and this machine's raylet."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    here = context.get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return [
        Daemon("raylet", node["NodeManagerAddress"], node["NodeManagerPort"], restarts=False),
        Daemon("GCS", host.strip("[]"), int(port), restarts=True),
    ]
