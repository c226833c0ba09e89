"""Limits over HTTP: room, deadlines, counts, and what may be asked without a key."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.app import build_app
from server.fake_client import FakeEngineClient, Line, Pause
from server.limits import Limits
from server.security import Security
from server.settings import ServerSettings
from tests.api.harness import api, events, eventually, fake, ids, live, saying, tokenizer
from tests.api.test_errors import CHAT, COMPLETIONS, HELLO, check_error

KEY = {"Authorization": "Bearer sk-right"}


def settings(security: Security | None = None, *, rows: int = 64, **limits: Any) -> ServerSettings:
    return ServerSettings(("demo",), rows=rows, limits=Limits(**limits), security=security or Security())


def waiting(seconds: float) -> FakeEngineClient:
    """An engine that says "a", and " b" after that time."""

    def script(request: GenerateRequest) -> Iterable[Line]:
        for choice in range(request.params.n):
            yield TokenEvent(request.request_id, choice, ids("a"))
        yield Pause(seconds)
        for choice in range(request.params.n):
            yield TokenEvent(request.request_id, choice, ids(" b"), finish_reason="length")

    return fake(script)


# room -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_a_429_and_room_again_when_a_request_ends(stream: bool) -> None:
    engine = waiting(30)
    body = {"prompt": "x", "stream": stream}
    with live(engine, settings(rows=1, max_queued_requests=1)) as url, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(_abandoned, url, body) for _ in range(2)]
        assert eventually(lambda: len(engine.requests) == 2)
        for path, asked in ((COMPLETIONS, body), (CHAT, {"messages": HELLO})):
            response = httpx.post(url + path, json=asked)
            check_error(response, 429, "server_overloaded", None)
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert int(response.headers["retry-after-ms"]) > 0
        assert httpx.get(url + "/health").status_code == 200
        ready = httpx.get(url + "/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert ready.headers["retry-after"]
        assert httpx.get(url + "/v1/models").status_code == 200
        for each in held:
            each.result()
        assert eventually(lambda: httpx.get(url + "/ready").status_code == 200)
    assert len(engine.requests) == 2


def _abandoned(url: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + COMPLETIONS, json=body, timeout=httpx.Timeout(5, read=1.0))


def test_choices_take_the_room_of_so_many_requests() -> None:
    engine = waiting(30)
    with live(engine, settings(rows=2, max_queued_requests=2)) as url, ThreadPoolExecutor(1) as pool:
        held = pool.submit(_abandoned, url, {"prompt": ["x", "y"], "n": 2})
        assert eventually(lambda: len(engine.requests) == 2)
        check_error(httpx.post(url + COMPLETIONS, json={"prompt": "x"}), 429, "server_overloaded", None)
        held.result()


def test_requests_that_are_refused_or_fail_leave_their_places() -> None:
    with api(saying("a"), settings(rows=1, max_queued_requests=0)) as client:
        for _ in range(5):
            assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
            assert client.post(COMPLETIONS, json={"prompt": ""}).status_code == 400
            assert client.post(COMPLETIONS, json={"prompt": "x", "n": 3}).status_code == 200
            assert events(client.post(COMPLETIONS, json={"prompt": "x", "stream": True}))
            assert client.get("/ready").status_code == 200


def test_a_refused_request_costs_no_reading() -> None:
    """It is answered before its body is there."""
    engine = waiting(30)
    with live(engine, settings(max_concurrent_requests=1)) as url, ThreadPoolExecutor(1) as pool:
        held = pool.submit(_abandoned, url, {"prompt": "x"})
        assert eventually(lambda: len(engine.requests) == 1)

        def endless() -> Iterable[bytes]:
            yield b'{"prompt": "'
            time.sleep(0.5)
            yield b'x"}'

        headers = {"content-type": "application/json"}
        check_error(httpx.post(url + COMPLETIONS, content=endless(), headers=headers), 429, "server_overloaded", None)
        held.result()


def test_bodies_together_have_a_limit() -> None:
    with api(settings=settings(max_body_memory=10_000)) as client:
        check_error(client.post(COMPLETIONS, json={"prompt": "x" * 20_000}), 429, "server_overloaded", None)
        for _ in range(3):  # what was taken is given back
            assert client.post(COMPLETIONS, json={"prompt": "x" * 900, "max_tokens": 1}).status_code == 200
            assert client.post(COMPLETIONS, json={"prompt": 5, "x": "x" * 9000}).status_code == 400


# deadlines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_before_the_first_token_is_a_504(stream: bool) -> None:
    def silent(request: GenerateRequest) -> Iterable[Line]:
        yield Pause(30)

    engine = fake(silent)
    with live(engine) as url:
        headers = {"x-request-timeout": "0.2"}
        response = httpx.post(url + COMPLETIONS, json={"prompt": "x", "stream": stream}, headers=headers)
        check_error(response, 504, "deadline_exceeded", None)
        assert response.json()["error"]["type"] == "timeout_error"
        assert eventually(lambda: engine.stats().running == 0)
        assert [request_id for request_id, _ in engine.cancelled] == [engine.requests[0].request_id]


def test_a_deadline_in_the_middle_of_a_stream_is_an_event() -> None:
    engine = waiting(30)
    with live(engine, settings(request_timeout=0.3)) as url:
        first, error = events(httpx.post(url + COMPLETIONS, json={"prompt": "x", "stream": True}))
        assert first["choices"][0]["text"] == "a"
        assert (error["error"]["type"], error["error"]["code"]) == ("timeout_error", "deadline_exceeded")
        assert eventually(lambda: engine.stats().running == 0)
        whole = httpx.post(url + COMPLETIONS, json={"prompt": "x"})
        check_error(whole, 504, "deadline_exceeded", None)


def test_a_deadline_that_has_passed_already_is_no_mistake_of_the_server() -> None:
    client = TestClient(build_app(fake(), tokenizer(), settings()))  # raises what the server did not foresee
    for path in (COMPLETIONS, "/health"):
        response = client.post(path, json={"prompt": "x"}, headers={"x-request-timeout": "1e-9"})
        check_error(response, 504, "deadline_exceeded", None)


def test_a_deadline_that_is_met_changes_nothing() -> None:
    with api(saying("a", " b")) as client:
        headers = {"x-request-timeout": "30"}
        assert client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers).status_code == 200
        assert len(events(client.post(COMPLETIONS, json={"prompt": "x", "stream": True}, headers=headers))) == 2
        check_error(
            client.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-timeout": "soon"}),
            400,
            "invalid_value",
            "x-request-timeout",
        )


# counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (COMPLETIONS, {"prompt": "x", "n": 3}, "n", "invalid_value"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a", "b"]}, "stop", "invalid_value"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 4}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"prompt": "x " * 30}, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"prompt": [5] * 21}, "prompt", "context_length_exceeded"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 4}, "top_logprobs", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 30}]}, "messages", "context_length_exceeded"),
    ],
)
def test_an_operator_can_allow_less(path: str, body: dict[str, Any], param: str, code: str) -> None:
    engine = fake(saying("y"))
    less = settings(max_n=2, max_stop=1, max_logprobs=3, max_prompt_chars=150, max_prompt_tokens=20)
    with api(engine, less) as client:
        check_error(client.post(path, json=body), 400, code, param)
        assert engine.requests == []
        allowed = {"prompt": "x", "n": 2, "stop": ["a"], "logprobs": 3}
        assert client.post(COMPLETIONS, json=allowed).status_code == 200
        two = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "n": 2}
        assert client.post(CHAT, json=two).status_code == 200


# health ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "health", "live_status"),
    [("ready", 200, 200), ("loading", 503, 200), ("restarting", 503, 200), ("draining", 503, 200), ("dead", 503, 503)],
)
def test_health_ready_and_live(state: Any, health: int, live_status: int) -> None:
    engine = fake()
    engine.state = state
    with api(engine) as client:
        for method in ("GET", "HEAD"):
            found = [client.request(method, path) for path in ("/health", "/ready", "/live")]
            assert [each.status_code for each in found] == [health, health, live_status]
            assert all(bool(each.content) == (method == "GET") for each in found)
            assert all(("retry-after" in each.headers) == (each.status_code == 503) for each in found)
        assert client.get("/health").json()["status"] == state


# keys and origins -----------------------------------------------------------------------------------------------------

KEYED = Security(api_keys=("sk-right", "sk-second"))


@pytest.mark.parametrize(
    "sent",
    [None, "Bearer sk-wrong", "Bearer SK-RIGHT", "sk-right", "Basic sk-right", "Bearer sk-right2", "Bearer sk-righ"],
)
def test_without_a_right_key_only_health_answers(sent: str | None) -> None:
    engine = fake(saying("y"))
    headers = {} if sent is None else {"Authorization": sent}
    with api(engine, settings(KEYED)) as client:
        for method, path in (
            ("POST", COMPLETIONS),
            ("POST", CHAT),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/nothing/here"),
            ("DELETE", COMPLETIONS),
        ):
            response = client.request(method, path, headers=headers)
            message = check_error(response, 401, "invalid_api_key", None)
            assert message.startswith("Incorrect API key provided")
            assert response.json()["error"]["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "sk-" not in response.text
        for path in ("/health", "/ready", "/live"):
            assert client.get(path, headers=headers).status_code == 200
    assert engine.requests == []


def test_each_key_opens() -> None:
    with api(saying("y"), settings(KEYED)) as client:
        for key in KEYED.api_keys:
            headers = {"Authorization": f"Bearer {key}"}
            assert client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers).status_code == 200
            assert client.get("/metrics", headers=headers).status_code == 200


def test_a_host_header_does_not_open_a_path() -> None:
    with api(settings=settings(KEYED)) as client:
        for host in ("x/health?", "a/health#", "127.0.0.1/health", "x\\health"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 401


def test_a_wrong_key_is_refused_before_the_body_is_read() -> None:
    with live(settings=settings(KEYED)) as url:

        def slowly() -> Iterable[bytes]:
            yield b"{"
            time.sleep(0.3)
            yield b"}"

        response = httpx.post(url + COMPLETIONS, content=slowly(), headers={"content-type": "application/json"})
        check_error(response, 401, "invalid_api_key", None)


def test_metrics_can_be_public() -> None:
    with api(settings=settings(Security(api_keys=("k",), metrics_public=True))) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_keys_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with api(saying("y"), settings(KEYED)) as client:
        client.post(COMPLETIONS, json={"prompt": "x"}, headers={"Authorization": "Bearer sk-wrong"})
        client.post(COMPLETIONS, json={"prompt": "x"}, headers=KEY)
    assert "sk-" not in caplog.text


def test_keys_can_share_no_prefixes() -> None:
    engine = fake(saying("y"))
    isolated = Security(api_keys=("sk-right", "sk-second"), isolate_keys=True)
    with api(engine, settings(isolated)) as client:
        for key, salt in (("sk-right", None), ("sk-second", None), ("sk-right", None), ("sk-right", "s")):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": "x"} if salt is None else {"prompt": "x", "cache_salt": salt}
            assert client.post(COMPLETIONS, json=body, headers=headers).status_code == 200
    first, second, third, salted = [request.cache_salt for request in engine.requests]
    assert first == third
    assert len({first, second, salted}) == 3
    assert "sk-" not in first


def test_no_origin_is_allowed_by_default() -> None:
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    with api() as client:
        simple = client.get("/v1/models", headers={"Origin": "https://evil.example"})
        asked = client.options(COMPLETIONS, headers=preflight)
    for response in (simple, asked):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert asked.status_code == 405


@pytest.mark.parametrize(
    ("allowed", "origin", "answer"),
    [
        (("https://chat.example",), "https://chat.example", "https://chat.example"),
        (("https://chat.example",), "https://evil.example", None),
        (("https://chat.example",), "https://chat.example.evil.example", None),
        (("*",), "https://any.example", "*"),
    ],
)
def test_origins_that_are_allowed(allowed: tuple[str, ...], origin: str, answer: str | None) -> None:
    with api(saying("y"), settings(Security(cors_origins=allowed, api_keys=("sk-right",)))) as client:
        asked = client.options(
            COMPLETIONS,
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        sent = client.post(COMPLETIONS, json={"prompt": "x"}, headers={"Origin": origin, **KEY})
    assert (asked.status_code == 200) == (answer is not None)
    if answer is None:
        assert "CORS origin" in check_error(asked, 400, "cors_not_allowed", None)
    for response in (asked, sent):
        assert response.headers.get("access-control-allow-origin") == answer
        assert "access-control-allow-credentials" not in response.headers


# the log --------------------------------------------------------------------------------------------------------------


def test_prompts_are_logged_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"prompt": "line one\nERROR: forged\u2028 " + "long " * 500, "max_tokens": 1}
    with api(saying("y")) as client:
        client.post(COMPLETIONS, json=body)
    assert "line one" not in caplog.text
    with api(saying("y"), settings(Security(log_prompts=True))) as client:
        client.post(COMPLETIONS, json=body, headers={"x-request-id": "mine"})
    (line,) = [record.getMessage() for record in caplog.records if "line one" in record.getMessage()]
    assert "mine" in line
    assert "\n" not in line
    assert line.isascii() or line.endswith("…")
    assert len(line) < 1200
    assert json.dumps("line one\nERROR: forged\u2028")[1:-1] in line


def test_many_are_turned_away_while_one_is_served() -> None:
    """What is refused is counted, and who was admitted does not feel it."""
    enough = threading.Event()

    def patient(request: GenerateRequest) -> Iterable[Line]:
        while not enough.is_set():
            yield Pause(0.02)
        yield TokenEvent(request.request_id, 0, ids("a"), finish_reason="length")

    engine = fake(patient)
    with live(engine, settings(rows=1, max_queued_requests=0)) as url, httpx.Client() as client:
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(httpx.post, url + COMPLETIONS, json={"prompt": "x"}, timeout=60)
            assert eventually(lambda: len(engine.requests) == 1)
            refused = [client.post(url + COMPLETIONS, json={"prompt": "x"}).status_code for _ in range(20)]
            enough.set()
        counted = client.get(url + "/metrics").text
    assert held.result().status_code == 200
    assert set(refused) == {429}
    assert re.search(r'saccade_http_requests_total\{method="POST",route="[^"]*",status="429"\} 20\.0', counted)
