"""What is checked on the machine of a process before it works, with fakes in place of other machines."""

import pickle
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from rlhf.config import DistConfig
from rlhf.distributed import cluster, ray_process
from rlhf.distributed.cluster import Member
from rlhf.distributed.machine_check import check_machine, describe_processor
from rlhf.distributed.members import Members
from rlhf.distributed.messages import pickle_by_value
from rlhf.distributed.ray_calls import LostError, RayLostError
from rlhf.distributed.ray_process import LoadReport, find_differences, find_obstacle, software_versions
from rlhf.errors import UserError
from rlhf.execution import compiled
from rlhf.execution.program import Program
from rlhf.io.user_functions import load_function


def elsewhere(pickled, what):
    """What an expression of `found`, the unpickled value, gives in a process that has no rlhf and no file of a user."""
    code = (
        f"import pickle, sys; sys.modules['rlhf'] = None\nfound = pickle.loads(sys.stdin.buffer.read())\nprint({what})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=pickled, capture_output=True, check=True, cwd="/", timeout=120)
    return done.stdout.decode().strip()


def test_the_actor_checks_a_machine_that_has_no_rlhf():
    """So it must refer to nothing of rlhf, or the machine could not even say so."""
    cluster._actor_class()
    pickled = cloudpickle.dumps(ray_process.Process)
    here = software_versions()
    loaded = f"found().load({here!r}, ('127.0.0.1', 1), b'', None).problem"
    assert elsewhere(pickled, loaded).startswith(f"it has rlhf none instead of {here['rlhf']}; install")
    assert int(elsewhere(pickled, "found().ping()")) > 0


def test_equal_software_has_no_difference_and_each_other_one_is_named():
    here = software_versions()
    assert find_differences(here, software_versions()) == ""
    other = here | {"torch": "1.0", "numpy": "none"}
    assert find_differences(here, other) == (
        f"it has torch 1.0 instead of {here['torch']}, numpy none instead of {here['numpy']}; "
        f"install what the driver has, for {sys.executable}, with which `ray start` was run there"
    )


def test_the_build_of_a_package_is_no_difference(monkeypatch):
    monkeypatch.setattr(ray_process.importlib.metadata, "version", lambda name: "2.13.0+cu128")
    assert software_versions()["torch"] == "2.13.0"


def test_every_change_of_the_code_of_rlhf_is_a_difference(monkeypatch, tmp_path):
    origin = tmp_path / "__init__.py"
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "kl.py").write_text("a = 1\n")
    origin.write_text("")
    monkeypatch.setattr(ray_process.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(origin)))
    first = software_versions()["rlhf"]
    assert first == software_versions()["rlhf"]
    (tmp_path / "inner" / "kl.py").write_text("a = 2\n")
    second = software_versions()["rlhf"]
    (tmp_path / "inner" / "kl.py").rename(tmp_path / "inner" / "km.py")
    assert len({first, second, software_versions()["rlhf"]}) == 3
    monkeypatch.setattr(ray_process.importlib.util, "find_spec", lambda name: None)
    assert software_versions()["rlhf"] == "none"


def test_a_driver_that_does_not_answer_is_an_obstacle():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert find_obstacle("127.0.0.1", port) == ""
    assert find_obstacle("127.0.0.1", port).startswith(f"it cannot connect to the driver at 127.0.0.1:{port} (")
    assert find_obstacle("127.0.0.1", port).endswith("open all TCP ports between the machines")


def test_functions_of_users_files_are_sent_with_the_modules_of_their_folder(tmp_path):
    """A loss in a file, a module beside it and a package beside it: the other process has none of them."""
    (tmp_path / "sent_package").mkdir()
    (tmp_path / "sent_package" / "__init__.py").write_text("from sent_package.inner import three\n")
    (tmp_path / "sent_package" / "inner.py").write_text("def three():\n    return 3\n")
    (tmp_path / "sent_module.py").write_text("FACTOR = 5\n\n\ndef scale(x):\n    return FACTOR * x\n")
    (tmp_path / "sent_file.py").write_text(
        "import math\nfrom sent_module import scale\nfrom sent_package import three\n\n\n"
        "def loss(x):\n    return scale(x) + three() + math.floor(0.5)\n"
    )
    loss = load_function(f"{tmp_path}/sent_file.py:loss", "--ppo.loss")
    assert elsewhere(pickle_by_value(loss), "found(2)") == "13"


def test_what_cannot_be_sent_is_refused(tmp_path):
    (tmp_path / "locked.py").write_text(
        "import threading\nLOCK = threading.Lock()\n\n\ndef loss(x):\n    with LOCK:\n        return x\n"
    )
    loss = load_function(f"{tmp_path}/locked.py:loss", "--ppo.loss")
    with pytest.raises(UserError, match=r"cannot be sent to the workers: .*lock"):
        pickle_by_value(loss)


def test_functions_of_rlhf_are_sent_by_name():
    assert pickle.loads(pickle_by_value(check_machine)) is check_machine


def test_a_machine_without_gpu_compiler_or_place_for_code_is_refused(monkeypatch, tmp_path):
    program = Program({}, {}, {})
    check_machine("cpu", program)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="finds no NVIDIA GPU there"):
        check_machine("cuda", program)
    check_machine("cpu", program._replace(compile_to=tmp_path / "code"))
    assert not (tmp_path / "code").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache-dir"):
        check_machine("cpu", program._replace(compile_to=tmp_path / "file" / "code"))
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"no C\+\+ compiler is on the PATH there"):
        check_machine("cpu", program._replace(compile_to=tmp_path / "code"))


class FakeCluster:
    """Three workers, whose answers to `load` are given, in a cluster that kills on demand."""

    device, host, store = "cpu", "10.0.0.1", SimpleNamespace(port=1)

    def __init__(self, answers, joined=lambda: {}):
        self.dist = DistConfig(num_workers=len(answers), address="auto")
        self.answers, self.killed, self.joined = answers, [], joined

    def start(self, name, bundle, *arguments):
        return Member(actor=None, name=name, bundle=bundle, loaded=name)

    def call(self, calls):
        return {(method, member.name): member for member, method, *_ in calls}

    def results(self, calls, *, together):
        assert together
        if any(isinstance(call, tuple) for call in calls):
            self.joined()
        return [(call, self.answers.get(call)) for call in calls]

    def kill(self, members):
        self.killed += [member.name for member in members]


def members(answers, **options):
    fake, lines = FakeCluster(answers, **options), []
    return Members(fake, (), lines.append), fake, lines


HERE = describe_processor("cpu")
GOOD = {f"worker {number}": LoadReport(f"10.0.0.{number}", "", HERE) for number in range(3)}


def test_a_run_does_not_begin_on_a_machine_that_cannot_run_it():
    several, _, _ = members(
        GOOD | {f"worker {number}": LoadReport(f"10.0.0.{number}", "it has no torch", "") for number in (0, 2)}
    )
    with pytest.raises(UserError) as caught:
        several.join()
    assert str(caught.value) == ("--dist.address auto: worker 0 on 10.0.0.0 and worker 2 on 10.0.0.2: it has no torch")


def test_a_replacement_on_a_machine_that_cannot_run_it_is_left_out():
    several, fake, lines = members(dict(GOOD))
    several.join()
    assert lines == []
    fake.answers["worker 1"] = LoadReport("10.0.0.9", "it has no torch", "")
    several.join()
    assert [member.name for member in several.workers] == ["worker 0", "worker 2"]
    assert lines == ["worker 1 on 10.0.0.9: it has no torch; continuing without"]
    assert fake.killed == ["worker 1"]
    fake.answers |= dict.fromkeys(("worker 0", "worker 2"), LoadReport("10.0.0.9", "it has no torch", ""))
    with pytest.raises(RayLostError, match="no machine is left"):
        several.join()


def test_machines_that_do_not_reach_each_other_end_the_run_at_its_beginning_alone():
    def fail():
        raise LostError("a collective failed")

    several, _, _ = members(dict(GOOD), joined=fail)
    with pytest.raises(UserError, match=r"on 10.0.0.0 and 10.0.0.1 and 10.0.0.2 could not connect to each other; open"):
        several.join()
    with pytest.raises(LostError):
        several.join()


def test_different_processors_are_reported_once():
    several, _, lines = members(GOOD | {"worker 2": LoadReport("10.0.0.2", "", "Other, torch 2")})
    several.join()
    several.join()
    (line,) = lines
    assert line.startswith("the bits of results depend on which processor computes what, and there are several: ")
    assert "Other, torch 2 (10.0.0.2)" in line
    assert f"{HERE} (this process)" in line
