"""The live page's server: it serves before a browser is opened, and says nothing of clients that misbehave."""

import _thread
import contextlib
import re
import signal
import socket
import struct
import threading
import time
import urllib.request
import webbrowser

import pytest
from rlhf.cli.monitor import main as monitor
from synthetic_logs import write_log

from rlhf.monitor import serve as module
from rlhf.monitor.serve import make_server


class Browser:
    """Waits for the page, as a browser in the terminal does, then ends the server as Ctrl-C does."""

    def __init__(self, name: str) -> None:
        self.name, self.pages = name, []

    def open(self, address: str) -> bool:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                self.pages.append(answer.read())
        finally:
            _thread.interrupt_main()
        return True


def test_it_serves_before_the_browser_is_opened(tmp_path, monkeypatch, capsys):
    browser = Browser("curl")
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
    try:
        assert monitor(["--log-dir", str(write_log(tmp_path, count=3)), "--serve", "--port", "0"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert b"<html" in browser.pages[0]
    shown = capsys.readouterr().err
    assert re.fullmatch(r"following \S+ at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends\)\nstopped\n", shown)


@pytest.mark.parametrize("name", ["w3m", "lynx", "links", "elinks", "www-browser", "/usr/bin/w3m"])
def test_a_text_browser_is_not_opened(monkeypatch, name):
    browser = Browser(name)
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    module._open_browser("http://127.0.0.1:1/")
    assert not browser.pages


@pytest.mark.parametrize("error", [webbrowser.Error("no browser"), ValueError("No closing quotation")])
def test_no_browser_is_no_fault(monkeypatch, error):
    def refuse() -> None:
        raise error

    monkeypatch.setattr(webbrowser, "get", refuse)
    module._open_browser("http://127.0.0.1:1/")


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Of a server that gives up idle connections soon."""
    monkeypatch.setattr(module._Handler, "timeout", 0.2)
    server = make_server([write_log(tmp_path, count=3)], 0)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLIENTS = {
    "resets at once": b"",
    "resets in the request": b"GET / HT",
    "resets in the answer": GET * 20,
    "is no browser": b"\x16\x03\x01\x02\x00\x01\x00\xff\n\n",
    "asks for half an address": b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("sent", CLIENTS.values(), ids=CLIENTS)
def test_nothing_is_said_of_a_client_that_leaves(port, capfd, sent):
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(sent)
    time.sleep(0.1)
    reset(client)
    time.sleep(0.1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        assert answer.status == 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET], ids=["silent", "half a request", "idle"])
def test_a_connection_that_says_nothing_is_closed(port, capfd, sent):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(5)
        client.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1 << 16):
                pass
    assert capfd.readouterr() == ("", "")
