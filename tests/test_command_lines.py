"""The first minute at the command line: versions, programs, typing errors, missing files, a narrow terminal."""

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rlhf.cli import programs, progress, train
from rlhf.cli.arguments import parse_arguments
from rlhf.cli.help import Help

import rlhf
from rlhf.config import PPORun, SFTRun
from rlhf.errors import UserError
from rlhf.stages import STAGES
from rlhf.train.observers import StageStart

ABOUT = Help(prog="x", description="", usage="", page="")
METRICS = {"objective/scores": 1.534, "objective/kl": 6.496, "response_length/mean": 22.23}


def test_rlhf_lists_the_programs(capsys):
    assert programs.main([]) == 0
    out = capsys.readouterr().out
    for name in ("rlhf-example", "rlhf-train", "rlhf-evaluate", "rlhf-generate", "rlhf-monitor", rlhf.__version__):
        assert name in out
    assert programs.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {rlhf.__version__}\n"
    assert programs.main(["train"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_python_m_rlhf_is_the_same():
    done = subprocess.run([sys.executable, "-m", "rlhf"], capture_output=True, text=True, check=True)
    assert "rlhf-train" in done.stdout


@pytest.mark.parametrize("argv", [["--version"], ["sft", "--version"]])
def test_every_program_says_its_version(argv, capsys):
    with pytest.raises(SystemExit) as exit_code:
        train.parse(argv)
    assert exit_code.value.code == 0
    assert capsys.readouterr().out == f"rlhf-train {rlhf.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("pp", "ppo"), ("rewrd", "reward"), ("pipline", "pipeline")])
def test_the_nearest_command_is_named(typed, meant):
    with pytest.raises(UserError, match=f"rlhf-train {typed}: no such command; did you mean {meant}"):
        train.parse([typed])


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--ppo.lr", "--ppo.learning-rate"),
        ("--ppo.lr=1e-5", "--ppo.learning-rate"),
        ("--dist.workers", "--dist.num-workers"),
        ("--ppo.kl", "--ppo.kl-coef"),
    ],
)
def test_a_flag_by_its_other_name_is_told_its_own(flag, name):
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]}: is called {name} here"):
        parse_arguments(PPORun, [flag, "1e-5"], about=ABOUT)
    assert parse_arguments(PPORun, [name, "3"], about=ABOUT) != PPORun()


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("train", ["sft", "--sft-data", "absent.json"], "absent.json: no such file (--sft-data)"),
        ("train", ["sft", "--sft-data", "here.json", "absent.json"], "absent.json: no such file (--sft-data)"),
        ("train", ["sft", "--sft.model-path", "absent"], "absent: no such folder (--sft.model-path); it should be a"),
        ("evaluate", ["--model-dir", "absent"], "absent: no such folder; give a run's output folder"),
        ("evaluate", ["--model-dir", ".", "--test-data", "absent.json"], "absent.json: no such file (--test-data)"),
        ("generate", ["--model-dir", "absent"], "absent: no such folder (--model-dir); it should be a model folder"),
        ("generate", ["--model-dir", ".", "--prompt-file", "absent.json"], "absent.json: no such file (--prompt-file)"),
    ],
)
def test_a_missing_input_is_told_before_torch_is_imported(tmp_path, program, argv, message):
    (tmp_path / "here.json").write_text("[]")
    code = (
        f"import sys\nfrom rlhf.cli.{program} import main\ncode = main({argv!r})\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ppo.num-iterations", "ten"], "--ppo.num-iterations ten: num_iterations must be a whole number, got 'ten'"),
        (["--ppo.num-iterations", "1.5"], "num_iterations must be a whole number, got '1.5'"),
        (["--ppo.learning-rate=fast"], "--ppo.learning-rate fast: learning_rate must be a number or None, got 'fast'"),
        (["--threads", "all"], "threads must be a whole number or None, got 'all'"),
    ],
)
def test_a_word_in_place_of_a_number_is_named_with_its_flag(argv, message):
    with pytest.raises(UserError, match=f"{message}$"):
        parse_arguments(PPORun, argv, about=ABOUT)


def test_numbers_and_none_are_read_as_they_are():
    config = parse_arguments(PPORun, ["--ppo.learning-rate", "1e-5", "--threads", "None"], about=ABOUT)
    assert (config.ppo.learning_rate, config.threads) == (1e-5, None)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_progress_bar_shows_bar_count_and_time_in_a_narrow_terminal(monkeypatch, width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    shown = progress.StageProgress()
    shown.on_start(StageStart(STAGES["ppo"], SFTRun(), 0, 100, ()))
    shown.on_step(15, METRICS)
    shown.on_end(None)
    line = next(line for line in screen.getvalue().replace("\r", "\n").splitlines() if "15/100" in line)
    assert "━" in line
    assert line.count(":") >= 4, "time elapsed and time remaining"
    if width >= 80:
        assert "score 1.534" in line


def test_the_end_of_a_run_names_the_next_commands():
    text = train._next_commands(SFTRun(), ["sft"])
    for command in ("rlhf-evaluate --model-dir outputs", "rlhf-generate --model-dir outputs/sft", "rlhf-train reward"):
        assert command in text
    assert "outputs/policy" in train._next_commands(SFTRun(), ["sft", "reward", "ppo"])
