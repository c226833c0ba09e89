"""Whatever comes to the port, what goes back is HTTP: an error is the envelope, and every answer has its id."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from server.limits import Limits
from server.settings import ServerSettings
from tests.api.harness import live, saying

SETTINGS = ServerSettings(("demo",), limits=Limits(max_body_size=1000, header_timeout=5.0))
JSON_HEAD = b"Host: x\r\nContent-Type: application/json\r\n"


def request(line: bytes, headers: bytes = b"Host: x\r\n", body: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    return line + b" HTTP/1.1\r\n" + headers + length + b"Connection: close\r\n\r\n" + body


COMPLETION = b"POST /v1/completions"
CHUNKED = JSON_HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
TWO_LENGTHS = b"Content-Length: 2\r\nContent-Length: 3\r\n"

ERRORS: dict[str, tuple[bytes, int, str]] = {
    "unknown path": (request(b"GET /v2/completions"), 404, "not_found"),
    "path that is no text": (request(b"GET /%ff%fe"), 404, "not_found"),
    "path of a page": (request(b"GET /docs"), 404, "not_found"),
    "a path in a URL": (request(b"GET http://x/nope"), 404, "not_found"),
    "no path": (request(b"OPTIONS *"), 404, "not_found"),
    "wrong method": (request(b"DELETE /v1/completions"), 405, "method_not_allowed"),
    "GET for POST": (request(b"GET /v1/chat/completions"), 405, "method_not_allowed"),
    "POST for GET": (request(b"POST /health", JSON_HEAD, b"{}"), 405, "method_not_allowed"),
    "preflight without CORS": (request(b"OPTIONS /v1/completions"), 405, "method_not_allowed"),
    "unknown model": (request(b"GET /v1/models/nope"), 404, "model_not_found"),
    "no body": (request(COMPLETION, JSON_HEAD), 400, "invalid_json"),
    "no JSON": (request(COMPLETION, JSON_HEAD, b"prompt=x"), 400, "invalid_json"),
    "no field": (request(COMPLETION, JSON_HEAD, b"{}"), 400, "missing_required_parameter"),
    "a form": (request(COMPLETION, b"Host: x\r\nContent-Type: text/html\r\n", b"{}"), 415, "unsupported_media_type"),
    "no media type": (request(COMPLETION, b"Host: x\r\n", b"{}"), 415, "unsupported_media_type"),
    "large body": (request(COMPLETION, JSON_HEAD, b" " * 2000), 413, "content_too_large"),
    "large body in chunks": (
        COMPLETION + b" HTTP/1.1\r\n" + CHUNKED + b"7d0\r\n" + b" " * 2000 + b"\r\n0\r\n\r\n",
        413,
        "",
    ),
    "a chunk of no size": (COMPLETION + b" HTTP/1.1\r\n" + CHUNKED + b"zz\r\n{}\r\n", 400, ""),
    "two lengths": (request(COMPLETION, JSON_HEAD + TWO_LENGTHS, b""), 400, "invalid_http"),
    "no HTTP": (b"hello\r\n\r\n", 400, "invalid_http"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http"),
    "a path of bytes": (request(b"GET /\xff\xfe"), 400, "invalid_http"),
    "a header with a null byte": (request(b"GET /health", b"Host: x\r\nX-A: \x00\r\n"), 400, "invalid_http"),
    "large headers": (
        request(b"GET /health", b"Host: x\r\nX-A: " + b"x" * 100_000 + b"\r\n"),
        431,
        "headers_too_large",
    ),
}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with live(saying("a"), SETTINGS) as url:
        yield int(url.rpartition(":")[2])


def exchanged(port: int, sent: bytes) -> Answer:
    """The answer to raw bytes, read until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        pieces = []
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                pieces.append(piece)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    status_line, *lines = head.decode("ascii").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Answer(int(status_line.split()[1]), headers, body)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_the_envelope(port: int, name: str) -> None:
    sent, status, code = ERRORS[name]
    answer = exchanged(port, sent)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.headers["x-request-id"]
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert (status == 405) == ("allow" in answer.headers)
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code or not code


@pytest.mark.parametrize(("path", "status"), [(b"/health", 200), (b"/ready", 200), (b"/live", 200), (b"/nope", 404)])
def test_head_has_the_headers_of_get_and_no_body(port: int, path: bytes, status: int) -> None:
    head, get = exchanged(port, request(b"HEAD " + path)), exchanged(port, request(b"GET " + path))
    assert (head.status, get.status, head.body) == (status, status, b"")
    different = {"x-request-id", "date"}
    assert {k: v for k, v in head.headers.items() if k not in different} == {
        k: v for k, v in get.headers.items() if k not in different
    }


def test_a_request_to_become_a_websocket_is_an_ordinary_one(port: int) -> None:
    upgrade = b"Host: x\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    sent = b"GET /health HTTP/1.1\r\n" + upgrade + b"Connection: Upgrade, close\r\n\r\n"
    answer = exchanged(port, sent)
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "ready"})


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_http_1_0_end_with_the_connection(port: int, stream: bool) -> None:
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    sent = COMPLETION + b" HTTP/1.0\r\n" + JSON_HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = exchanged(port, sent)
    assert answer.status == 200
    assert (b"data: [DONE]\n\n" if stream else b'"usage":{') in answer.body


def test_requests_in_a_row_on_one_connection_get_their_own_answers(port: int) -> None:
    sent = b"".join(b"GET /v1/models/%s HTTP/1.1\r\nHost: x\r\n\r\n" % name for name in (b"demo", b"nope", b"demo"))
    answer = exchanged(port, sent + request(b"GET /version"))
    rest = answer.body
    assert answer.status == 200
    assert [rest.count(status) for status in (b"HTTP/1.1 200", b"HTTP/1.1 404")] == [2, 1]
