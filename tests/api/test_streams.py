"""Streams on a real port: frames, comments, errors on the way, clients that leave."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.fake_client import Death, FakeEngineClient, Line, Pause
from server.limits import Limits
from server.listening import Address, listen
from server.settings import ServerSettings
from tests.api.harness import INFO, api, events, eventually, fake, ids, live, saying

URL = "/v1/completions"
STREAM = {"prompt": "x", "stream": True}
QUICK_PINGS = ServerSettings(("demo",), ping_seconds=0.1)


def slow(*lines: Line | str) -> object:
    """A script of texts, pauses and deaths; the last text is the end."""

    def script(request: GenerateRequest) -> Iterable[Line]:
        texts = [place for place, line in enumerate(lines) if isinstance(line, str)]
        for place, line in enumerate(lines):
            if isinstance(line, str):
                last = place == texts[-1] and place == len(lines) - 1
                yield TokenEvent(request.request_id, 0, ids(line), finish_reason="length" if last else None)
            else:
                yield line

    return script


def failing(*texts: str) -> object:
    def script(request: GenerateRequest) -> Iterable[Line]:
        for text in texts:
            yield TokenEvent(request.request_id, 0, ids(text))
        yield TokenEvent(request.request_id, 0, finish_reason="error", error="The cache is broken.")

    return script


def test_frames_and_headers() -> None:
    with live(saying("a", " b")) as url, httpx.stream("POST", url + URL, json=STREAM) as response:
        body = response.read()
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["transfer-encoding"] == "chunked"
    assert response.headers["x-request-id"]
    assert body.endswith(b"}\n\ndata: [DONE]\n\n")
    assert body.count(b"data: ") == 3
    assert b"\r" not in body


def test_lines_split_on_unicode_separators_are_whole() -> None:
    with live(saying("a\u2028b", "\u0085c")) as url, httpx.stream("POST", url + URL, json=STREAM) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)


def test_tokens_arrive_as_they_are_made() -> None:
    with live(slow("a", Pause(0.3), " b", Pause(0.3), " c")) as url:  # type: ignore[arg-type]
        arrived = []
        with httpx.stream("POST", url + URL, json=STREAM) as response:
            for line in response.iter_lines():
                if line:
                    arrived.append(time.monotonic())
    assert len(arrived) == 4
    assert arrived[1] - arrived[0] > 0.2
    assert arrived[2] - arrived[1] > 0.2


def test_comments_keep_a_silent_stream_alive() -> None:
    with live(slow(Pause(0.35), "a", Pause(0.35), " b"), QUICK_PINGS) as url:  # type: ignore[arg-type]
        body = httpx.post(url + URL, json=STREAM).text
    frames = body.split("\n\n")
    assert frames[0] == ": ping"
    assert 4 <= frames.count(": ping") <= 7
    assert [frame[:5] for frame in frames if frame != ": ping"] == ["data:", "data:", "data:", ""]


def test_an_error_before_the_first_token_has_its_own_status() -> None:
    with live(slow(Pause(0.2), Death(), "never")) as url:  # type: ignore[arg-type]
        response = httpx.post(url + URL, json=STREAM)
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "engine_dead"


def test_an_error_after_a_comment_is_an_event() -> None:
    with live(slow(Pause(0.3), Death(), "never"), QUICK_PINGS) as url:  # type: ignore[arg-type]
        body = httpx.post(url + URL, json=STREAM).text
    assert body.startswith(": ping\n\n")
    assert '"code":"engine_dead"' in body
    assert body.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("script", "code"), [(slow("a", Death(), "never"), "engine_dead"), (failing("a"), "internal_error")]
)
def test_an_error_on_the_way_is_one_event_before_done(script: object, code: str) -> None:
    with api(script) as client:  # type: ignore[arg-type]
        first, error = events(client.post(URL, json=STREAM))
    assert first["choices"][0]["text"] == "a"
    assert error["error"]["code"] == code
    assert set(error["error"]) == {"message", "type", "param", "code"}


def test_an_error_of_a_whole_answer_has_its_own_status() -> None:
    with api(failing("a")) as client:  # type: ignore[arg-type]
        response = client.post(URL, json={"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The cache is broken."


def test_one_failing_prompt_fails_the_request_and_cancels_the_others() -> None:
    def script(request: GenerateRequest) -> Iterable[Line]:
        if request.request_id.endswith("-1"):
            yield TokenEvent(request.request_id, 0, finish_reason="error", error="This one is broken.")
        yield TokenEvent(request.request_id, 0, ids("a"))
        yield Pause(30)

    engine = fake(script)
    with api(engine) as client:
        response = client.post(URL, json={"prompt": ["x", "y", "z"]})
    assert response.status_code == 500
    cancelled = {request_id.rpartition("-")[2] for request_id, _ in engine.cancelled}
    assert cancelled == {"0", "2"}


@pytest.mark.parametrize("body", [STREAM, {"prompt": "x"}, {"prompt": ["x", "y"], "stream": True}])
@pytest.mark.parametrize("lines", [(Pause(30), "a"), ("a", Pause(30), "b")])
def test_a_client_that_leaves_cancels_its_request(body: dict[str, object], lines: tuple[Line | str, ...]) -> None:
    engine = fake(slow(*lines))  # type: ignore[arg-type]
    with live(engine) as url:

        def leave() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + URL, json=body, timeout=0.5)

        thread = threading.Thread(target=leave)
        thread.start()
        assert eventually(lambda: engine.stats().running > 0)
        thread.join()
        assert eventually(lambda: engine.stats().running == 0)
        assert {request_id for request_id, _ in engine.cancelled} == {r.request_id for r in engine.requests}


def test_a_client_that_reads_slowly_gets_everything() -> None:
    steps = [[token] for token in ids("x = 1\n" * 200)]
    with live(saying(*steps)) as url, httpx.stream("POST", url + URL, json=STREAM) as response:
        time.sleep(0.5)
        body = response.read()
    assert body.count(b"data: {") == len(steps)


def test_a_long_prompt_does_not_stop_other_answers() -> None:
    engine = FakeEngineClient(replace(INFO, max_model_len=100_000), saying("a"))
    with live(engine) as url, httpx.Client(base_url=url) as client:
        text = "def foo(): return 1\n" * 100_000  # 2 MB; too long, but that shows only after tokenizing it
        thread = threading.Thread(target=lambda: httpx.post(url + URL, json={"prompt": text}, timeout=30))
        thread.start()
        waits = []
        while thread.is_alive():
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            waits.append(time.monotonic() - started)
        thread.join()
    assert len(waits) > 5
    assert max(waits) < 0.5


def test_a_body_over_the_limit_gets_its_answer_while_it_is_sent() -> None:
    with live(settings=ServerSettings(("demo",), limits=Limits(max_body_size=100_000))) as url:
        for size in (150_000, 390_000):
            assert httpx.post(url + URL, json={"prompt": "x" * size}).status_code == 413


def test_pieces_of_an_answer_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm is off on the connections of the server's own listening socket: it would hold chunks back."""
    found: list[int] = []

    class Noting(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            connection = transport.get_extra_info("socket")
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def main() -> None:
        with listen(Address("127.0.0.1", 0), 1.0) as listener:
            server = await asyncio.get_running_loop().create_server(Noting, sock=listener)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            while not found:
                await asyncio.sleep(0.01)
            writer.close()
            server.close()

    asyncio.run(main())
    assert found == [1]
