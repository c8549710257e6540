"""A URL in a request reaches allowed hosts at public addresses, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from rayapp.errors import RequestError
from rayapp.vision import fetch
from rayapp.vision.fetch import image_bytes, is_public
from rayapp.vision.limits import ImageLimits

HOST = "pictures.example"
LIMITS = ImageLimits(allowed_hosts=frozenset({HOST}), fetch_timeout_s=1.0, max_bytes=5000)


class Handler(BaseHTTPRequestHandler):
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers["Host"])
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(6000))
        elif self.path == "/drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(600):
                self.wfile.write(b"X-Slow: yes\r\n")
                time.sleep(0.1)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "image/PNG; charset=binary")
            self.end_headers()
            self.wfile.write(b"picture")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    handler = type("Seen", (Handler,), {"seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{HOST}:{server.server_port}", handler.seen
    server.shutdown()
    server.server_close()


def download(url: str) -> tuple[bytes, str | None]:
    """Past the checks of port and address, to a server of our own under another name."""
    deadline = time.monotonic() + LIMITS.fetch_timeout_s
    return fetch._download(httpx.URL(url), "127.0.0.1", LIMITS, deadline)


def test_the_checked_address_is_used_under_the_hosts_name(
    server: tuple[str, list[str]],
) -> None:
    url, seen = server
    assert download(f"{url}/picture") == (b"picture", "image/png")
    assert seen == [HOST]


def test_redirects_and_large_answers_are_refused(server: tuple[str, list[str]]) -> None:
    url, _ = server
    with pytest.raises(RequestError, match="status 302"):
        download(f"{url}/moved")
    with pytest.raises(RequestError, match="exceeds 5000 bytes"):
        download(f"{url}/large")


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def answer(*addresses: str) -> None:
        found = [(0, 0, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(fetch, "getaddrinfo", lambda *_, **__: found)

    return answer


def test_one_deadline_holds_however_slowly_bytes_drip(
    server: tuple[str, list[str]], resolves: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    resolves("127.0.0.1")
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    monkeypatch.setattr(fetch, "_PORTS", {"http": httpx.URL(url).port})
    begun = time.monotonic()
    with pytest.raises(RequestError, match="longer than 1 s"):
        image_bytes(f"{url}/drip", LIMITS)
    assert time.monotonic() - begun < 30, "the drip lasts a minute"
    assert image_bytes(f"{url}/picture", LIMITS)[0] == b"picture"


def test_a_dead_host_is_a_refusal(
    resolves: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    resolves("127.0.0.1")
    monkeypatch.setattr(fetch, "is_public", lambda _: True)
    monkeypatch.setattr(fetch, "_PORTS", {"http": port})
    with pytest.raises(RequestError, match="cannot be fetched"):
        image_bytes(f"http://{HOST}:{port}/", LIMITS)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://elsewhere.example/a.png", "'elsewhere.example' are not allowed"),
        (f"https://{HOST}.elsewhere.example/a.png", "not allowed"),
        (f"https://elsewhere.example@{HOST}/a.png", "without a user name"),
        (f"https://{HOST}:8080/a.png", "standard port"),
        (f"ftp://{HOST}/a.png", "data:, or http"),
        ("file:///etc/passwd", "data:, or http"),
        ("http://127.0.0.1/", "not allowed"),
        ("http://[::1]/", "not allowed"),
        ("", "data:, or http"),
        ("http://x:y/", "malformed"),
    ],
)
def test_urls_that_are_never_fetched(url: str, words: str, resolves: Callable[..., None]) -> None:
    resolves("93.184.216.34")
    with pytest.raises(RequestError, match=words):
        image_bytes(url, LIMITS)


def test_nothing_is_fetched_without_an_allow_list() -> None:
    with pytest.raises(RequestError, match="not allowed"):
        image_bytes(f"https://{HOST}/a.png", ImageLimits())


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.1"],
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["93.184.216.34", "192.168.1.1"],
        ["::1"],
        ["fe80::1%eth0"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a00:1"],
        ["2002:a00:1::"],
        ["100.64.0.1"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        [],
    ],
)
def test_an_allowed_name_with_a_private_address_is_refused(
    addresses: list[str], resolves: Callable[..., None]
) -> None:
    resolves(*addresses)
    with pytest.raises(RequestError, match="not public"):
        image_bytes(f"https://{HOST}/a.png", LIMITS)


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")


def test_a_name_that_does_not_resolve_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(fetch, "getaddrinfo", fail)
    with pytest.raises(RequestError, match="cannot be resolved"):
        image_bytes(f"https://{HOST}/a.png", LIMITS)
