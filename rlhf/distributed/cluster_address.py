"""The address of a running Ray cluster: where it is, and whether this program can take part in it."""

import importlib

from rlhf.distributed.ray_calls import Daemon, first_answer, speaks_grpc
from rlhf.errors import UserError

PROBE_S = 5.0
"""Time-out of an answer of Ray, in seconds."""

REMEDY = "start one with `ray start --head`, or leave --dist.address out"
"""Remedy for a user without a running cluster."""


def find_address(address: str) -> tuple[str, int]:
    """Return host and port of a cluster. `auto` stands for RAY_ADDRESS, or for the cluster that Ray finds here."""
    where = address
    if address == "auto":
        from ray._private.services import get_ray_address_from_environment

        try:
            where = get_ray_address_from_environment("auto", None)
        except ConnectionError as error:
            raise UserError(f"--dist.address auto: no Ray cluster runs on this machine; {REMEDY}") from error
    host, _, port = where.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        shown = address if where == address else f"{address} ({where})"
        raise UserError(f"--dist.address {shown}: expected auto or HOST:PORT")
    if (host := host.strip("[]")) in ("127.0.0.1", "localhost", "::1"):
        from ray.util import get_node_ip_address

        host = get_node_ip_address()  # as Ray does, which then waits without end for a cluster on loopback alone
    return host, int(port)


def check_reachable(address: str, host: str, port: int) -> None:
    """Raise UserError if no gRPC server answers. Ray itself would try for minutes and print its own messages."""
    where = f"{host}:{port}"
    try:
        if speaks_grpc(first_answer(host, port, PROBE_S)):
            return
        reason = "the server there is not a Ray cluster"
    except TimeoutError:
        reason = f"no answer within {PROBE_S:g} s"
    except OSError as error:
        reason = str(error)
    shown = address if address == where else f"{address} ({where})"
    raise UserError(f"--dist.address {shown}: no Ray cluster answers there ({reason}); {REMEDY}")


def find_raylet(address: str, host: str, port: int) -> Daemon:
    """Return the raylet of this machine, through which a program takes part in a cluster.

    Raises:
        UserError: this machine is not part of the cluster.
    """
    from ray._private.services import get_node_to_connect_for_driver

    where, native = f"{host}:{port}", importlib.import_module("ray._raylet")
    try:
        node = get_node_to_connect_for_driver(native.GcsClient(address=where), timeout_seconds=int(PROBE_S))
    except RuntimeError as error:
        raise UserError(
            f"--dist.address {address}: this machine is not part of the cluster; run `ray start --address={where}` "
            "here first, or run this program on a machine of the cluster"
        ) from error
    return Daemon("raylet", node.node_manager_address, node.node_manager_port, restarts=False)
