"""Faults of Ray itself: its daemons killed or stopped under a run, and a machine of a cluster lost."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import toy
from ray.util import get_node_ip_address

from rlhf.config import DistConfig
from rlhf.distributed import open_executor
from rlhf.execution.executor import LocalExecutor

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("rlhf-train")
FLAGS = [
    *("--model.preset", "tiny", "--sft.max-steps", "150", "--sft.micro-batch-size", "1", "--sft.epochs", "1000"),
    *("--sft.eval-every", "100000", "--compile", "off", "--log.no-tensorboard", "--threads", "1"),
]
DAEMONS = {
    "raylet": lambda command: command.split(" ")[0].endswith("/raylet"),
    "GCS": lambda command: command.split(" ")[0].endswith("/gcs_server"),
    "agent": lambda command: "dashboard/agent.py" in command or "DashboardAgent" in command,
    "reaper": lambda command: "reaper.py" in command,
}


def commands() -> dict[int, str]:
    """Command line of every process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "sft" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """The cache, and the model of a run without workers and faults."""
    folder = tmp_path_factory.mktemp("whole")
    command = [PROGRAM, "sft", "--output-dir", folder / "run", "--cache-dir", folder / "cache", *FLAGS]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder / "cache", sha(folder / "run")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("daemon", DAEMONS)
def test_a_daemon_that_dies_or_stops_ends_the_run_saved_or_not_at_all(tmp_path, whole, daemon, sent):
    cache, digest = whole
    folder = tmp_path / "run"
    command = [PROGRAM, "sft", "--output-dir", folder, "--cache-dir", cache, *FLAGS]
    before, memory = set(Path(tempfile.gettempdir()).glob("rlhf-*")), set(os.listdir("/dev/shm"))
    run = subprocess.Popen(
        [*command, "--dist.num-workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        log, end = folder / "logs" / "metrics.jsonl", time.monotonic() + 90
        while not (log.exists() and log.read_text().count('"step"') > 12):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        places = set(Path(tempfile.gettempdir()).glob("rlhf-*")) - before
        (ray,) = [place for place in places if (place / "session_latest").exists()]
        (victim,) = [pid for pid, text in commands().items() if str(ray) in text and DAEMONS[daemon](text)][:1]
        os.kill(victim, sent)
        begun = time.monotonic()
        err = run.communicate(timeout=120)[1]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert time.monotonic() - begun < 90
    assert "Traceback" not in err
    if run.returncode == 4:
        assert "saved; continue with --resume" in err
        subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=300)
    else:
        assert run.returncode == 0, err
        assert daemon in ("reaper", "agent")
    assert sha(folder) == digest
    time.sleep(1.0)
    assert [text for text in commands().values() if str(ray) in text] == []
    assert not ray.exists()
    assert set(os.listdir("/dev/shm")) <= memory


def descendants(root: int) -> set[int]:
    """A process, its session and all that they started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.name)] = (int(fields[1]), int(fields[3]))
    found = {root} | {pid for pid, (_, session) in parents.items() if session == root}
    while more := {pid for pid, (parent, _) in parents.items() if parent in found} - found:
        found |= more
    return found


class Node:
    """One machine of a cluster, simulated on an address of the loopback device."""

    def __init__(self, *words: str, folder: Path) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
        environment = os.environ | {
            "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parent), "RAY_worker_niceness": "0",
            "HOME": str(folder),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [*command, "--object-store-memory=100000000"], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def kill(self) -> None:
        for pid in descendants(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2)], ids=["without room for it", "with room for it"])
def test_a_machine_that_is_lost_costs_seconds_and_no_bit(monkeypatch, cores, workers):
    """Its worker is placed on the machine that is left, or left out."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    host, port = get_node_ip_address(), free_port()  # Ray replaces the loopback address by this one
    nodes = [
        Node("--head", f"--port={port}", f"--node-ip-address={host}", f"--num-cpus={cores}",
             "--include-dashboard=false", f"--temp-dir={folder}", folder=folder)
    ]  # fmt: skip
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not answers(host, port):
            time.sleep(0.2)
        time.sleep(4)
        nodes.append(Node(f"--address={host}:{port}", "--node-ip-address=127.0.0.2", "--num-cpus=1", folder=folder))
        time.sleep(10)
        dist = DistConfig(num_workers=2, snapshot_every=2, address=f"{host}:{port}", placement="spread")
        lines: list[str] = []
        options = {"device": torch.device("cpu"), "log": lines.append}
        with open_executor(toy.make_program, toy.models(), dist, **options) as executor:
            first = toy.drive(executor, 3)
            nodes[1].kill()
            begun = time.monotonic()
            second = toy.drive(executor, 3)
            assert time.monotonic() - begun < 75
            assert len(executor._members.workers) == workers
            assert lines
        local = LocalExecutor(toy.make_program(), toy.models(), torch.device("cpu"))
        for found in (first, second):
            seen, state = toy.drive(local, 3)
            assert found[0] == seen
            assert all(torch.equal(found[1][name], state[name]) for name in state)
    finally:
        for node in reversed(nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)
