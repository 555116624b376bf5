"""What is decided when Ray itself does not answer, with fakes in its place."""

import contextlib
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from rlhf.distributed import cluster, cluster_address
from rlhf.distributed import ray_session as session
from rlhf.distributed.cluster import placed_bundles
from rlhf.distributed.ray_calls import Daemon, RayCalls, RayLostError, is_alive, speaks_grpc
from rlhf.errors import UserError

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextlib.contextmanager
def serve(answer: bytes | None):
    """The port of a server that answers so, or is silent, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ends, connections = threading.Event(), []

        def work():
            while not ends.is_set():
                with contextlib.suppress(TimeoutError):
                    connections.append(server.accept()[0])
                    if answer is not None:
                        connections[-1].sendall(answer)

        thread = threading.Thread(target=work)
        if answer is not None:  # the system itself takes the connections of a stopped process
            thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ends.set()
            if thread.is_alive():
                thread.join()
            for connection in connections:
                connection.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_daemon_is_alive_if_it_answers():
    with serve(SETTINGS) as port:
        assert is_alive(Daemon("GCS", "127.0.0.1", port, restarts=True), 1.0)


@pytest.mark.parametrize(("restarts", "least_s"), [(False, 0.0), (True, 0.4)])
def test_a_daemon_that_has_ended_is_waited_for_if_it_may_come_back(restarts, least_s):
    begin = time.monotonic()
    assert not is_alive(Daemon("daemon", "127.0.0.1", closed_port(), restarts), 0.5)
    assert least_s <= time.monotonic() - begin < 2.0


def test_a_call_gives_the_result_or_the_error():
    with serve(SETTINGS) as port:
        run = RayCalls([Daemon("raylet", "127.0.0.1", port, restarts=False)])
        assert run(lambda number, add: number + add, 1, add=2) == 3
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 / 0)
        run.close()


def test_a_call_that_hangs_with_its_daemon_is_given_up():
    ends = threading.Event()
    with contextlib.ExitStack() as server:
        port = server.enter_context(serve(SETTINGS))
        run = RayCalls([Daemon("raylet", "127.0.0.1", port, restarts=False)], 0.5)
        threading.Timer(0.3, server.close).start()  # the daemon dies while it is called
        with pytest.raises(RayLostError, match=rf"Ray \(its raylet at 127.0.0.1:{port} does not answer\)"):
            run(ends.wait, 30)
    ends.set()
    run.close()


def test_no_call_is_made_while_a_daemon_is_silent():
    with serve(None) as port:
        run = RayCalls([Daemon("raylet", "127.0.0.1", port, restarts=False)], 0.3)
        with pytest.raises(RayLostError):
            run(pytest.fail)
        run.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(None, "no answer within 0.3 s"), (b"SSH-2.0-OpenSSH", "the server there is not a Ray cluster")],
)
def test_an_address_without_ray_behind_it_is_refused(monkeypatch, answer, reason):
    monkeypatch.setattr(cluster_address, "PROBE_S", 0.3)
    with (
        serve(answer) as port,
        pytest.raises(UserError, match=rf"no Ray cluster answers there \({reason}\); start one"),
    ):
        cluster_address.check_reachable("auto", "127.0.0.1", port)


def test_the_address_file_of_a_cluster_that_is_gone_is_named(monkeypatch):
    port = closed_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    host, found_port = cluster_address.find_address("auto")
    with pytest.raises(UserError, match=rf"--dist.address auto \({host}:{port}\): no Ray cluster answers there"):
        cluster_address.check_reachable("auto", host, found_port)


def test_a_machine_outside_of_the_cluster_is_told_to_join_it(monkeypatch):
    def find(client, *, timeout_seconds):
        raise RuntimeError("No node info found")

    monkeypatch.setattr("ray._private.services.get_node_to_connect_for_driver", find)
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: None)
    with pytest.raises(UserError, match=r"not part of the cluster; run `ray start --address=10.0.0.1:6379` here first"):
        cluster_address.find_raylet("auto", "10.0.0.1", 6379)


@pytest.mark.parametrize("daemon", ["GCS", "raylet"])
def test_a_cluster_that_dies_while_a_program_connects_is_told(monkeypatch, daemon):
    ends = threading.Event()
    with contextlib.ExitStack() as gcs, contextlib.ExitStack() as raylet:
        port, raylet_port = gcs.enter_context(serve(SETTINGS)), raylet.enter_context(serve(SETTINGS))
        found = Daemon("raylet", "127.0.0.1", raylet_port, restarts=False)
        monkeypatch.setattr(session, "find_raylet", lambda *where: found)

        def connect(**options):
            (gcs if daemon == "GCS" else raylet).close()
            ends.wait(30)

        monkeypatch.setattr("ray.init", connect)
        with pytest.raises(UserError, match=rf"auto: lost Ray \(its {daemon} .* while connecting; start it again"):
            session._connect("auto", "127.0.0.1", port)
    ends.set()


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", "head:70000"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(UserError, match="expected auto or HOST:PORT"):
        cluster_address.find_address(address)


def test_only_the_first_frame_of_a_grpc_server_is_one():
    assert speaks_grpc(SETTINGS)
    assert not any(speaks_grpc(answer) for answer in (b"", b"SSH-2.0-O", b"HTTP/1.1 "))


def test_bundles_on_machines_that_are_lost_or_silent_have_no_place():
    nodes = [
        {"NodeID": name, "Alive": name != "dead", "NodeManagerAddress": name, "NodeManagerPort": 1}
        for name in ("here", "dead", "silent")
    ]
    table = {"bundles_to_node_id": {0: "here", 1: "dead", 2: "silent", 3: "", 4: "here"}}
    assert placed_bundles(table, nodes, lambda daemon: daemon.host != "silent") == {0, 4}


@pytest.mark.parametrize(
    ("noticed_s", "moved_s", "end_s", "replaced"),
    [(60, 62, 62, True), (60, 1000, 70, False), (5, 1000, 15, False), (1000, 1000, 90, False), (0, 1, 1, True)],
)
def test_the_place_of_a_lost_process_is_waited_for_until_ray_has_noticed(
    monkeypatch, noticed_s, moved_s, end_s, replaced
):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(cluster, "time", clock)
    monkeypatch.setattr(cluster, "is_alive", lambda daemon, silence_s: daemon.host == "spare")

    def nodes():
        alive = {"lost": clock.now < noticed_s, "spare": True}
        return [
            {"NodeID": name, "Alive": value, "NodeManagerAddress": name, "NodeManagerPort": 1}
            for name, value in alive.items()
        ]

    def table(group):
        place = "spare" if clock.now >= moved_s else "lost" if clock.now < noticed_s else ""
        return {"bundles_to_node_id": {0: place}}

    found = cluster.Cluster.__new__(cluster.Cluster)
    found._run, found._group = lambda function, *arguments: function(*arguments), None
    found._ray = SimpleNamespace(nodes=nodes, util=SimpleNamespace(placement_group_table=table))
    member = cluster.Member(None, "worker 0", 0, None)
    assert found.find_replaceable([member]) == ([member] if replaced else [])
    assert clock.now == pytest.approx(end_s, abs=1.0)


@pytest.mark.parametrize(("imported", "setting"), [(True, "RAY_AUTH_MODE"), (False, "RAY_AUTH_TOKEN")])
def test_a_cluster_of_our_own_does_without_a_token_where_ray_has_been_imported_before(monkeypatch, imported, setting):
    """Ray reads its mode once, at import."""
    modules = {name: module for name, module in sys.modules.items() if name != "ray"}
    monkeypatch.setattr(session.sys, "modules", modules | ({"ray": object()} if imported else {}))
    assert list(session._authentication.__wrapped__()) == [setting]
