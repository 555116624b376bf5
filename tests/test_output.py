"""What may be written over: every writer, on every kind of path; and disks that lack what a checkpoint asks for."""

import dataclasses
import errno
import fcntl
import functools
import json
import os
import stat
import threading
from pathlib import Path

import pytest
from rlhf.cli import evaluate as evaluate_program
from rlhf.cli import generate as generate_program
from rlhf.cli import train as train_program

from rlhf import random
from rlhf.errors import UserError
from rlhf.io import files
from rlhf.io.checkpoint import Checkpoint, save_checkpoint, save_refused
from rlhf.io.files import check_writable, lock_folder, save_tensors
from rlhf.io.manifest import check_replaceable, write_manifest
from rlhf.io.model_folder import LanguageModel, save_language_model
from rlhf.io.output import check_output, is_ours, remove_output, write_json, write_output
from rlhf.models import gpt2

OLD, NEW = b"the user's own\n", "what is written"


def test_a_file_that_we_wrote_is_replaced_and_nobody_elses(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    write_output(path, "first")
    write_output(path, "second")
    assert path.read_text() == "second"
    assert is_ours(path)
    path.write_bytes(OLD)
    assert not is_ours(path)
    with pytest.raises(UserError, match=r"out\.jsonl: already exists, and is not what rlhf wrote there; .*--overwrite"):
        write_output(path, NEW, "--output", overwrite=False)
    remove_output(path)
    assert path.read_bytes() == OLD
    write_output(path, NEW, "--output", overwrite=True)
    assert path.read_text() == NEW
    remove_output(path)
    assert not path.exists()


def test_a_file_is_ours_while_a_killed_process_has_not_replaced_it_yet(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write_output(path, "first")
    write = files.write_bytes

    def killed(target, content, *flag):
        if target == path:
            raise KeyboardInterrupt
        write(target, content, *flag)

    monkeypatch.setattr("rlhf.io.output.write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        write_output(path, "second")
    monkeypatch.undo()
    assert path.read_text() == "first"
    assert is_ours(path)
    write_output(path, "second")


def foreign(folder: Path) -> Path:
    path = folder / "out"
    path.write_bytes(OLD)
    return path


def linked(folder: Path) -> Path:
    write_output(folder / "target", "ours")
    (folder / "out").symlink_to("target")
    return folder / "out"


def linked_to_foreign(folder: Path) -> Path:
    (folder / "target").write_bytes(OLD)
    (folder / "out").symlink_to("target")
    return folder / "out"


def dangling(folder: Path) -> Path:
    (folder / "out").symlink_to("elsewhere")
    return folder / "out"


def device(folder: Path) -> Path:
    try:
        os.mknod(folder / "out", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    return folder / "out"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "out")
    return folder / "out"


def other_disk(folder: Path) -> Path:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == folder.stat().st_dev:
        pytest.skip("no second file system")
    (folder / "out").symlink_to(memory / f"rlhf-test-{os.getpid()}")
    return folder / "out"


WRITERS = {
    "text": lambda path: write_output(path, NEW, "--output"),
    "bytes": lambda path: write_output(path, NEW.encode(), "--output"),
    "JSON": lambda path: write_json(path, NEW, "--output"),
}


@pytest.mark.parametrize("place", [foreign, linked_to_foreign])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_not_ours_is_refused(tmp_path, place, write):
    path = place(tmp_path)
    with pytest.raises(UserError, match="already exists"):
        write(path)
    assert path.read_bytes() == OLD


@pytest.mark.parametrize("place", [linked, dangling, other_disk])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_links_are_followed_and_stay(tmp_path, place, write):
    path = place(tmp_path)
    try:
        write(path)
        write(path)
        assert path.is_symlink()
        assert NEW in Path(os.path.realpath(path)).read_text()
    finally:
        Path(os.path.realpath(path)).unlink()


def test_devices_and_pipes_are_written_to(tmp_path):
    for place in (device, pipe):
        folder = tmp_path / place.__name__
        folder.mkdir()
        path = place(folder)
        kind, received = path.stat().st_mode, []
        if place is pipe:
            read = functools.partial(lambda path, received: received.append(path.read_text()), path, received)
            reader = threading.Thread(target=read, daemon=True)
            reader.start()
        check_output(path, "--output")
        write_output(path, NEW, "--output")
        assert path.stat().st_mode == kind
        assert [file.name for file in folder.iterdir()] == ["out"]
        if place is pipe:
            reader.join(timeout=10)
            assert received == [NEW]


def test_a_pipe_that_nobody_reads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.io.output._PATIENCE_S", 0.0)
    with pytest.raises(UserError, match="is a pipe that no program reads"):
        write_output(pipe(tmp_path), NEW, "--output")


def test_an_input_is_never_an_output(tmp_path):
    path = tmp_path / "in"
    write_output(path, "ours")
    (tmp_path / "link").symlink_to("in")
    os.link(path, tmp_path / "hard")
    for name in ("in", "link", "hard", "../" + tmp_path.name + "/in"):
        with pytest.raises(UserError, match="is read by this command too"):
            check_output(tmp_path / name, "--output", inputs=[path], overwrite=True)


def test_a_folder_is_replaced_only_if_all_of_it_is_ours(tmp_path):
    folder = tmp_path / "model"
    check_replaceable(folder)
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    write_manifest(folder, {})
    check_replaceable(folder)
    (folder / "notes.txt").write_bytes(OLD)
    with pytest.raises(UserError, match=r"notes\.txt: is not part of what was saved"):
        check_replaceable(folder)
    (folder / "notes.txt").unlink()
    (folder / "weights").write_bytes(b"2")
    with pytest.raises(UserError, match="its content is not what was saved"):
        check_replaceable(folder)


def test_checkpoints_replace_and_remove_nothing_of_the_users(tmp_path):
    mine = tmp_path / "step-000001"
    mine.mkdir()
    (mine / "notes.txt").write_bytes(OLD)
    save_checkpoint(tmp_path, Checkpoint(2, {}, {}), keep=1)
    save_checkpoint(tmp_path, Checkpoint(3, {}, {}), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]
    for write in (
        lambda: save_checkpoint(tmp_path, Checkpoint(1, {}, {}), keep=1),
        lambda: save_refused(mine, None, None, {}),
    ):
        with pytest.raises(UserError, match="step-000001"):
            write()
    assert (mine / "notes.txt").read_bytes() == OLD


@pytest.fixture
def model(tmp_path, config, tokenizer) -> Path:
    shape = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    language_model = LanguageModel(gpt2.init(shape, key=random.key(1)), shape, tokenizer)
    save_language_model(tmp_path / "model", language_model, facts={})
    return tmp_path / "model"


def test_generate_writes_over_nothing_that_is_not_its_own(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the"}\n')
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(OLD)
    weights = (model / "model.safetensors").read_bytes()
    command = ["--model-dir", str(model), "--prompt-file", "prompts.jsonl", "--max-new-tokens", "2", "--threads", "1"]
    for output, message in {
        "prompts.jsonl": "is read by this command too",
        "model/model.safetensors": "is read by this command too",
        "mine.jsonl": "is not what rlhf wrote there",
        "": "--output: is empty",
    }.items():
        assert generate_program.main([*command, "--output", output]) == 2
        assert message in capsys.readouterr().err
    assert prompts.read_text() == '{"prompt": "the"}\n'
    assert mine.read_bytes() == OLD
    assert (model / "model.safetensors").read_bytes() == weights
    for extra in ([], ["--overwrite"]):
        assert generate_program.main([*command, "--output", "out.jsonl"]) == 0
        assert generate_program.main([*command, "--output", "out.jsonl", *extra]) == 0
    assert generate_program.main([*command, "--output", "mine.jsonl", "--overwrite"]) == 0
    assert json.loads(mine.read_text())["prompt"] == "the"


def test_evaluation_writes_over_nothing_that_is_not_its_own(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demonstrations = '{"prompt": "the", "completion": " fox"}\n'
    for name in ("completions.jsonl", "data.jsonl"):
        Path(name).write_text(demonstrations)
    Path("pairs.jsonl").write_bytes(OLD)
    command = ["--model-dir", "model", "--threads", "1", "--cache-dir", "cache", "--output", "."]
    command += ["--max-new-tokens", "2", "--test-data"]
    assert evaluate_program.main([*command, "completions.jsonl", "--eval-type", "policy"]) == 2
    assert "is read by this command too" in capsys.readouterr().err
    assert evaluate_program.main([*command, "data.jsonl", "--eval-type", "policy"]) == 2
    assert "completions.jsonl: already exists" in capsys.readouterr().err
    assert Path("completions.jsonl").read_text() == demonstrations
    for _ in range(2):
        assert evaluate_program.main([*command, "data.jsonl", "--eval-type", "sft"]) == 0
    assert Path("pairs.jsonl").read_bytes() == OLD
    assert Path("completions.jsonl").read_text() == demonstrations
    assert Path("evaluation.json").is_file()


TINY = ["--model.n-layer", "1", "--model.n-embd", "8", "--model.n-head", "1", "--model.n-positions", "16"]
TINY += ["--tokenizer.vocab-size", "260", "--sft.max-steps", "2", "--threads", "1", "--log.no-tensorboard"]


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"say {number}", "completion": f" {number}"} for number in range(8)]
    (tmp_path / "sft.json").write_text(json.dumps(records))
    return tmp_path


def sft(*words: str) -> int:
    return train_program.main(["sft", "--sft-data", "sft.json", "--cache-dir", "cache", *TINY, *words])


def test_training_leaves_a_users_config_alone(data, capsys):
    text = "# mine\nseed: 3\n"
    (data / "config.yaml").write_text(text)
    assert sft("--config", "config.yaml", "--output-dir", ".") == 2
    assert "no run of rlhf wrote it" in capsys.readouterr().err
    assert (data / "config.yaml").read_text() == text
    assert not (data / "checkpoints").exists()
    assert sft("--output-dir", "") == 2
    assert "--output-dir: is empty" in capsys.readouterr().err


def test_resuming_a_finished_stage_touches_nothing(data, capsys):
    assert sft("--output-dir", "out") == 0
    (data / "out" / "sft" / "notes.txt").write_bytes(OLD)
    config = data / "out" / "config.yaml"
    config.write_text("# a remark\n" + config.read_text())
    watched = [config, *(path for path in (data / "out" / "sft").rglob("*") if path.is_file())]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in watched}
    assert sft("--config", "out/config.yaml", "--output-dir", "out", "--resume") == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in watched} == before
    capsys.readouterr()
    (data / "out" / "sft" / "config.json").write_text("{}")
    assert sft("--output-dir", "out", "--resume") == 2
    assert "--resume then writes it again" in capsys.readouterr().err
    (data / "out" / "sft").rename(data / "aside")
    assert sft("--output-dir", "out", "--resume") == 0
    assert (data / "out" / "sft" / "model.safetensors").read_bytes() == (
        data / "aside" / "model.safetensors"
    ).read_bytes()


def test_a_changed_config_of_a_run_is_not_replaced(data, capsys):
    assert sft("--output-dir", "out") == 0
    config = data / "out" / "config.yaml"
    changed = config.read_text().replace("seed: 0", "seed: 5")
    config.write_text(changed)
    assert sft("--output-dir", "out", "--resume", "--log.every", "2") == 2
    assert "has been changed since a run wrote it" in capsys.readouterr().err
    assert config.read_text() == changed


EMPTY = {
    train_program: ["--output-dir", "--sft-data", "--sft.model-path", "--tokenizer.path", "--cache-dir", "--config"],
    generate_program: ["--output", "--model-dir", "--against", "--prompt-file"],
    evaluate_program: ["--output", "--model-dir", "--test-data", "--train-data", "--reward-model", "--dist-config"],
}


@pytest.mark.parametrize(("program", "flag"), [(program, flag) for program, flags in EMPTY.items() for flag in flags])
@pytest.mark.parametrize("joined", [False, True])
def test_an_empty_path_is_refused_by_its_flag(program, flag, joined, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"{flag}="] if joined else [flag, ""]
    assert program.main([*(["sft"] if program is train_program else []), *words]) == 2
    assert f"{flag}: is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def refuse(number: int):
    def call(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_disks_that_cannot_flush_a_folder_are_written_to(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    check_writable(tmp_path, "--output-dir")
    save_checkpoint(tmp_path / "run", Checkpoint(1, {}, {}), keep=1)
    write_output(tmp_path / "out", NEW)
    assert (tmp_path / "out").read_text() == NEW


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_disks_without_permissions_are_written_to(tmp_path, monkeypatch, number):
    monkeypatch.setattr(Path, "chmod", refuse(number))
    save_tensors(tmp_path / "tensors", {})
    assert (tmp_path / "tensors").is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_disks_without_locks_hold_one_run_too(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
        with pytest.raises(UserError, match="in use by a live run"), lock_folder(tmp_path / "run"):
            pass
    with lock_folder(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.EROFS, errno.ENOSPC])
def test_what_a_disk_cannot_do_is_found_before_the_work_and_told(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*choose another --output-dir"):
        check_writable(tmp_path, "--output-dir")
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_refused_before_the_work(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "out", "--output")
