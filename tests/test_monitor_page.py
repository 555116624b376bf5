"""The page in a real browser: it draws, follows, finds, keeps hostile text text, and leaves the console empty."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from synthetic_logs import append, completion, healthy, write_log

from rlhf.monitor.report import write_report
from rlhf.monitor.serve import make_server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install 'rlhf[test]')")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with its chromedriver on this machine"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own sockets
]

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!-- "
    "\x00\x07\x1b[31m \u202eright to left\u202c \u2066iso\u2069 __proto__ constructor &lt;b&gt; ${1} {{data}} \u2028 𝄞 "
)

IMPATIENT = "const wait = setTimeout; setTimeout = (call, time) => wait(call, Math.min(time, 100))"
"""The page asks the server for what is new every few seconds; here it does ten times a second."""

Browser = Any


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": IMPATIENT})
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def _console_stays_empty(browser) -> Iterator[None]:
    browser.get_log("browser")
    yield
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server on some logs; gives the page's address."""
    servers = []

    def start(*folders: Path) -> str:
        server = make_server(folders, 0)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def until(browser: Browser, script: str, *arguments: Any) -> Any:
    """The value of a JavaScript expression as soon as it is true; fails after ten seconds."""
    end = time.monotonic() + 10
    while not (value := browser.execute_script(f"return {script}", *arguments)):
        assert time.monotonic() < end, f"never true: {script}"
        time.sleep(0.02)
    return value


def open_tab(browser: Browser, name: str) -> None:
    browser.execute_script("location.hash = arguments[0]", name)
    until(browser, "!document.getElementById(arguments[0]).hidden", name)


def text_of(browser: Browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def choose(browser: Browser, select: str, value: str) -> None:
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        select,
        value,
    )


DRAWN = """[...document.querySelectorAll('.frame canvas')].filter((canvas) => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const ink = getComputedStyle(document.documentElement).getPropertyValue('--series-0').trim();
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(ink.slice(i, i + 2), 16));
  for (let i = 0; i < pixels.length; i += 4)
    if (pixels[i] === r && pixels[i + 1] === g && pixels[i + 2] === b && pixels[i + 3] === 255) return true;
  return false;
}).length"""
"""How many charts show a line in the first colour."""


def hostile(step: int, row: int) -> dict[str, Any]:
    sample = completion(step, row) | {"prompt": f"{HOSTILE} {row}", "completion": HOSTILE}
    middle = HOSTILE.index("<img")
    pieces = [HOSTILE[:9], HOSTILE[9:middle], "", HOSTILE[middle:], ""]
    numbers = [-0.5, 0.25, 0.0, -1.0, 2.0]
    names = ("log_probs", "ref_log_probs", "values", "advantages")
    return sample | {
        "__proto__": 1,
        "reward/__proto__": 2.0,
        "per_token": {"pieces": pieces} | dict.fromkeys(names, numbers),
    }


@pytest.fixture(params=["served", "report"])
def opened(request, browser, tmp_path, serve) -> Callable[..., None]:
    """Opens the page on some logs, once from the server and once as a file."""

    def open_page(*folders: Path) -> None:
        if request.param == "served":
            browser.get(serve(*folders))
        else:
            path = tmp_path / "report.html"
            write_report(folders, path)
            browser.get(path.as_uri())
        until(browser, "document.querySelector('#runs .status')")

    return open_page


def test_it_shows_progress_health_and_charts(opened, browser, tmp_path):
    opened(write_log(tmp_path / "run"))
    until(browser, "document.querySelector('#overview').innerText.includes('Then and now')")  # comes a moment later
    overview = text_of(browser, "#overview")
    for words in ("iteration 60 of 60", "done", "Score", "nats per completion", "Then and now", "Before", "After"):
        assert words in overview
    assert browser.execute_script("return document.querySelectorAll('.findings li').length") >= 5
    open_tab(browser, "charts")
    count = until(browser, DRAWN)
    assert count >= 12
    assert "Is it over-optimised?" in text_of(browser, "#charts")
    open_tab(browser, "events")
    assert "ppo end" in text_of(browser, "#events")
    open_tab(browser, "overview")
    browser.execute_script("document.querySelector('.findings .link').click()")
    until(browser, "!document.getElementById('charts').hidden && !document.getElementById('whole').hidden")


def test_hostile_text_stays_text(opened, browser, tmp_path):
    opened(write_log(tmp_path / "run", count=4, sample=hostile, events=({"event": HOSTILE, "message": HOSTILE},)))
    for tab in ("overview", "events", "samples"):
        open_tab(browser, tab)
    until(browser, "document.querySelector('.samples .sample')")
    for colouring in ("none", "change", "value", "advantage"):
        choose(browser, "colouring", colouring)
        shown = text_of(browser, "#samples .completion")
        for words in ("</script><script>window.hacked = 1</script>", "<img src=x", "<!--", "&lt;b&gt;", "{{data}}"):
            assert words in shown
        for name in ("U+0000", "U+0007", "U+001B", "U+202E", "U+202C", "U+2066"):
            assert name in shown
        assert browser.execute_script("return document.querySelectorAll('#samples img, #samples script').length") == 0
    assert browser.execute_script("return document.querySelectorAll('#samples .completion .token').length") == 5 * 20
    assert "reward/__proto__ 2" in text_of(browser, "#samples .facts")
    assert browser.execute_script("return ({}).x === undefined && Object.prototype.constructor === Object")


def test_samples_are_searched_sorted_paired_and_coloured(opened, browser, tmp_path):
    def sample(step: int, row: int) -> dict[str, Any]:
        text = "a needle in it" if (step, row) == (7, 3) else f"hay {step}"
        tokens = {"pieces": [text[:1], text[1:]], "log_probs": [-1.0, -2.0], "ref_log_probs": [-1.5, -1.0]}
        tokens |= {"values": [0.5, 1.0], "advantages": [1.0, -1.0]}
        line = {
            "prompt": f"prompt {row}",
            "completion": text,
            "score": step - row / 10,
            "kl": 1.0,
            "ended": step % 2 == 0,
        }
        return line | ({"per_token": tokens} if row else {})

    opened(write_log(tmp_path / "run", count=10, samples=4, sample=sample))
    open_tab(browser, "samples")
    until(browser, "document.querySelectorAll('.samples .sample').length === 20")
    assert "40 samples" in text_of(browser, ".count")
    choose(browser, "sample-sort", "score_low")
    until(browser, "document.querySelector('.samples .facts').innerText.includes('score 0.7')")
    choose(browser, "sample-ended", "no")
    until(browser, "document.querySelector('.count').innerText.includes('20 samples')")
    choose(browser, "sample-ended", "")
    browser.find_element("id", "search").send_keys("NEEDLE")
    until(browser, "document.querySelectorAll('.samples .sample').length === 1")
    browser.find_element("id", "search").clear()
    browser.find_element("id", "search").send_keys("nothing has this")
    until(browser, "document.querySelector('.samples').innerText.includes('No sample matches')")
    browser.find_element("id", "search").clear()
    browser.find_element("id", "search").send_keys(" ")
    choose(browser, "sample-pairs", "yes")
    until(browser, "document.querySelectorAll('.samples .pair').length === 4")
    assert "+9" in text_of(browser, ".samples .sample > .facts")
    choose(browser, "colouring", "change")
    until(browser, "document.querySelector('.scale')")
    until(browser, "document.querySelectorAll('.samples .pair').length === 3")  # row 0 has no tokens
    assert "3 prompts with token data" in text_of(browser, ".count")
    colour = "(token) => getComputedStyle(token).backgroundColor"
    tokens = "[...document.querySelectorAll('.samples .token')].slice(0, 2)"
    colours = browser.execute_script(f"return {tokens}.map({colour})")
    assert len(set(colours)) == 2  # one token gained, one lost
    browser.execute_script("document.querySelector('.samples .tokens').focus()")
    browser.switch_to.active_element.send_keys("\ue014")  # arrow right
    tip = until(browser, "!document.getElementById('tip').hidden && document.getElementById('tip').innerText")
    assert "+0.5" in tip.replace("\t", " ")


def test_it_compares_runs_with_smoothing_and_zoom(opened, browser, tmp_path):
    opened(write_log(tmp_path / "first"), write_log(tmp_path / "second", seed=1))
    assert text_of(browser, "#runs").count("finished") == 2
    open_tab(browser, "charts")
    until(browser, DRAWN)
    chart = "[...document.querySelectorAll('.card')].find((card) => card.innerText.startsWith('KL to the reference'))"
    legend = browser.execute_script(f"return {chart}.querySelector('.legend').innerText")
    assert legend.split() == ["first", "second"]
    latest = browser.execute_script(f"return {chart}.querySelector('.readout').innerText")
    browser.execute_script(
        "const s = document.getElementById('smoothing'); s.value = 0.9; s.dispatchEvent(new Event('input'))"
    )
    assert browser.execute_script(f"return {chart}.querySelector('.readout').innerText") != latest
    over = browser.execute_script(f"return {chart}.querySelector('.u-over')")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    actions = webdriver.ActionChains(browser, duration=20)
    actions.move_to_element_with_offset(over, -60, 0).click_and_hold().move_by_offset(80, 0).release().perform()
    until(browser, "!document.getElementById('whole').hidden")
    browser.execute_script(f"{chart}.querySelector('.frame').focus()")
    browser.switch_to.active_element.send_keys("\ue00c")  # escape
    until(browser, "document.getElementById('whole').hidden")
    step = f"Number({chart}.querySelector('.readout').innerText.match(/iteration (\\d+)/)[1])"
    before = until(browser, step)
    browser.switch_to.active_element.send_keys("\ue012")  # arrow left
    until(browser, f"{step} === {before - 1}")
    browser.execute_script("document.querySelector('#runs button').click()")
    until(browser, f"{chart}.querySelector('.legend').innerText === ''")


def test_the_score_against_kl_is_shaded_by_time_not_by_kl(opened, browser, tmp_path):
    opened(write_log(tmp_path, count=60, figures={"gold/judge": float}))
    open_tab(browser, "charts")
    until(browser, DRAWN)
    card = "[...document.querySelectorAll('.card')].find((card) => card.innerText.startsWith('Score against'))"
    assert browser.execute_script(f"return {card}.querySelector('.legend').innerText").split() == [
        "score", "gold:", "judge",
    ]  # fmt: skip
    assert "the paler, the earlier" in browser.execute_script(f"return {card}.querySelector('.readout').innerText")
    steps = list(range(1, 13))
    kl = {"x": steps, "mean": [144 - step**2 for step in steps]}  # ever nearer to the reference
    found = browser.execute_script("return parts(pair(...arguments))", kl, {"x": steps, "mean": steps})
    assert [[step for _, step in part] for part in found] == [[n + 1, n] for n in range(1, 13, 2)]


def test_it_follows_a_run_that_has_not_begun_and_then_grows(browser, tmp_path, serve):
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    browser.get(serve(logs))
    until(browser, "document.querySelector('#overview').innerText.includes('has not written anything yet')")
    now = time.time()
    start = {"event": "start", "time": now, "format": 1, "step": 0, "total": 9, "unit": "iteration", "notes": []}
    figures = healthy(9)
    append(logs / "metrics.jsonl", "ppo", [start, {"step": 1, "time": now, **{k: f(1) for k, f in figures.items()}}])
    until(browser, "document.querySelector('.progress')?.innerText.includes('iteration 1 of 9')")
    open_tab(browser, "charts")
    until(browser, "document.querySelectorAll('.frame canvas').length > 10")
    card = "[...document.querySelectorAll('.card')].find((c) => c.innerText.startsWith('KL to the reference'))"
    browser.execute_script(f"{card}.querySelector('.frame').focus()")
    second = {k: f(2) for k, f in figures.items()} | {"objective/kl": 55.5}
    append(logs / "metrics.jsonl", "ppo", [{"step": 2, "time": now, **second}])
    until(browser, f"{card}.querySelector('.readout').innerText.includes('55.5')")
    assert browser.execute_script(f"return document.activeElement === {card}.querySelector('.frame')")
    with (logs / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "ppo", "step": 3, "objective/kl": 123.4, "brand/new": 1}\n{"stage": "ppo", "st')
    until(browser, f"{card}?.querySelector('.readout').innerText.includes('123.4')")
    until(browser, "document.querySelector('#charts').innerText.includes('brand/new')")
    open_tab(browser, "samples")
    until(browser, "document.querySelector('#samples').innerText.includes('No samples yet')")
    append(logs / "samples.jsonl", "ppo", [{"step": 2} | completion(2, 0)])
    until(browser, "document.querySelectorAll('.samples .sample').length === 1")
    append(logs / "samples.jsonl", "ppo", [{"step": 3} | completion(3, 0)])
    until(browser, "[...document.querySelectorAll('button')].some((b) => b.innerText === 'Show 1 new')")


def test_it_says_when_the_connection_is_lost_and_goes_on_when_it_is_back(browser, tmp_path, serve):
    log = write_log(tmp_path / "run", count=3, end=False, events=({"event": "nonfinite", "step": 3},))
    browser.get(serve(log))
    until(browser, "document.querySelector('#runs').innerText.includes('not finite')")
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", network | {"offline": True})
    until(browser, "document.querySelector('#connection').innerText.includes('connection lost')")
    append(log / "metrics.jsonl", "ppo", [{"step": 77, "objective/kl": 1.0}])
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", network | {"offline": False})
    until(browser, "document.querySelector('.progress').innerText.includes('iteration 77')")
    assert text_of(browser, "#connection") == "live"
    logged = [entry["message"] for entry in browser.get_log("browser")]  # the browser's own words, and ours
    assert logged
    assert all("ERR_INTERNET_DISCONNECTED" in message or "Failed to fetch" in message for message in logged)


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_every_width_in_both_themes(browser, tmp_path, width, theme):
    path = tmp_path / "report.html"
    write_report([write_log(tmp_path / "a_run_with_a_rather_long_name_that_goes_on", count=20, sample=hostile)], path)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        browser.get(path.as_uri())
        for tab in ("overview", "charts", "samples", "events"):
            open_tab(browser, tab)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, ground[4:-1].split(","))) < 380
        assert dark == (theme == "dark")
        browser.find_element("id", "theme").click()
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != ground
        browser.execute_script("localStorage.clear()")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_long_run_opens_and_is_searched(browser, tmp_path, serve):
    """10,000 iterations and 100,000 samples: the times are printed, and never decide."""
    log = write_log(tmp_path / "run", count=10_000, samples=0)
    lines = [json.dumps(completion(1, row), ensure_ascii=False)[1:] for row in range(1000)]
    with (log / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(100_000):
            stream.write(f'{{"stage": "ppo", "step": {1 + number // 10}, {lines[number % 1000]}\n')
    begun = time.perf_counter()
    address = serve(log)
    times = [time.perf_counter() - begun]
    begun = time.perf_counter()
    browser.get(address)
    until(browser, "document.querySelector('.figures')?.innerText.includes('Score')")
    times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    open_tab(browser, "charts")
    until(browser, DRAWN)
    times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    open_tab(browser, "samples")
    until(browser, "document.querySelector('.count').innerText.includes('100,000 samples')")
    times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    browser.find_element("id", "search").send_keys("item 77 ")
    until(browser, "document.querySelector('.count').innerText.match(/^[\\d,]+ samples/)[0] === '1,900 samples'")
    times.append(time.perf_counter() - begun)
    print("start {:.2f} s, open {:.2f} s, charts {:.2f} s, samples {:.2f} s, search {:.2f} s".format(*times))
    begun = time.perf_counter()
    write_report([log], tmp_path / "report.html")
    size = (tmp_path / "report.html").stat().st_size
    print(f"report of {size / 1e6:.1f} MB in {time.perf_counter() - begun:.2f} s")
    assert size < 5_000_000


def with_setup(logs: Path, **settings: Any) -> Path:
    path = logs / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    setup = {"settings": settings, "provenance": {"torch": "2.13.0", "digests": {}, "command": HOSTILE}, "units": {}}
    verdict = {"stage": "ppo", "event": "verdict", "text": "The policy's score rose.", "sound": True}
    lines = [json.dumps(json.loads(first) | setup), *rest, json.dumps(verdict)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    return logs


def test_runs_are_compared_in_groups_of_equal_settings_and_never_averaged_across(opened, browser, tmp_path):
    opened(
        *(
            with_setup(write_log(tmp_path / f"{rate}-{seed}", seed=seed, samples=1), seed=seed, rate=rate)
            for rate in ("low", "high")
            for seed in range(2)
        )
    )
    until(browser, "document.querySelector('.comparison')")
    table = text_of(browser, ".comparison")
    for words in ("rate low", "rate high", "mean of 2 runs", "low-0", "high-1", "KL to the reference", "["):
        assert words in table
    assert "The policy's score rose." in text_of(browser, "#overview")
    open_tab(browser, "charts")
    until(browser, "document.querySelector('#charts .legend li')")
    legend = text_of(browser, "#charts .legend")
    assert "rate low (mean of 2, 95% interval): Score\n" in legend
    assert legend.count("mean of 2") == 4, "of two groups and two metrics"


def test_settings_provenance_and_evaluation_have_their_place(opened, browser, tmp_path):
    logs = with_setup(write_log(tmp_path / "run", samples=1), **{"ppo.kl_coef": 0.25})
    figure = {"value": 0.62, "low": 0.5, "high": 0.7, "n": 90}
    evaluation = {
        "eval_type": "reward", "data": "pairs.json", "verdict": "It can be optimised.",
        "figures": {"model": {"eval/reward/accuracy": figure}},
    }  # fmt: skip
    (tmp_path / "run" / "report").mkdir()
    (tmp_path / "run" / "report" / "evaluation.json").write_text(json.dumps({"evaluations": [evaluation]}))
    opened(logs)
    open_tab(browser, "setup")
    setup = text_of(browser, "#setup")
    for words in (
        "ppo.kl_coef",
        "0.25",
        "torch",
        "2.13.0",
        "same processor, torch and threads",
        "It can be optimised.",
    ):
        assert words in setup
    assert "0.62 [0.5, 0.7]" in setup
    open_tab(browser, "events")
    assert "kl_coef" not in text_of(browser, "#events")


def test_a_chart_is_saved_as_numbers_and_as_a_drawing(opened, browser, tmp_path):
    opened(write_log(tmp_path / "run", count=30))
    open_tab(browser, "charts")
    until(browser, "document.querySelector('#charts .frame canvas')")
    script = (
        "(() => { window.saved = {}; save = (name, type, content) => { window.saved[name] = content; }; return 1; })()"
    )
    until(browser, script)
    for kind in ("PNG", "SVG", "CSV"):
        browser.execute_script(
            "document.querySelector(arguments[0]).click()", f"#charts .exports [aria-label='Save as {kind}']"
        )
    csv = browser.execute_script("return Object.entries(window.saved).find(([name]) => name.endsWith('.csv'))[1]")
    heading, *rows = csv.strip().split("\n")
    assert heading.startswith("iteration,")
    assert len(rows) == 30
    assert rows[0].startswith("1,")
    svg = browser.execute_script("return Object.entries(window.saved).find(([name]) => name.endsWith('.svg'))[1]")
    root = ElementTree.fromstring(svg)
    assert root.findall("{http://www.w3.org/2000/svg}polyline")
    until(browser, "Object.entries(window.saved).find(([name, blob]) => name.endsWith('.png') && blob.size > 1000)")
