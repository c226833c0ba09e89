"""Clients that take their time, on real sockets: heads and bodies that do not come, answers that are not read."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest

from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.fake_client import FakeEngineClient, Line, Pause
from server.limits import Limits
from server.settings import ServerSettings
from tests.api.harness import eventually, fake, ids, live, saying

BODY = b'{"prompt": "x", "max_tokens": 1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
QUICK = Limits(header_timeout=0.4, body_timeout=0.4, write_timeout=0.5, max_header_size=8192)


def settings(limits: Limits) -> ServerSettings:
    return ServerSettings(("demo",), limits=limits)


@contextlib.contextmanager
def connection(url: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as opened:
        if receive_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.settimeout(10)
        opened.connect((host, int(port)))
        yield opened


def answers(opened: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := opened.recv(65536):
            received += data
    return received


def refused(raw: bytes, status: int, code: str) -> None:
    """The connection was answered with an error like any other, and closed."""
    head, _, content = raw.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("ascii").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert status_line.split()[:2] == ["HTTP/1.1", str(status)]
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["x-request-id"].startswith("req-")
    assert int(headers["content-length"]) == len(content)
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def serves(url: str) -> bool:
    return httpx.post(url + "/v1/completions", content=BODY, headers={"content-type": "application/json"}).is_success


@pytest.mark.parametrize("pieces", [[b"POST /v1/comp"], [HEAD], [b"G"], [HEAD, b"X-Slow: 1\r\n", b"X-Slower: 2\r\n"]])
def test_a_head_that_does_not_end_is_a_408(pieces: list[bytes]) -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        for piece in pieces:
            opened.sendall(piece)
            time.sleep(0.1)
        refused(answers(opened), 408, "request_timeout")
        assert serves(url)


def test_a_head_that_drips_has_no_more_time() -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in HEAD * 3:
                opened.sendall(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() - started > 3:
                    break
        assert time.monotonic() - started < 2


def test_a_connection_without_a_word_is_closed() -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        assert answers(opened) == b""


def test_empty_lines_do_not_keep_a_connection() -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(WHOLE)
        first = opened.recv(65536)
        assert b"200 OK" in first
        opened.sendall(b"\r\n")
        assert b"HTTP/1.1 200" not in answers(opened)


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Content-Length: 100\r\n\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n" + BODY[:10],
        HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\n',
    ],
)
def test_a_body_that_does_not_come_is_a_408(sent: bytes) -> None:
    engine = fake(saying("y"))
    with live(engine, settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(sent)
        raw = answers(opened)
        assert raw.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in raw
        assert b'"type":"timeout_error"' in raw
        assert b"connection: close" in raw.lower()
        assert serves(url)
    assert len(engine.requests) == 1


def test_a_body_that_drips_has_no_more_time() -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(100):
                opened.sendall(b" ")
                time.sleep(0.03)
        assert time.monotonic() - started < 2.5


def test_a_connection_serves_one_request_after_the_other() -> None:
    with live(saying("y"), settings(QUICK)) as url, httpx.Client() as client:
        for pause in (0.0, 0.1, 0.6, 0.0):  # longer than a head may take: between requests there is another limit
            time.sleep(pause)
            answer = client.post(url + "/v1/completions", content=BODY, headers={"content-type": "application/json"})
            assert answer.status_code == 200


def test_requests_in_one_piece_are_all_answered() -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(WHOLE * 3)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 3:
            data = opened.recv(65536)
            assert data
            received += data


@pytest.mark.parametrize("size", [9_000, 200_000, 2_000_000])
def test_a_head_without_bounds_is_a_431(size: int) -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        with contextlib.suppress(OSError):
            opened.sendall(HEAD)
            for _ in range(0, size, 1000):
                opened.sendall(b"X-Filler: " + b"x" * 988 + b"\r\n")
                if select.select([opened], [], [], 0.001)[0]:  # there is an answer
                    break
        refused(answers(opened), 431, "headers_too_large")
        assert serves(url)


@pytest.mark.parametrize(
    "headers", [{"x-filler": "x" * 9000}, {f"x-{i}": "y" for i in range(260)}], ids=["large", "many"]
)
def test_a_whole_head_that_is_too_large_is_a_431(headers: dict[str, str]) -> None:
    with live(saying("y"), settings(QUICK)) as url:
        response = httpx.post(url + "/v1/completions", json={"prompt": "x"}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")
        assert httpx.get(url + "/" + "p" * 9000).status_code == 431
        assert serves(url)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS on a port that speaks HTTP
        b"GET / HTTP/9.9\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n A: folded\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_closed(raw: bytes) -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(raw)
        received = answers(opened)
        assert b" 200 " not in received
        if received:
            assert received.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 ", b"HTTP/1.1 415 "))
            assert b"application/json" in received
        assert serves(url)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_50_mb_gets_its_413(chunked: bool) -> None:
    piece, count = b"x" * 2**20, 50

    def pieces() -> Iterable[bytes]:
        for _ in range(count):
            yield piece

    headers = {"content-type": "application/json"}
    if not chunked:
        headers["content-length"] = str(len(piece) * count)
    limits = Limits(max_body_size=2**20)
    with live(saying("y"), settings(limits)) as url:
        response = httpx.post(url + "/v1/completions", content=pieces(), headers=headers, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "content_too_large")
        assert serves(url)


def test_the_rest_of_a_refused_body_has_its_time_too() -> None:
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        received = answers(opened)  # ends: nothing more comes
        assert received.startswith(b"HTTP/1.1 413 ")


def test_connections_have_a_limit() -> None:
    with live(saying("y"), settings(Limits(max_connections=3))) as url, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connection(url)) for _ in range(3)]
        for each in held:
            each.sendall(b"GET")
        time.sleep(0.2)
        refused(answers(stack.enter_context(connection(url))), 429, "server_overloaded")
        held[0].close()
        assert eventually(lambda: _is_served(url))


def _is_served(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + "/health").status_code == 200
    return False


# answers that are not read -------------------------------------------------------------------------------------------


def endless(stopped: threading.Event) -> FakeEngineClient:
    """An engine that never stops talking, with a lot to say at each step, unless its request is cancelled."""

    def script(request: GenerateRequest) -> Iterable[Line]:
        words = ids("word " * 200)
        while not stopped.is_set():
            yield TokenEvent(request.request_id, 0, words)
            yield Pause(0.001)

    return fake(script)


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_does_not_read_is_cut_off(reset: bool) -> None:
    stopped = threading.Event()
    engine = endless(stopped)
    body = b'{"prompt": "x", "max_tokens": 1000, "stream": true}'
    with live(engine, settings(QUICK)) as url, connection(url, receive_buffer=4096) as opened:
        try:
            opened.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert eventually(lambda: engine.stats().running == 1)
            if reset:
                opened.recv(10)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                opened.close()
            assert eventually(lambda: engine.stats().running == 0, 10)
            assert engine.cancelled
            assert serves_health(url)
        finally:
            stopped.set()


def test_a_client_that_reads_now_and_then_is_not_cut_off() -> None:
    steps: list[Any] = [ids("word " * 200)] * 400
    body = b'{"prompt": "x", "max_tokens": 1000, "stream": true}'
    with live(saying(*steps), settings(QUICK)) as url, connection(url, receive_buffer=65536) as opened:
        opened.sendall(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        received = b""
        while data := opened.recv(65536):
            received += data
            time.sleep(0.005)
        assert b"data: [DONE]" in received


def serves_health(url: str) -> bool:
    return httpx.get(url + "/health").status_code == 200


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_offers_of_other_protocols_are_declined(upgrade: bytes) -> None:
    """Java's client offers HTTP/2 with its first request, and goes on in HTTP/1.1 on the same connection."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nUpgrade: " + upgrade + b"\r\n"
    offering = HEAD + offer + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n"
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        for sent in (offering, WHOLE, get, get, offering):
            opened.sendall(sent)
            answer = http.client.HTTPResponse(opened)
            answer.begin()
            assert (answer.status, bool(answer.read())) == (200, True)


def test_an_offer_in_two_pieces_is_refused_and_nothing_hangs() -> None:
    head = HEAD + b"Connection: Upgrade\r\nContent-Length: %d\r\nUpg" % len(BODY)
    with live(saying("y"), settings(QUICK)) as url, connection(url) as opened:
        opened.sendall(head)
        time.sleep(0.1)
        opened.sendall(b"rade: h2c\r\n\r\n" + BODY)
        assert answers(opened).startswith(b"HTTP/1.1 400 ")
        assert serves(url)
