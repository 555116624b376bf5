"""rlhf-monitor as a program: what it does with its flags, and the exit codes that scripts see."""

import socket

import pytest
from rlhf.cli.monitor import main
from synthetic_logs import write_log


def test_report_goes_beside_the_log_or_where_it_is_asked_for(tmp_path, capsys):
    logs = write_log(tmp_path, count=3)
    assert main(["--log-dir", str(tmp_path), "--report"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "report.html")
    assert main(["--log-dir", str(logs), str(logs), "--report", "--output-dir", str(tmp_path / "b")]) == 0
    for folder in ("report", "b"):
        assert "<html" in (tmp_path / folder / "report.html").read_text()[:500]


def test_serving_on_a_port_in_use_is_refused(tmp_path, capsys):
    logs = write_log(tmp_path, count=3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--log-dir", str(logs), "--serve", "--port", str(port), "--no-open-browser"]) == 2
    assert f"{port}" in capsys.readouterr().err


def test_serving_names_the_folder_as_it_is(tmp_path, capsys, monkeypatch):
    def stop(server):
        raise KeyboardInterrupt

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", stop)
    logs = write_log(tmp_path / "run[1] [bold]", count=3)
    assert main(["--log-dir", str(logs), "--serve", "--port", "0", "--no-open-browser"]) == 0
    assert f"following {logs} at http://127.0.0.1:" in capsys.readouterr().err


def test_live_is_what_it_does_by_default(tmp_path, capsys):
    assert main(["--log-dir", str(write_log(tmp_path, count=3))]) == 0
    assert "ppo 3/3" in capsys.readouterr().out


@pytest.mark.parametrize("action", [["--live"], ["--serve"], ["--report"], ["--plot-type", "all"], ["--check"]])
def test_every_action_refuses_what_is_no_run(tmp_path, capsys, action):
    (tmp_path / "holiday.txt").write_text("")
    for folder, piece in ((tmp_path, "not a run's folder"), (tmp_path / "absent", "no such folder")):
        assert main(["--log-dir", str(folder), *action]) == 2
        told = capsys.readouterr().err
        assert piece in told
        assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--log-dir"], ["--unknown"], ["--plot-type", "none"]])
def test_flags_that_cannot_be_are_refused(tmp_path, capsys, arguments):
    base = [] if arguments == ["--log-dir"] else ["--log-dir", str(write_log(tmp_path, count=1))]
    try:
        code = main([*base, *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err
