"""The built documentation: no warning, no broken link, and nothing public that it leaves out."""

import html
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from rlhf.config import PipelineRun
from rlhf.estimators import ESTIMATORS
from rlhf.metrics import METRICS, describe
from rlhf.monitor.health import CHECKS
from rlhf.ranges import flat_fields
from rlhf.stages import STAGES, pipeline_names

pytest.importorskip("furo", reason="the extra docs is not installed (pip install 'rlhf[docs]')")
pytest.importorskip("myst_parser", reason="the extra docs is not installed (pip install 'rlhf[docs]')")

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
BUILT_IN = [name for name, stage in STAGES.items() if str(stage.program).startswith("rlhf.")]
"""Stages of the library; other tests register theirs."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, as `make docs` builds them: warnings are errors, and every tutorial runs."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html", "docs", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return target


@pytest.fixture(scope="module")
def documented(site) -> set[tuple[str, str]]:
    """(kind, name) of everything that the pages define."""
    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    lines = [re.fullmatch(r"(.+?) (\S+) -?\d+ .*", line) for line in zlib.decompress(packed).decode().splitlines()]
    return {(match.group(2), match.group(1)) for match in lines if match}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def test_no_link_is_broken_anchors_included(site):
    pages = {}
    for path in site.rglob("*.html"):
        pages[path] = _Page()
        pages[path].feed(path.read_text())
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or (parts.path == "" and parts.fragment == ""):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_the_checker_of_links_sees_them():
    page = _Page()
    page.feed('<a href="b.html#c"><img src="d.png"></a><h1 id="e"></h1>')
    assert page.links == ["b.html#c", "d.png"]
    assert page.anchors == {"e"}


def test_every_public_name_is_documented(documented):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from sphinx_rlhf import api
    finally:
        sys.path.remove(str(ROOT / "docs"))
    names = {name for kind, name in documented if kind.startswith("py:")}
    modules = set(api.public_modules())
    exported = set(api.exported().values())
    assert "rlhf.losses.sft_loss" in exported, "the stub is read"
    assert {name for name in exported if name not in modules and name.count(".") > 1} - {"rlhf.models.gpt2"} <= names
    for module in modules:
        assert {entry.full_name for entry in api.entries_of(module)} <= names
    assert {f"rlhf.{path.stem}" for path in (ROOT / "rlhf").glob("[a-z]*.py")} <= modules


def test_every_setting_is_documented(documented):
    settings = {name for kind, name in documented if kind == "std:confval"}
    for config in (PipelineRun, *(STAGES[name].config for name in BUILT_IN)):
        assert flat_fields(config()).keys() <= settings


def test_settings_have_their_defaults(site):
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "settings.html").read_text()))
    defaults = flat_fields(PipelineRun())
    shown = dict(re.findall(r"\n([a-z_0-9.]+)¶\n[^\n]*; default ([^\n]*)", page))
    assert {"seed", "ppo.kl_coef", "sft.learning_rate", "dist.num_workers", "compile"} <= shown.keys()
    for name, text in ((name, text) for name, text in shown.items() if name in defaults):
        expected = defaults[name]
        if isinstance(expected, tuple):
            words = " ".join(map(str, expected)) or "empty"
        else:
            words = (
                {None: "null", True: "true", False: "false"}.get(expected, "") if is_word(expected) else str(expected)
            )
        assert text == words, name


def is_word(value):
    """True for what YAML writes as a word; 0 and 1 are equal to words and are none."""
    return value is None or isinstance(value, bool)


def test_every_metric_and_health_check_is_documented(documented):
    assert {key for kind, key in documented if kind == "std:metric"} >= METRICS.keys()
    assert {name for kind, name in documented if kind == "std:check"} >= {check.name for check in CHECKS}


def test_the_pages_of_the_methods_have_every_metric_that_is_logged(site):
    (log,) = ROOT.glob("build/examples/t3_your_files-*/outputs/polite/logs/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    stages = {line["stage"] for line in lines}
    assert stages == set(pipeline_names())
    for stage in stages:
        page = (METHODS / f"{stage}.md").read_text()
        listed = set(" ".join(re.findall(r"```\{metrics-of\}\n(.*?)```", page, re.DOTALL)).split())
        logged = {key for line in lines if line["stage"] == stage and "event" not in line for key in line}
        for key in logged - {"stage", "step", "time"}:
            prefix = key.rpartition("/")[0] + "/"
            assert key in listed or prefix in listed, f"{stage}: {describe(key).label} ({key}) is not on its page"


@pytest.mark.parametrize("stage", BUILT_IN)
def test_every_stage_has_a_page(stage):
    assert (METHODS / f"{stage}.md").is_file()


@pytest.mark.parametrize(
    "name", [name for name, entry in ESTIMATORS.items() if entry.function.__module__[:5] == "rlhf."]
)
def test_every_estimator_has_a_page(name):
    flag = re.compile(rf"--ppo\.estimator {re.escape(name)}(?![\w+-])")
    assert any(flag.search(page.read_text()) for page in METHODS.glob("*.md")) or (METHODS / f"{name}.md").is_file()


def test_the_health_checks_have_their_symptoms():
    """Others appear at the end of the page, with what their function says."""
    page = (ROOT / "docs" / "is_it_working.md").read_text()
    named = re.findall(r"```\{health-check\} (\S+)", page)
    assert len(named) == len(set(named))
    assert set(named) <= {check.name for check in CHECKS}
