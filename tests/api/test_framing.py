"""Where a message ends on the wire: HTTP/1.0, trailers, chunks, handshakes, bodies of very many values."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from decoding.request import GenerateRequest
from server.app import build_app
from server.fake_client import Line, Pause
from server.limits import Limits
from server.listening import Address, listen
from server.security import Security, Tls
from server.serve import http_server
from server.settings import ServerSettings
from tests.api.harness import SETTINGS, api, fake, ids, live, saying, tokenizer
from tests.api.test_connections import HEAD, answers, connection, refused, serves
from tests.api.test_errors import COMPLETIONS, check_error

STREAM = b'{"prompt": "x", "max_tokens": 3, "stream": true}'
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
QUICK = ServerSettings(("demo",), limits=Limits(header_timeout=0.5, body_timeout=5.0, max_header_size=8192))


def old(body: bytes, extra: bytes = b"") -> bytes:
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
    return head + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("extra", [b"", b"Connection: keep-alive\r\n"])
def test_a_stream_to_http_1_0_ends_with_its_connection_and_has_no_chunks(extra: bytes) -> None:
    with live(saying("a", " b", "\u20ac")) as url, connection(url) as opened:
        opened.sendall(old(STREAM, extra))
        head, _, body = answers(opened).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"content-length" not in head.lower()
    assert b"connection: close" in head.lower()
    *frames, done, rest = body.decode("ascii").split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    texts = [json.loads(frame.removeprefix("data: "))["choices"][0]["text"] for frame in frames]
    assert "".join(texts) == "a b\u20ac"


def test_pings_and_errors_reach_http_1_0_too() -> None:
    def script(request: GenerateRequest) -> Iterator[Line]:
        yield Pause(0.5)
        raise ZeroDivisionError

    pinging = ServerSettings(("demo",), ping_seconds=0.1)
    with live(script, pinging) as url, connection(url) as opened:
        opened.sendall(old(STREAM))
        _, _, body = answers(opened).partition(b"\r\n\r\n")
    assert body.startswith(b": ping\n\n")
    assert b'"code":"internal_error"' in body
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_whole_answer_to_http_1_0_has_its_length() -> None:
    with live(saying("a")) as url, connection(url) as opened:
        opened.sendall(old(b'{"prompt": "x"}'))
        head, _, body = answers(opened).partition(b"\r\n\r\n")
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    assert lengths == [b"content-length: %d" % len(body)]
    assert json.loads(body)["choices"][0]["text"] == "a"


def test_a_slow_reader_of_http_1_0_gets_all_of_a_long_stream() -> None:
    """Two senders wait for it: that of the answer, and that of comments."""
    words = ids("word " * 300)
    settings = ServerSettings(("demo",), ping_seconds=0.01)
    with live(saying(*[words] * 300), settings) as url, connection(url, receive_buffer=4096) as opened:
        opened.sendall(old(b'{"prompt": "x", "max_tokens": 900, "stream": true}'))
        received = bytearray()
        while data := opened.recv(4096):
            received += data
            if len(received) < 2**18:
                threading.Event().wait(0.002)
    body = bytes(received).partition(b"\r\n\r\n")[2]
    frames = [frame for frame in body.split(b"\n\n") if frame.startswith(b"data: {")]
    assert sum(json.loads(frame[6:])["choices"][0]["text"].count("word") for frame in frames) == 300 * 300
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "endless",
    [b"X-Trailer: yes\r\n", b"x"],
    ids=["fields", "a name"],
)
def test_trailers_have_the_bounds_of_a_head(endless: bytes) -> None:
    """The parser keeps a field until it is complete, and so would one connection fill the memory."""
    with live(saying("y"), QUICK) as url, connection(url) as opened:
        opened.sendall(CHUNKED + b"2\r\n{}\r\n0\r\n")
        with contextlib.suppress(OSError):
            for _ in range(2000):
                opened.sendall(endless * (4096 // len(endless)))
        refused(answers(opened), 431, "headers_too_large")
        assert serves(url)


def test_trailers_behind_an_answer_end_the_connection() -> None:
    with live(saying("y"), QUICK) as url, connection(url) as opened:
        opened.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        assert opened.recv(65536).startswith(b"HTTP/1.1 404 ")
        with contextlib.suppress(OSError):
            for _ in range(2000):
                opened.sendall(b"X-Trailer: yes\r\n" * 256)
        assert b"HTTP/1.1" not in answers(opened)
        assert serves(url)


def test_the_extension_of_a_chunk_has_bounds() -> None:
    with live(saying("y"), QUICK) as url, connection(url) as opened:
        opened.sendall(CHUNKED + b"2;")
        with contextlib.suppress(OSError):
            for _ in range(2000):
                opened.sendall(b"a=b;" * 1024)
        assert b"HTTP/1.1 200" not in answers(opened)
        assert serves(url)


def test_trailers_are_no_headers() -> None:
    """Not even where they come with the head in one piece."""
    keyed = ServerSettings(("demo",), security=Security(api_keys=("k",)))
    body = b"{}"
    with live(saying("y"), keyed) as url, connection(url) as opened:
        trailers = b"Authorization: Bearer k\r\nX-Request-Id: mine\r\n"
        opened.sendall(CHUNKED + b"2\r\n" + body + b"\r\n0\r\n" + trailers + b"\r\n")
        answer = opened.recv(65536)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"mine" not in answer


def test_short_trailers_and_small_chunks_are_fine() -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    with live(saying("y"), QUICK) as url, connection(url) as opened:
        chunks = b"".join(b"1;a=b\r\n" + bytes([byte]) + b"\r\n" for byte in body + b" " * 20_000)
        trailers = b"X-Trailer: yes\r\nAuthorization: Bearer x\r\n"
        for sent in (chunks + b"0\r\n" + trailers + b"\r\n", b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"):
            opened.sendall(CHUNKED + sent)
            answer = http.client.HTTPResponse(opened)
            answer.begin()
            assert (answer.status, bool(answer.read())) == (200, True)


def test_a_handshake_has_the_time_of_a_head(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    context = Tls(str(tmp_path / "server.pem")).context()
    server = http_server(build_app(fake(saying("y")), tokenizer(), SETTINGS), QUICK.limits, context)
    with listen(Address("127.0.0.1", 0), 5.0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            port = listener.getsockname()[1]
            for begun in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
                with socket.create_connection(("127.0.0.1", port), timeout=20) as opened:
                    opened.sendall(begun)
                    assert answers(opened) == b""
            response = httpx.post(
                f"https://127.0.0.1:{port}{COMPLETIONS}", json={"prompt": "x", "stream": True}, verify=trusting
            )
            assert response.text.endswith("data: [DONE]\n\n")
        finally:
            server.should_exit = True
            thread.join()


# very many values ----------------------------------------------------------------------------------------------------

MOST = 1000
FEW = ServerSettings(("demo",), limits=Limits(max_body_values=MOST))


@pytest.mark.parametrize(
    "body",
    [
        "{" + ",".join(f'"k{i}":1' for i in range(MOST + 1)) + "}",
        '{"prompt":[' + ",".join(['"a"'] * MOST) + "]}",
        '{"prompt":[' + ",".join(["[1]"] * MOST) + "]}",
        '{"prompt":[' + ",".join(["{}"] * MOST) + "]}",
        '{"prompt":[' + ",".join(["1"] * 13 * MOST) + "]}",
        '{"prompt":"\\\\","x":[' + ",".join(['"\\""'] * MOST) + "]}",
        '"' * 3 * MOST,
    ],
    ids=["names", "strings", "arrays", "objects", "numbers", "escaped", "quotes"],
)
def test_a_body_of_too_many_values_is_refused_unparsed(body: str) -> None:
    with api(settings=FEW) as client:
        response = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert "too many values" in check_error(response, 400, "invalid_json", None)


@pytest.mark.parametrize(
    "prompt", ['"' * 5000, "[{" * 5000, "\\" * 5001, '\\"' * 5001 + "[", "1,2," * 9000, '\\\\",["' * 999]
)
def test_what_stands_in_a_text_is_no_value(prompt: str) -> None:
    engine = fake(saying("y"))
    with api(engine, FEW) as client:
        assert client.post(COMPLETIONS, json={"prompt": [prompt[:900]] * 20, "max_tokens": 1}).status_code == 200
        refused_for_length = client.post(COMPLETIONS, json={"prompt": prompt * 9, "max_tokens": 1})
    assert len(engine.requests) == 20
    assert "values" not in refused_for_length.text


def test_as_many_values_as_are_allowed_are_read() -> None:
    tokens = [40] * 500
    with api(saying("y"), FEW) as client:
        assert client.post(COMPLETIONS, json={"prompt": [tokens] * 20, "max_tokens": 1}).status_code == 200
        assert client.post(COMPLETIONS, json={"prompt": ["a"] * (MOST - 100), "max_tokens": 1}).status_code == 200
