"""The server of the live page, which follows runs for a browser on the same machine, on the loopback device."""

import errno
import re
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf.errors import UserError
from rlhf.monitor.log import LogReader
from rlhf.monitor.report import content_policy, document, to_json
from rlhf.monitor.samples import SORTS, Query, SampleIndex
from rlhf.monitor.view import POINTS, metric_table, run_names, run_state, stage_curves

_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
_TEXT_BROWSERS = {"www-browser", "lynx", "links", "links2", "elinks", "w3m", "browsh"}
"""Browsers that draw in the terminal and run no scripts."""

_IDLE_S = 120.0
"""Time after which an idle connection is closed, in seconds."""

_ROWS = 100
"""Maximum number of samples in one answer."""

Parameters = dict[str, str]


def open_page(address: str) -> None:
    """Open a page in a thread, since a browser may wait for the page or for its user."""
    threading.Thread(target=_open_browser, args=(address,), daemon=True).start()


def _open_browser(address: str) -> None:
    """Open a page, unless there is no browser, or only one that draws in the terminal."""
    try:
        browser = webbrowser.get()
    except (webbrowser.Error, ValueError):  # none, or a BROWSER that is no command line
        return
    if Path(getattr(browser, "name", "")).name not in _TEXT_BROWSERS:
        browser.open(address)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error of a client that closed its connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def make_server(log_dirs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Return a server of the page that has read the logs and listens, but does not answer yet.

    Args:
        log_dirs: logs/ folders or output folders of the runs to follow.
        port: port on 127.0.0.1; 0 selects a free one.

    Raises:
        UserError: a folder does not belong to a run, or the port is not available.
    """
    runs = Runs([LogReader(folder) for folder in log_dirs])
    runs.state({})  # the first reading takes longest, and reports what cannot be read
    handler = type("Handler", (_Handler,), {"runs": runs})
    try:
        return _Server(("127.0.0.1", port), handler)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"--port {port}: {error.strerror or 'in use'}; choose another, or --port 0 for any that is free"
            ) from error
        raise


class Runs:
    """The runs that the page shows. Every method may be called from any thread."""

    def __init__(self, readers: Sequence[LogReader]) -> None:
        self._readers, self._names = readers, run_names(readers)
        self._indexes = [SampleIndex(reader) for reader in readers]
        self._lock = threading.Lock()
        self._version = 0
        self._states: list[dict[str, Any]] = []

    def state(self, parameters: Parameters) -> dict[str, Any]:
        """Return the state of all runs, without `runs` and `table` if the caller has this version."""
        with self._lock:
            self._update()
            known = {"version": self._version, "now": time.time()}
            if _whole(parameters, "version", 0) == self._version:
                return known
            if not self._states:
                self._states = [
                    run_state(reader, name) for reader, name in zip(self._readers, self._names, strict=True)
                ]
            return known | {"runs": self._states, "table": metric_table(self._readers)}

    def curves(self, parameters: Parameters) -> dict[str, Any]:
        """Return the curves of a stage, from one step to another."""
        with self._lock:
            self._update()
            reader = self._readers[self._run(parameters)]
            last = _whole(parameters, "last", -1)
            return {
                "generation": reader.generation,
                "curves": stage_curves(
                    reader,
                    parameters.get("stage", ""),
                    first=_whole(parameters, "first", 0),
                    last=None if last < 0 else last,
                    points=POINTS,
                ),
            }

    def samples(self, parameters: Parameters) -> dict[str, Any]:
        """Return a page of the samples that match."""
        sort = parameters.get("sort", "newest")
        if sort not in SORTS:
            raise ValueError(f"sort: expected one of {', '.join(SORTS)}")
        ended = {"yes": True, "no": False}.get(parameters.get("ended", ""))
        pairs, tokens = (parameters.get(name) == "yes" for name in ("pairs", "tokens"))
        query = Query(parameters.get("text", ""), parameters.get("prompt"), sort, ended, pairs, tokens)
        offset, limit = _whole(parameters, "offset", 0), min(_whole(parameters, "limit", 25), _ROWS)
        with self._lock:
            self._update()
            index = self._indexes[self._run(parameters)]
            index.update()
            rows = index.find(query)
            return {"total": len(rows), "rows": index.rows(rows[offset : offset + limit])}

    def _update(self) -> None:
        """Read what the runs have written since."""
        changed = [reader.poll() for reader in self._readers]
        if any(changed) or not self._version:
            self._version, self._states = self._version + 1, []

    def _run(self, parameters: Parameters) -> int:
        run = _whole(parameters, "run", 0)
        if run >= len(self._readers):
            raise ValueError(f"run: there are {len(self._readers)}")
        return run


def _whole(parameters: Parameters, name: str, default: int) -> int:
    text = parameters.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(f"{name}: expected a whole number")
    return int(text)


class _Handler(BaseHTTPRequestHandler):
    runs: Runs
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S

    def do_GET(self) -> None:
        # a foreign page whose name resolves to this machine (DNS rebinding) still sends its own name as the host
        if re.sub(r":\d+$", "", self.headers.get("Host", "")).lower() not in _HOSTS:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this page answers to localhost alone")
            return
        try:
            target = urlsplit(self.path)
        except ValueError:  # such as an unbalanced bracket
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", "the address cannot be read")
            return
        answers = {"/api/state": self.runs.state, "/api/curves": self.runs.curves, "/api/samples": self.runs.samples}
        if target.path == "/":
            self._answer(HTTPStatus.OK, "text/html", document(None))
        elif target.path in answers:
            parameters = {name: values[-1] for name, values in parse_qs(target.query, keep_blank_values=True).items()}
            try:
                status, answer = HTTPStatus.OK, answers[target.path](parameters)
            except (ValueError, UserError, OSError) as error:  # also of a log that is removed this very moment
                status, answer = HTTPStatus.BAD_REQUEST, {"error": str(error)}
            self._answer(status, "application/json", to_json(answer))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "nothing here")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": content_policy(live=True) + "; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (ConnectionError, TimeoutError):  # the browser has left, or takes nothing
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Log nothing to the terminal."""
