"""Every program that writes, and whatever may stand where it writes: nothing of a user's is lost."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rlhf.cli import evaluate as evaluate_program
from rlhf.cli import generate as generate_program
from rlhf.cli import monitor as monitor_program
from rlhf.cli import train as train_program
from rlhf.cli.arguments import flag_types, join_flags
from rlhf.cli.example import Example
from rlhf.cli.example import main as run_example

from rlhf import random
from rlhf.config import PipelineRun, PPORun, RewardRun, SFTRun
from rlhf.errors import UserError
from rlhf.evaluate.evaluate_config import EvaluateConfig
from rlhf.generate.generate_config import GenerateConfig
from rlhf.io.files import write_bytes
from rlhf.io.model_folder import LanguageModel, save_language_model
from rlhf.io.output import check_output, write_output
from rlhf.io.run_log import RunLog
from rlhf.models import gpt2
from tests.conftest import TINY

MINE = b"# the user's own\n"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tokenizer) -> Path:
    """A model, data and logs, which the programs read."""
    folder = tmp_path_factory.mktemp("shelf")
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    save_language_model(
        folder / "model", LanguageModel(gpt2.init(shape, key=random.key(1)), shape, tokenizer), facts={}
    )
    (folder / "sft.json").write_text(json.dumps([{"prompt": "the", "completion": f" fox {n}"} for n in range(8)]))
    with contextlib.closing(RunLog(folder / "logs", "sft", tensorboard=False)) as log:
        log.event("start", format=1, step=0, total=3, unit="step", notes=[])
        for step in range(1, 4):
            log.metrics(step, {"loss/sft": 1.0 / step})
    return folder


def generate(shelf: Path, folder: Path, *words: str) -> int:
    model = ["--model-dir", str(shelf / "model"), "--prompt", "the", "--max-new-tokens", "1", "--threads", "1"]
    return generate_program.main([*model, "--output", str(folder / "out.jsonl"), *words])


def evaluate(shelf: Path, folder: Path, *words: str) -> int:
    model = ["--model-dir", str(shelf / "model"), "--eval-type", "sft", "--test-data", str(shelf / "sft.json")]
    model += ["--threads", "1", "--cache-dir", str(shelf / "cache")]
    return evaluate_program.main([*model, "--output", str(folder), *words])


def report(shelf: Path, folder: Path, *words: str) -> int:
    return monitor_program.main(["--log-dir", str(shelf / "logs"), "--report", "--output-dir", str(folder), *words])


def plot(shelf: Path, folder: Path, *words: str) -> int:
    command = ["--log-dir", str(shelf / "logs"), "--plot-type", "loss", "--output-dir", str(folder)]
    return monitor_program.main([*command, *words])


PROGRAMS = {
    "generate": (generate, "out.jsonl"),
    "evaluate": (evaluate, "evaluation.json"),
    "report": (report, "report.html"),
    "plot": (plot, "sft_loss.png"),
}


@pytest.fixture(params=PROGRAMS)
def program(request):
    return PROGRAMS[request.param]


def test_a_file_of_the_users_is_replaced_only_with_overwrite(tmp_path, shelf, program, capsys):
    write, name = program
    path = tmp_path / name
    assert write(shelf, tmp_path) == 0
    assert write(shelf, tmp_path) == 0  # our own
    path.write_bytes(MINE)
    assert write(shelf, tmp_path) == 2
    assert f"{name}: already exists, and is not what rlhf wrote there" in (error := capsys.readouterr().err)
    assert "add --overwrite" in error
    assert path.read_bytes() == MINE
    assert write(shelf, tmp_path, "--overwrite") == 0
    assert path.read_bytes() != MINE


@pytest.mark.parametrize("target", [None, MINE])
def test_links_are_written_through(tmp_path, shelf, program, target):
    write, name = program
    (tmp_path / "elsewhere").mkdir()
    path, aim = tmp_path / name, tmp_path / "elsewhere" / "target"
    path.symlink_to("elsewhere/target")
    if target is not None:
        aim.write_bytes(target)
        assert write(shelf, tmp_path) == 2
        assert aim.read_bytes() == target
    assert write(shelf, tmp_path, "--overwrite") == 0
    assert path.is_symlink()
    assert aim.stat().st_size > 50


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_stay(tmp_path, shelf, program, kind):
    write, name = program
    path, received = tmp_path / name, []
    reader = threading.Timer(0.2, lambda: received.append(path.read_bytes()))  # not there yet when it is written to
    if kind == "pipe":
        os.mkfifo(path)
        reader.start()
    else:
        make_node(path, stat.S_IFCHR, (1, 3))
    before = path.stat().st_mode
    assert write(shelf, tmp_path) == 0
    assert path.stat().st_mode == before
    if kind == "pipe":
        reader.join(timeout=10)
        assert len(received[0]) > 50


@pytest.mark.parametrize("kind", ["folder", "loop", "disk", "socket"])
def test_what_is_no_file_is_refused(tmp_path, shelf, program, kind, capsys):
    write, name = program
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "socket":
        make_node(path, stat.S_IFSOCK, (0, 0))
    else:
        make_node(path, stat.S_IFBLK, (7, 200))
    before = identity_of(path)
    assert write(shelf, tmp_path, "--overwrite") == 2
    assert f"is a {kind}" in (error := capsys.readouterr().err) or (kind == "loop" and "leads to itself" in error)
    assert identity_of(path) == before


def identity_of(path: Path) -> tuple[int, int, int]:
    """All but the time of the last access."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_mtime_ns


def make_node(path: Path, kind: int, numbers: tuple[int, int]) -> None:
    try:
        os.mknod(path, 0o666 | kind, os.makedev(*numbers))
    except PermissionError:
        pytest.skip("only root makes devices")


def test_a_pipe_takes_more_than_it_holds(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    write_output(path, "x" * 300_000)
    reader.join(timeout=10)
    assert received == [b"x" * 300_000]


@contextlib.contextmanager
def descriptor(number: int, path: Path, flags: int) -> Iterator[None]:
    """One of this process's descriptors on a file, as the shell redirects it."""
    saved, opened = os.dup(number), os.open(path, flags)
    os.dup2(opened, number)
    os.close(opened)
    try:
        yield
    finally:
        os.dup2(saved, number)
        os.close(saved)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_that_appends_to_a_file_keeps_what_the_file_has(tmp_path, name):
    log = tmp_path / "log"
    log.write_bytes(MINE)
    with descriptor(1, log, os.O_WRONLY | os.O_APPEND):
        check_output(Path(name), "--output")
        write_output(Path(name), "one\n", "--output")
        os.write(1, b"two\n")
    assert log.read_bytes() == MINE + b"one\ntwo\n"


def test_standard_input_is_an_input(tmp_path):
    path = tmp_path / "prompts"
    path.write_bytes(MINE)
    with (
        descriptor(0, path, os.O_RDONLY),
        pytest.raises(UserError, match=r"--output .*prompts: is read by this command too"),
    ):
        check_output(path, "--output", overwrite=True)


def test_a_name_that_leaves_no_room_for_a_temporary_one_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="File name too long"):
        check_output(tmp_path / ("x" * 250), "--output")
    assert not list(tmp_path.iterdir())


def test_bytes_are_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_bytes(tmp_path / "link", MINE)
    assert (tmp_path / "target").read_bytes() == MINE


TRAINING = ["--model.n-layer", "1", "--model.n-embd", "8", "--model.n-head", "1", "--model.n-positions", "16"]
TRAINING += ["--tokenizer.vocab-size", "260", "--sft.max-steps", "1", "--threads", "1", "--log.no-tensorboard"]


def train(shelf: Path, folder: Path, *words: str) -> int:
    data = ["--sft-data", str(shelf / "sft.json"), "--cache-dir", str(shelf / "cache")]
    return train_program.main(["sft", *data, *TRAINING, "--output-dir", str(folder), *words])


RUN_PLACES = (
    "config.yaml", "logs/metrics.jsonl", "logs/samples.jsonl", "sft", "sft/notes.txt", ".lock",
    "checkpoints/sft/step-000001", "checkpoints/sft/step-000001/notes.txt",
)  # fmt: skip


@pytest.mark.parametrize("place", RUN_PLACES)
def test_training_leaves_alone_what_is_not_of_a_run(tmp_path, shelf, place, capsys):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(MINE)
    assert train(shelf, tmp_path / "out") == 2
    assert re.search(rf"out/{place.removesuffix('/notes.txt')}: (is|already exists)", capsys.readouterr().err)
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [path]
    assert path.read_bytes() == MINE


@pytest.mark.parametrize("place", ["logs/metrics.jsonl", "logs/samples.jsonl", "config.yaml", ".lock", "sft"])
def test_pipes_in_a_run_folder_are_refused_before_the_work(tmp_path, shelf, place, capsys):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert train(shelf, tmp_path / "out") == 2
    assert re.search(rf"out/{place}: (is|already exists)", capsys.readouterr().err)
    assert path.is_fifo()
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("place", ["sft", "config.yaml", "logs/metrics.jsonl", "logs", "checkpoints"])
def test_links_in_a_run_folder_are_followed_or_refused_before_the_work(tmp_path, shelf, place):
    path, target = tmp_path / "out" / place, tmp_path / "elsewhere"
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    if "." not in place and place != "sft":
        target.mkdir()
    exit_code = train(shelf, tmp_path / "out")
    assert path.is_symlink()
    if place == "sft":
        assert exit_code == 2
        assert not (tmp_path / "out" / "checkpoints").exists()
    else:
        assert exit_code == 0
        assert train(shelf, tmp_path / "out", "--resume") == 0
        assert path.is_symlink()
        assert target.stat().st_size > 0


@pytest.mark.parametrize("place", ["config.yaml", "policy", "logs/metrics.jsonl", "report/comparison.json"])
def test_the_example_writes_nothing_into_a_folder_that_holds_what_is_not_its_own(tmp_path, place, capsys):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(MINE)
    assert run_example(["--create-dummy-data", "--output-dir", str(tmp_path), "--workers", "0"]) == 2
    assert f"{path}: already exists" in capsys.readouterr().err
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_the_example_continues_an_interrupted_run(tmp_path):
    settings = tmp_path / "tiny.yaml"
    settings.write_text(
        "model: {preset: tiny}\ncompile: off\nsft: {max_steps: 1}\nreward: {max_steps: 1}\n"
        "ppo: {num_iterations: 2, batch_size: 4, minibatch_size: 4, max_new_tokens: 4}\ncheckpoint: {every: 1}\n"
    )
    flags = ["--config", str(settings), "--output-dir", str(tmp_path / "out"), "--workers", "0"]
    assert run_example(["--create-dummy-data", *flags]) == 0
    report = tmp_path / "out" / "report" / "comparison.json"
    finished = report.read_text()
    shutil.rmtree(tmp_path / "out" / "policy")
    report.unlink()
    assert run_example(["--resume", *flags]) == 0
    assert report.read_text() == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.yaml"], "no second folder"


def test_data_that_a_run_held_out_are_inputs_of_its_evaluation(tmp_path, shelf, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = Path("evaluation.json")
    data.write_bytes((shelf / "sft.json").read_bytes())
    assert train(shelf, Path("out"), "--sft-data", "evaluation.json", "--sft.val-fraction", "0.5") == 0
    command = ["--model-dir", "out", "--output", ".", "--overwrite", "--threads", "1", "--cache-dir", "cache"]
    assert evaluate_program.main(command) == 2
    assert "evaluation.json: is read by this command too" in capsys.readouterr().err
    assert data.read_bytes() == (shelf / "sft.json").read_bytes()


KINDS = (SFTRun, RewardRun, PPORun, PipelineRun, monitor_program.Monitor, Example, GenerateConfig, EvaluateConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_of_any_program_may_be_empty(kind):
    flags = [flag for flag, hint in flag_types(kind) if "Path" in str(hint)]
    assert flags
    for flag in flags:
        with pytest.raises(UserError, match=f"{flag}: is empty"):
            join_flags(kind, [f"{flag}="])
