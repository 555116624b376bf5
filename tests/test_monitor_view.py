"""What the page is told: thinned curves, names, samples found, the document, and the server's manners."""

import http.client
import json
import math
import shutil
import socket
import subprocess
import threading
import time
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_logs import write_log

from rlhf.errors import UserError
from rlhf.monitor.log import LogReader, Series
from rlhf.monitor.report import document, write_report
from rlhf.monitor.samples import Query, SampleIndex, report_samples
from rlhf.monitor.serve import make_server
from rlhf.monitor.view import run_names, run_state, stage_curves, thin

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=60)


def read(folder: Path) -> LogReader:
    reader = LogReader(folder)
    reader.poll()
    return reader


@given(values=VALUES, points=st.integers(1, 70))
def test_thinning_keeps_mean_lowest_and_highest(values, points):
    steps = np.arange(3, 3 + 2 * len(values), 2)
    curve = thin(Series(steps, np.array(values)), points)
    assert len(curve["steps"]) == len(curve["mean"]) <= points
    assert curve["last"] == steps[-1]
    assert steps[0] <= curve["steps"][0]
    assert curve["steps"][-1] <= steps[-1]
    known = [value for value in values if not math.isnan(value)]
    near = pytest.approx
    if "weight" not in curve:
        assert [math.nan if v is None else v for v in curve["mean"]] == near(values, rel=1e-5, nan_ok=True)
    elif known:
        for name, pick in (("low", min), ("high", max)):
            assert pick(v for v in curve[name] if v is not None) == near(pick(known), rel=1e-5)
        weight = curve["weight"]
        parts = [values[first : first + weight] for first in range(0, len(values), weight)]
        for part, mean in zip(parts, curve["mean"], strict=True):
            there = [v for v in part if not math.isnan(v)]
            assert (mean is None) == (not there)
            assert not there or mean == near(sum(there) / len(there), rel=1e-4, abs=1e-5 * max(map(abs, there)))


def test_curves_of_a_window_have_all_its_steps(tmp_path):
    reader = read(write_log(tmp_path, count=5000, samples=0))
    (whole,) = {len(curve["steps"]) for curve in stage_curves(reader, "ppo").values()}
    assert whole == 1000
    part = stage_curves(reader, "ppo", first=100, last=600)["objective/kl"]
    series = reader.series("ppo", "objective/kl")
    assert part["steps"] == list(range(100, 601))
    assert part["mean"] == pytest.approx(series.values[99:600].tolist(), rel=1e-5)
    tail = stage_curves(reader, "ppo", first=4999)["objective/kl"]
    assert (tail["steps"], tail["last"]) == ([4999, 5000], 5000)


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "other"]
    readers = [read(write_log(folder, count=2)) for folder in folders]
    assert run_names(readers) == ["one/run", "two/run", "other"]
    assert run_names([readers[0], readers[2], readers[0]]) == ["run #1", "other", "run #3"]
    deep = [read(write_log(tmp_path / name / "seed" / "run", count=2)) for name in ("one", "two")]
    assert run_names([*deep, readers[0]]) == ["one/seed/run", "two/seed/run", "one/run"]


def test_the_state_of_a_log_without_times_is_plain_json(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss/sft": 1}\n')
    state = json.loads(json.dumps(run_state(read(tmp_path), "run"), allow_nan=False))
    assert state["stages"][0]["time"] is None


SAMPLES = [
    ("Alpha", "the first", 1, 0.5, 3.0, True),
    ("Beta", "Wörter", 1, None, 1.0, False),
    ("Alpha", "the second", 2, -1.0, 2.0, True),
    ("Beta", "wörter again", 2, 2.0, 9.0, True),
    ("Gamma", "alone, per_token", 3, 1.0, -1.0, False),
]


@pytest.fixture
def index(tmp_path) -> SampleIndex:
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for prompt, completion, step, score, kl, ended in SAMPLES:
            line = {"stage": "ppo", "step": step, "prompt": prompt, "completion": completion, "score": score}
            line |= {"kl": kl, "ended": ended}
            if step < 3:
                line["per_token"] = {"pieces": [', "per_token": '], "log_probs": [0.0]}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    made = SampleIndex(read(tmp_path))
    made.update()
    return made


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (Query(), [(4,), (2,), (3,), (0,), (1,)]),
        (Query(sort="oldest"), [(0,), (1,), (2,), (3,), (4,)]),
        (Query(sort="score_high"), [(3,), (4,), (0,), (2,), (1,)]),
        (Query(sort="score_low"), [(2,), (0,), (4,), (3,), (1,)]),
        (Query(sort="kl_high"), [(3,), (0,), (2,), (1,), (4,)]),
        (Query(text="WÖRTER beta", sort="oldest"), [(1,), (3,)]),
        (Query(text="pieces"), []),
        (Query(text="per_token"), [(4,)]),
        (Query(prompt="Alpha", sort="oldest"), [(0,), (2,)]),
        (Query(prompt="alpha"), []),
        (Query(ended=False, sort="oldest"), [(1,), (4,)]),
        (Query(tokens=True, sort="oldest"), [(0,), (1,), (2,), (3,)]),
        (Query(pairs=True, sort="kl_high"), [(1, 3), (0, 2)]),
    ],
    ids=str,
)
def test_samples_are_found(index, query, found):
    assert index.find(query) == found


def test_found_samples_come_whole(index):
    ((before, after),) = index.rows([(0, 2)])
    assert (before["completion"], after["completion"]) == ("the first", "the second")
    assert before["per_token"]["log_probs"] == [0.0]


def test_the_index_follows_a_log_that_grows_and_one_that_is_replaced(tmp_path):
    logs = write_log(tmp_path, count=2, samples=3)
    reader = read(logs)
    index = SampleIndex(reader)
    index.update()
    write_log(tmp_path / "longer", count=4, samples=3)
    path = logs / "samples.jsonl" if logs.name == "logs" else logs / "logs" / "samples.jsonl"
    longer = (tmp_path / "longer" / "logs" / "samples.jsonl").read_text()
    with path.open("a") as stream:
        stream.write(longer[len(path.read_text()) :])
    reader.poll()
    index.update()
    assert len(index.find(Query())) == 12
    path.write_text("".join(line + "\n" for line in longer.splitlines()[6:8]))
    reader.poll()
    index.update()
    assert len(index.find(Query())) == 2


def test_a_reports_selection_keeps_before_and_after_within_its_bytes(tmp_path):
    reader = read(write_log(tmp_path, count=300, samples=8))
    chosen = report_samples(reader, 100_000)
    steps = [sample["step"] for sample in chosen]
    assert (steps[0], steps[-1]) == (1, 300)
    assert len(set(steps)) > 50
    assert sum(len(json.dumps(sample)) for sample in chosen) < 110_000
    assert report_samples(reader, 0) == []


class Scripts(HTMLParser):
    """Collects script elements, and everything else that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.data = ""
        self._inside = False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append(tag)
        assert not {"src", "srcdoc", "action"} & attributes.keys()
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        self._inside = attributes.get("type") == "application/json"

    def handle_data(self, data):
        self.data += data if self._inside else ""

    def handle_endtag(self, tag):
        self._inside = False


PARTS = [
    "<script>",
    "</script>",
    "<!--",
    "-->",
    "]]>",
    "<\\",
    "\u2028",
    "\x00",
    "\u202e",
    "__proto__",
    "&lt;",
    "\ud800",
]


@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.sampled_from(PARTS) | st.characters(), max_size=12).map("".join))
def test_no_text_leaves_the_element_that_holds_it(text):
    content = document({"now": 0, "runs": [], "text": text, text: "key"})
    parser = Scripts()
    parser.feed(content)
    assert parser.elements == PLAIN.elements
    found = json.loads(parser.data)
    assert found["text"].encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


PLAIN = Scripts()
PLAIN.feed(document(None))


def test_the_page_brings_everything_itself():
    assert PLAIN.elements.count("script") > 5
    assert "http-equiv" in document(None)
    for word in ("@import", "url(", "innerHTML", "insertAdjacentHTML", "document.write", "eval("):
        ours = document(None).split("/*! https://github.com/leeoniya/uPlot")
        assert word not in ours[0]
        assert word not in ours[1].split("</script>", 1)[1]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_durations_carry_when_they_are_rounded():
    script = (resources.files("rlhf.monitor") / "page" / "dom.js").read_text(encoding="utf-8")
    code = f"{script}\nconsole.log([null, 0, 59.4, 59.6, 3599, 3600, 7199, 86399, 129600].map(duration).join(', '))"
    told = subprocess.run(["node", "-e", code], check=True, capture_output=True, encoding="utf-8").stdout.strip()
    assert told == "\u2013, 0 s, 59 s, 1 min, 1 h 0 min, 1 h 0 min, 2 h 0 min, 1.0 days, 1.5 days"


def test_a_report_of_a_thousand_iterations_is_below_5_mb(tmp_path):
    def sample(step: int, row: int) -> dict:
        numbers = [-0.1234] * 53
        tokens = dict.fromkeys(("log_probs", "ref_log_probs", "values", "advantages"), numbers)
        line = {"prompt": f"{'a long prompt ' * 20}{row + step % 50}", "completion": "é<" * 53, "score": 0.5, "kl": 1.0}
        return line | {"tokens": 53, "ended": True, "per_token": {"pieces": ["é<"] * 53} | tokens}

    figures = {f"more/{number}": (lambda step: step / 7) for number in range(25)}
    write_log(tmp_path, count=1000, samples=16, sample=sample, figures=figures)
    begun = time.perf_counter()
    write_report([tmp_path], tmp_path / "report" / "report.html")
    print(f"written in {time.perf_counter() - begun:.2f} s")
    assert 100_000 < (tmp_path / "report" / "report.html").stat().st_size < 5_000_000


def test_numbers_that_are_not_finite_hurt_nothing(tmp_path):
    sample = '{"stage": "ppo", "step": 1, "prompt": "p", "completion": "c", "score": NaN, "kl": -Infinity}\n'
    log = write_log(tmp_path, count=1, samples=0)
    (log / "samples.jsonl").write_text(sample + sample.replace("NaN", "1e999").replace('"c"', "[1e999]"))
    write_report([tmp_path], tmp_path / "report.html")
    parser = Scripts()
    parser.feed((tmp_path / "report.html").read_text())
    (run,) = json.loads(parser.data, parse_constant=pytest.fail)["runs"]
    assert [sample["score"] for sample in run["samples"]] == [None, None]


def test_a_report_of_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run's folder"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.fixture
def server(tmp_path):
    write_log(tmp_path, count=20)
    with make_server([tmp_path], 0) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


def ask(server, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("GET", target, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_server_sends_the_page_under_a_strict_policy(server):
    status, headers, content = ask(server, "/")
    assert status == 200
    assert b"{{" not in content
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http:" not in policy
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example:1", "127.0.0.1.nip.io", ""]
)
def test_other_hosts_names_are_refused(server, host):
    for target in ("/", "/api/state", "/api/samples"):
        status, _, content = ask(server, target, Host=host)
        assert status == 403
        assert b"ppo" not in content


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:80", "[::1]:6", "LOCALHOST:1"])
def test_this_machines_names_are_served_also_through_a_tunnel(server, host):
    assert ask(server, "/api/state", Host=host)[0] == 200


def test_state_comes_again_only_when_it_has_changed(server, tmp_path):
    first = json.loads(ask(server, "/api/state")[2])
    assert first["runs"][0]["stages"][0]["step"] == 20
    assert "runs" not in json.loads(ask(server, f"/api/state?version={first['version']}")[2])
    with (tmp_path / "logs" / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "ppo", "step": 21, "objective/kl": 1.5}\n')
    again = json.loads(ask(server, f"/api/state?version={first['version']}")[2])
    assert again["runs"][0]["stages"][0]["step"] == 21
    curves = json.loads(ask(server, "/api/curves?run=0&stage=ppo&first=21")[2])["curves"]
    assert curves["objective/kl"] == {"steps": [21], "mean": [1.5], "last": 21}


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/api/samples?sort=best", 400),
        ("/api/samples?run=1", 400),
        ("/api/curves?run=-1", 400),
        ("/api/curves?first=1e9", 400),
        ("/api/curves?stage=none", 200),
        ("/api/samples?offset=99999999", 200),
        ("/../../etc/passwd", 404),
        ("/page/app.js", 404),
    ],
)
def test_what_cannot_be_answered_is_said_so(server, target, status):
    found, _, content = ask(server, target)
    assert found == status
    assert status != 400 or json.loads(content)["error"]


def test_samples_come_in_pages(server):
    content = json.loads(ask(server, "/api/samples?limit=5&offset=155&sort=oldest")[2])
    assert content["total"] == 160
    assert [row[0]["step"] for row in content["rows"]] == [20] * 5


def test_a_port_in_use_is_refused_with_the_remedy(tmp_path):
    write_log(tmp_path, count=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: .*--port 0"):
            make_server([tmp_path], port)
