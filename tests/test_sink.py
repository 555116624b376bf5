"""--log.sink: every line of metrics goes to the user's function; what it does wrong is told once and ends nothing."""

import contextlib
import math

import pytest

from rlhf.errors import UserError
from rlhf.io.run_log import RunLog
from rlhf.monitor.log import LogReader
from rlhf.train.sink import open_sink


def written(tmp_path, code: str, steps: int = 3):
    """Log some steps through a sink made of `code`."""
    (tmp_path / "feed.py").write_text(code)
    sink = open_sink(f"{tmp_path}/feed.py:feed")
    with contextlib.closing(RunLog(tmp_path / "logs", "ppo", tensorboard=False, sink=sink)) as log:
        log.event("start")
        for step in range(1, steps + 1):
            log.metrics(step, {"x": step / 7, "bad": math.nan})
    reader = LogReader(tmp_path / "logs")
    reader.poll()
    return reader


def test_it_gets_every_line(tmp_path):
    got = tmp_path / "got"
    code = f"def feed(*line):\n    with open({str(got)!r}, 'a') as file:\n        print(line, file=file)\n"
    written(tmp_path, code)
    expected = [f"('ppo', {step}, {{'x': {step / 7}, 'bad': nan}})" for step in (1, 2, 3)]
    assert got.read_text().splitlines() == expected


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(3)", "metrics.clear(); 1 / 0"])
def test_what_it_raises_is_told_once_and_the_log_goes_on(tmp_path, caplog, code):
    caplog.set_level("INFO", "rlhf")
    reader = written(tmp_path, f"def feed(stage, step, metrics):\n    {code}\n")
    assert reader.series("ppo", "x").values.tolist() == [1 / 7, 2 / 7, 3 / 7]
    (message,) = caplog.messages
    assert message.startswith("--log.sink ")
    assert " raised " in message
    assert message.endswith(" at ppo 1; continuing")


def test_it_can_be_stopped_by_ctrl_c(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, "def feed(stage, step, metrics):\n    raise KeyboardInterrupt\n")


@pytest.mark.parametrize("target", ["absent_module:feed", "feed", "os:absent", ":", "math:pi"])
def test_what_is_no_function_is_refused(target):
    with pytest.raises(UserError, match=r"^--log\.sink "):
        open_sink(target)


def test_none_is_none():
    assert open_sink(None) is None
