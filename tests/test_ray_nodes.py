"""Runs on clusters of several machines, which share the software and nothing else: no folder, no port, no host name."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machines
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not machines.can_simulate(), reason="needs root and namespaces of Linux"),
]

ROOT = Path(__file__).parents[1]
TRAIN = Path(sys.executable).with_name("rlhf-train")
PORT = 6379
PIPELINE = shlex.split("""
    pipeline --model.preset tiny --compile off --log.no-tensorboard --threads 1 --cache-dir /mnt/cache
    --sft-data /mnt/sft.json --sft.max-steps 6 --sft.batch-size 16 --sft.micro-batch-size 2 --sft.eval-every 1000
    --reward.max-steps 3 --reward.batch-size 8 --reward.micro-batch-size 2 --reward.eval-every 1000
    --prompt-data /mnt/prompts.json --ppo.num-iterations 2 --ppo.batch-size 8 --ppo.rollout-batch-size 4
    --ppo.minibatch-size 4 --ppo.micro-batch-size 1 --ppo.max-new-tokens 8
    --ppo.loss my_loss.py:loss --ppo.reward my_reward.py:score
""")
SFT = shlex.split("""
    sft --model.preset tiny --compile off --log.no-tensorboard --threads 1 --cache-dir /mnt/cache --sft-data sft.json
    --sft.max-steps 150 --sft.micro-batch-size 1 --sft.epochs 1000 --sft.eval-every 100000
""")
FILES = {
    "my_reward.py": "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n",
    "my_loss.py": """
import torch
from my_terms import term
from rlhf.losses import weighted_sum

def loss(log_probs, *, old_log_probs, advantages, mask, weights=None, **not_read):
    ratio = torch.where(mask, log_probs - old_log_probs, 0.0).exp()
    total = weighted_sum("loss", -term(ratio, torch.where(mask, advantages, 0.0)), mask, weights)
    return total, {"loss/policy_avg_sum": total.detach(), "count": mask.sum()}
""",
    "my_terms.py": "def term(ratio, advantages):\n    return ratio * advantages\n",
    "sft.json": json.dumps([{"prompt": f"{n} and", "completion": f" {n + 1}, so {n}."} for n in range(120)]),
    "prompts.json": json.dumps([{"prompt": f"{n} or"} for n in range(40)]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder /mnt of the driver's machine."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def start(make, files, *cores):
    """The machines of a cluster, with so many cores. The first is the driver's."""
    first, *others = found = [make(files if number == 0 else None) for number in range(len(cores))]
    first.start_ray("--head", f"--port={PORT}", "--include-dashboard=false", cores=cores[0])
    for machine, count in zip(others, cores[1:], strict=True):
        machine.start_ray(f"--address={first.address}:{PORT}", cores=count)
    return found


@pytest.fixture(scope="module")
def cluster(files):
    """Three machines of one core each."""
    with machines.network() as make:
        yield start(make, files, 1, 1, 1)


def on_workers(count, folder, *more):
    flags = ["--dist.num-workers", count, "--dist.address", "auto", "--dist.placement", "spread"]
    return [*flags, "--output-dir", folder, *more]


def digests(folder):
    """Digests of all models of a run."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*/*.safetensors")
    }
    assert found
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_the_bytes_are_those_of_no_workers_and_only_the_driver_has_files(cluster, files, count):
    """Data, models, losses and rewards are on the driver's machine alone; the others write nothing."""
    driver, *others = cluster
    if not (files / "none").exists():
        driver.run(TRAIN, *PIPELINE, "--output-dir", "/mnt/none")
    done = driver.run(TRAIN, *PIPELINE, *on_workers(count, f"/mnt/on-{count}"), timeout=900)
    assert digests(files / f"on-{count}") == digests(files / "none")
    assert "WARNING" not in done.stderr
    assert "[W" not in done.stderr, "no message of another library"
    assert "lost" not in done.stderr
    for machine in others:
        assert machine.run("find", "/mnt", "/tmp/home", "-type", "f").stdout == ""


@pytest.mark.parametrize("on_failure", ["replace", "shrink"])
def test_a_machine_that_is_lost_changes_no_byte(tmp_path, files, on_failure):
    """Its network and its processes are gone at once. The head has no core, and a third machine is free."""
    for name in FILES:
        shutil.copy(files / name, tmp_path)
    with machines.network() as make:
        driver, *others = start(make, tmp_path, 0, 1, 1, 1)
        driver.run(TRAIN, *SFT, "--output-dir", "none")
        command = driver.command(TRAIN, *SFT, *on_workers(2, "run"), "--dist.on-failure", on_failure)
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            log, end = tmp_path / "run" / "logs" / "metrics.jsonl", time.monotonic() + 300
            while not (log.exists() and log.read_text().count('"step"') > 12):
                assert run.poll() is None, run.communicate()
                assert time.monotonic() < end
                time.sleep(0.2)
            victim = next(machine for machine in others if machine.processes("ray::Process"))
            victim.kill()
            err = run.communicate(timeout=400)[1]
        finally:
            run.kill()
        assert run.returncode == 0, err
        assert "lost worker" in err
        assert "Traceback" not in err
        assert "no machine has room" not in err, "the third one has"
        assert digests(tmp_path / "run") == digests(tmp_path / "none")


def refusal(machine, *words, **environment):
    """The error of a program that is refused, without output of another library."""
    done = machine.run(TRAIN, *SFT, *on_workers(*words), check=False, **environment)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: --dist.address auto")
    assert "Traceback" not in done.stderr
    assert "[W" not in done.stderr
    return lines[-1]


OTHER = {
    "torch 1.0 instead of": "D=torch-1.dist-info; mkdir $D; printf 'Name: torch\\nVersion: 1.0\\n' > $D/METADATA",
    "rlhf code ": f"cp -r {ROOT}/rlhf .; echo '# changed' >> rlhf/kl.py",
    "rlhf none instead of code ": "echo 'import sys; sys.path[:] = [path for path in sys.path if path != "
    f'"{ROOT}"]\' > sitecustomize.py',
}
"""Beginning of the difference, and the command that makes it on a machine."""


@pytest.mark.parametrize("difference", OTHER)
def test_a_machine_with_other_software_is_named_with_the_remedy(cluster, files, difference):
    first, second, _ = cluster
    second.stop_ray()
    second.run("sh", "-c", f"rm -rf /tmp/other; mkdir /tmp/other; cd /tmp/other; {OTHER[difference]}")
    try:
        second.start_ray(f"--address={first.address}:{PORT}", PYTHONPATH="/tmp/other")
        error = refusal(first, 3, f"/mnt/{difference.split()[1]}")
        assert f"on {second.address}: it has {difference}" in error
        assert f"install what the driver has, for {sys.executable}" in error
    finally:
        second.stop_ray()
        second.start_ray(f"--address={first.address}:{PORT}")


def test_machines_that_do_not_reach_each_other_are_told(cluster):
    _, second, third = cluster
    second.run("ip", "route", "add", "blackhole", f"{third.address}/32")
    try:
        error = refusal(cluster[0], 3, "/mnt/apart", "--dist.timeout-s", 10)
    finally:
        second.run("ip", "route", "delete", "blackhole", f"{third.address}/32")
    assert "could not connect to each other; open all TCP ports between the machines" in error


def test_a_function_that_another_machine_cannot_import_is_named(cluster, files):
    """The loss of a `ParameterServer` is in a module, which is found by name."""
    (files / "my_module.py").write_text(
        "import torch\n\n\ndef loss(params, batch):\n"
        "    return (params['w'] * batch).sum(), {'count': torch.tensor(len(batch))}\n"
    )
    (files / "program.py").write_text(
        "import sys\nimport my_module, torch\nfrom rlhf import ParameterServer, adamw, constant_schedule\n"
        "from rlhf.config import DistConfig\nfrom rlhf.cli.command import run_command\n\n\ndef main():\n"
        "    dist = DistConfig(num_workers=3, address='auto', placement='spread')\n"
        "    ParameterServer(my_module.loss, {'w': torch.zeros(3)}, adamw(constant_schedule(0.1)), dist)\n\n\n"
        "sys.exit(run_command(main))\n"
    )
    first, second, third = cluster
    done = first.run(sys.executable, "/mnt/program.py", check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot import a function of the program (No module named 'my_module')" in done.stderr
    assert "install its module there" in done.stderr
    assert f"on {second.address}" in done.stderr
    assert f"on {third.address}" in done.stderr
    assert f"on {first.address}" not in done.stderr, "where Ray adds the folder of the program to the path"


def test_a_program_outside_the_cluster_is_told_to_join_it(cluster):
    _, second, _ = cluster
    second.stop_ray()
    try:
        where = f"{cluster[0].address}:{PORT}"
        done = second.run(TRAIN, "sft", "--dist.num-workers", 1, "--dist.address", where, check=False)
    finally:
        second.start_ray(f"--address={where}")
    assert done.returncode == 2
    assert f"this machine is not part of the cluster; run `ray start --address={where}` here first" in done.stderr


DIES = """
import os, signal, sys, time
import ray
from rlhf.cli.command import run_command
from rlhf.config import DistConfig
from rlhf.distributed import connected

connect = ray.init


def kill_and_connect(**options):
    os.kill(int(sys.argv[1]), signal.SIGKILL)
    return connect(**options)


def main():
    begun = time.monotonic()
    try:
        with connected(DistConfig(num_workers=1, address="auto")):
            pass
    finally:
        print(time.monotonic() - begun)


ray.init = kill_and_connect
sys.exit(run_command(main))
"""


def test_a_cluster_that_dies_is_told_within_seconds(files):
    """Its GCS is killed while a program connects; the next program finds the address of the dead cluster."""
    with machines.network() as make:
        (driver,) = start(make, files, 1)
        (files / "dies.py").write_text(DIES)
        (gcs,) = driver.processes("gcs_server")
        done = driver.run(sys.executable, "dies.py", gcs, check=False)
        assert done.returncode == 2, done.stderr
        assert float(done.stdout) < 15
        assert "lost Ray (its GCS at" in done.stderr
        assert "while connecting; start it again" in done.stderr
        error = refusal(driver, 1, "dead")
        assert f"--dist.address auto ({driver.address}:{PORT}): no Ray cluster answers there" in error
