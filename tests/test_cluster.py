"""Ray as users meet it: errors within seconds, signals, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config import DistConfig
from rlhf.distributed import cluster
from rlhf.distributed.reaper import processes_of
from rlhf.errors import Interrupted, UserError
from rlhf.train.signals import stop_on_signal

PROGRAM = Path(sys.executable).with_name("rlhf-train")


def test_an_unreachable_cluster_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf"--dist.address 127.0.0.1:{port}.*: no Ray cluster answers there"):
        cluster.open_cluster(DistConfig(num_workers=1, address=f"127.0.0.1:{port}")).__enter__()
    assert time.monotonic() - begun < 10


def test_a_cluster_that_ray_itself_would_ask_at_another_address_is_refused(monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.2")
    with socket.create_server(("127.0.0.1", 0)) as server:  # a private cluster, which --dist.address auto may find
        dist = DistConfig(num_workers=1, address=f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=r"\(127.0.0.2:\d+\): no Ray cluster answers there"):
            cluster.open_cluster(dist).__enter__()


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1234", "a:b"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(UserError, match=r"--dist.address .*: expected auto or HOST:PORT"):
        cluster.open_cluster(DistConfig(num_workers=1, address=address)).__enter__()


def test_too_few_resources_are_named(monkeypatch):
    assert cluster.START_S <= 10
    monkeypatch.setattr(cluster, "START_S", 2.0)
    dist = DistConfig(num_workers=2, num_servers=1, gpus_per_worker=1.0)
    asked = r"2 workers and 1 servers need 3 CPU and 3 GPU, but the cluster has \d+ CPU, 0 GPU free"
    with pytest.raises(UserError, match=asked), cluster.open_cluster(dist):
        pass


def test_a_ray_that_does_not_start_is_one_message(monkeypatch):
    def fail(**settings):
        raise Exception("The current node timed out during startup")

    monkeypatch.setattr("ray.init", fail)
    with (
        pytest.raises(
            UserError, match=r"does not start on this machine \(The current node timed.*--dist.num-workers 0"
        ),
        cluster.open_cluster(DistConfig(num_workers=1)),
    ):
        pass


@pytest.mark.parametrize("error", [Interrupted("stopped", signal.SIGTERM), KeyboardInterrupt()], ids=repr)
def test_a_signal_while_ray_starts_is_no_fault_of_ray(monkeypatch, error):
    def interrupt(**settings):
        raise error

    monkeypatch.setattr("ray.init", interrupt)
    with pytest.raises(type(error)) as caught, cluster.open_cluster(DistConfig(num_workers=1)):
        pass
    assert caught.value is error


def test_a_signal_that_ray_takes_while_it_starts_reaches_the_run(monkeypatch):
    """Ray's own handler of SIGTERM exits with 15."""

    def start(**settings):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", start)
    with (
        pytest.raises(Interrupted, match="stopped before its first step") as caught,
        stop_on_signal(),
        cluster.open_cluster(DistConfig(num_workers=1)),
    ):
        pass
    assert caught.value.exit_code == 143


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times", "code", "said"),
    [
        (signal.SIGINT, 1, 130, "and saved; continue with --resume"),
        (signal.SIGTERM, 1, 143, "and saved; continue with --resume"),
        (signal.SIGINT, 2, 130, "stopped at once"),
        (signal.SIGKILL, 1, -9, ""),
    ],
)
def test_signals_leave_no_process_and_no_folder(tmp_path, number, times, code, said):
    """SIGINT goes to the whole process group, as a terminal sends it on Ctrl-C; the others to the program."""
    before = set(Path("/tmp").glob("rlhf-*"))
    command = [
        PROGRAM, "sft", "--output-dir", tmp_path / "run", "--cache-dir", tmp_path, "--model.preset", "tiny",
        "--sft.max-steps", "100000", "--dist.num-workers", "2", "--sft.micro-batch-size", "1",
    ]  # fmt: skip
    home = {**os.environ, "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=home)
    metrics = tmp_path / "run" / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count('"step"') > 3):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (folder,) = set(Path("/tmp").glob("rlhf-*")) - before
    assert processes_of(str(folder))
    for _ in range(times):
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        time.sleep(0.3)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == code, error
    assert said in error
    assert "Traceback" not in error
    time.sleep(3.0)
    assert not folder.exists()
    assert not processes_of(str(folder))
    assert not list((tmp_path / "home").iterdir()), "Ray has written into the user's home"
