"""What stands around the application in Ray Serve, without Ray: the proxy's middleware, a double of Ray, the replicas.

The double does what Ray's proxy does with messages (ray/serve/_private/proxy.py): it hands on all that is received,
adds a request id, answers what it cannot route in plain text, and leaves an answer as it is when its replica dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import build_app
from server.fake_client import FakeEngineClient, Pause
from server.limits import Limits
from server.ray.proxy_middleware import FLAGS, ProxyMiddleware, chain, proxy_settings
from server.ray.replica_app import ELSEWHERE, REPLICA, ReplicaApp
from server.security import Security
from tests.api.harness import SETTINGS, events, fake, saying, tokenizer

SESSION = "x-session-id"
ASK = {"prompt": "def fib(n):\n", "max_tokens": 3}


class FakeRay:
    """Sends each request to the first replica that it is not kept from.

    Attributes:
        sessions: what was told of each request that came.
        dies_after: messages that the next answer has before its replica dies.
    """

    def __init__(self, replicas: dict[str, ASGIApp]) -> None:
        self.replicas = replicas
        self.sessions: list[str | None] = []
        self.scopes: list[Scope] = []
        self.dies_after: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        told = headers.get(SESSION, "")
        self.sessions.append(headers.get(SESSION))
        self.scopes.append(scope)
        names = [name for name in self.replicas if f"!{name}" not in told.split()] or list(self.replicas)
        if not names:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Deployment 'replica' at 192.0.2.1 is unavailable"})
            return
        left = self.dies_after

        async def send_on(message: Message) -> None:
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    raise _DiedError
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", headers["x-request-id"].encode())]
            await send(message)

        with contextlib.suppress(_DiedError):  # as Ray: nothing more is sent
            await self.replicas[names[0]](scope, receive, send_on)


class _DiedError(Exception):
    pass


def replica(name: str, engine: FakeEngineClient) -> ReplicaApp:
    return ReplicaApp(build_app(engine, tokenizer(), SETTINGS), name, lambda: engine.state == "ready")


def client(ray: FakeRay, limits: Limits | None = None, security: Security | None = None) -> TestClient:
    app = ProxyMiddleware(ray, limits or Limits(), security or Security(), SESSION)
    return TestClient(app, raise_server_exceptions=False)


def one(script: Any = None) -> FakeRay:
    return FakeRay({"a": replica("a", fake(script or saying("return", " n")))})


async def ask(app: ASGIApp, method: str, receive: Receive) -> list[Message]:
    """What is sent in answer to a request whose body comes as it is received."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": "/v1/completions", "query_string": b"", "headers": headers}
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    return sent


def error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers.get_list("x-request-id")) == 1
    found: dict[str, Any] = response.json()["error"]
    return found


# what is the application's stays as it is ----------------------------------------------------------------------------


def test_answers_are_the_applications_and_name_who_gave_them() -> None:
    whole = client(one()).post("/v1/completions", json=ASK)
    assert whole.json()["choices"][0]["text"] == "return n"
    assert whole.headers[REPLICA] == "a"
    stream = client(one()).post("/v1/completions", json={**ASK, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(stream)) == "return n"


def test_requests_are_told_by_their_beginnings_and_nobody_else_can_tell() -> None:
    ray = one()
    forged = {SESSION: "forged", "X_Session_ID": "forged", "serve_multiplexed_model_id": "m"}
    forged |= {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0.001", REPLICA: "a"}
    for body in (ASK, {**ASK, "seed": 3}, {**ASK, "cache_salt": "mine"}):
        assert client(ray).post("/v1/completions", json=body, headers=forged).status_code == 200
    assert ray.sessions[0] == ray.sessions[1] != ray.sessions[2]
    assert "forged" not in str(ray.sessions)
    seen = {name.decode().lower() for name, _ in ray.scopes[0]["headers"]}
    assert not seen & {"serve_multiplexed_model_id", "x-request-disconnect-disabled", "x-request-timeout-seconds"}


def test_one_replica_can_be_asked_for_its_health_by_name() -> None:
    ray = one()
    answer = client(ray).get("/health", headers={REPLICA: "b"})
    assert (answer.status_code, ray.sessions) == (200, ["=b"])


def test_ids_are_the_clients_if_sane_and_come_once() -> None:
    sane = client(one()).post("/v1/completions", json=ASK, headers={"x-request-id": "mine-1"})
    assert sane.headers.get_list("x-request-id") == ["mine-1"]
    odd = client(one()).post("/v1/completions", json=ASK, headers={"x-request-id": "<mine>"})
    assert odd.headers["x-request-id"].startswith("req-")


def test_rays_own_paths_are_left_to_it() -> None:
    async def ray(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"success"})

    app = ProxyMiddleware(ray, Limits(), Security(("key",)), SESSION)
    assert TestClient(app).get("/-/healthz").text == "success"


# limits hold before a replica is asked -------------------------------------------------------------------------------


def test_keys_and_sizes_are_checked_before_a_body_is_kept() -> None:
    ray = one()
    told = error(client(ray, security=Security(("key",))).post("/v1/completions", json=ASK))
    assert (told["type"], told["code"]) == ("authentication_error", "invalid_api_key")
    refused = client(ray, Limits(max_body_size=20)).post("/v1/completions", json=ASK)
    assert (refused.status_code, error(refused)["code"]) == (413, "content_too_large")
    busy = client(ray, Limits(max_body_memory=20)).post("/v1/completions", json=ASK)
    assert (busy.status_code, error(busy)["type"]) == (429, "rate_limit_error")
    assert int(busy.headers["retry-after"]) >= 1
    assert ray.sessions == []
    known = client(ray, security=Security(("key",))).post(
        "/v1/completions", json=ASK, headers={"authorization": "Bearer key"}
    )
    assert known.status_code == 200


def test_keys_are_kept_apart_if_they_are_isolated() -> None:
    ray = one()
    for isolated in (False, True):
        asking = client(ray, security=Security(("ann", "bob"), isolate_keys=isolated))
        for key in ("ann", "bob"):
            asking.post("/v1/completions", json=ASK, headers={"authorization": f"Bearer {key}"})
    assert ray.sessions[0] == ray.sessions[1]
    assert len(set(ray.sessions)) == 3


def test_a_body_that_does_not_come_is_a_408() -> None:
    async def nothing() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    app = ProxyMiddleware(one(), Limits(body_timeout=0.05), Security(), SESSION)
    start, body = asyncio.run(ask(app, "POST", nothing))
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "request_timeout"


def test_a_body_that_no_endpoint_reads_goes_nowhere() -> None:
    async def endless() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    got: list[Message] = []

    async def ray(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await receive())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                got.append(await receive())
        await send({"type": "http.response.start", "status": 405, "headers": [(REPLICA.encode(), b"a")]})
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(ask(ProxyMiddleware(ray, Limits(), Security(), SESSION), "GET", endless))
    assert got == [{"type": "http.request", "body": b"", "more_body": False}]


def test_web_pages_ask_first_without_a_key_and_can_read_errors() -> None:
    environment = {FLAGS: "m --cors-origins https://chat.example", "SACCADE_API_KEY": "key"}
    app: ASGIApp = one()
    for each in chain(environment):
        app = each.cls(app, *each.args, **each.kwargs)
    asking = TestClient(app, raise_server_exceptions=False)
    page = {"origin": "https://chat.example"}
    first = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert asking.options("/v1/completions", headers=first).status_code == 200
    refused = asking.post("/v1/completions", json=ASK, headers=page)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")
    assert "access-control-allow-origin" not in asking.post("/v1/completions", json=ASK).headers


def test_the_memory_of_bodies_is_free_again() -> None:
    ray = one()
    asking = client(ray, Limits(max_body_memory=60))
    assert [asking.post("/v1/completions", json=ASK).status_code for _ in range(5)] == [200] * 5


def test_settings_come_from_the_environment() -> None:
    flags = {FLAGS: "demo/target --max-body-size 1M --isolate-keys", "SACCADE_API_KEY": "ann,bob"}
    limits, security = proxy_settings(flags)
    assert (limits.max_body_size, security.api_keys, security.isolate_keys) == (2**20, ("ann", "bob"), True)
    assert proxy_settings({}) == (Limits(), Security())


# what goes wrong in Ray has our envelope -----------------------------------------------------------------------------


def test_no_replica_is_a_503_that_says_nothing_of_the_inside() -> None:
    told = client(FakeRay({})).post("/v1/completions", json=ASK)
    assert (told.status_code, error(told)["code"]) == (503, "server_is_overloaded")
    assert int(told.headers["retry-after"]) >= 1
    assert "192.0.2.1" not in told.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_before_it_answers_is_one_error(stream: bool) -> None:
    ray = one()
    ray.dies_after = 0
    told = client(ray).post("/v1/completions", json={**ASK, "stream": stream})
    assert (told.status_code, error(told)["code"]) == (503, "engine_dead")
    assert len(ray.sessions) == 1  # what killed one replica is not sent to the next


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/completions", ASK, "data: [DONE]"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "data: [DONE]"),
        ("/v1/responses", {"input": "x"}, "event: error"),
    ],
)
def test_a_stream_whose_replica_dies_ends_with_one_error(path: str, body: dict[str, Any], last: str) -> None:
    ray = one()
    ray.dies_after = 2
    lines = client(ray).post(path, json={**body, "stream": True}).text.split("\n\n")[:-1]
    errors = [line for line in lines if '"engine_dead"' in line]
    assert len(errors) == 1
    assert lines[-1].startswith(last)
    assert json.loads(errors[0].partition("data: ")[2])["error"]["type"] == "service_unavailable_error"


def test_a_mistake_in_the_proxy_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def ray(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("of Ray")

    app = ProxyMiddleware(ray, Limits(), Security(), SESSION)
    told = TestClient(app, raise_server_exceptions=False).post("/v1/completions", json=ASK)
    assert (told.status_code, error(told)["code"]) == (500, "internal_error")
    assert "of Ray" not in told.text
    assert "of Ray" in caplog.text


# an engine that restarts ---------------------------------------------------------------------------------------------


def test_a_request_that_meets_a_restarting_engine_goes_to_another_replica() -> None:
    down = fake(saying("no"))
    down._state = "restarting"
    ray = FakeRay({"a": replica("a", down), "b": replica("b", fake(saying("yes")))})
    answer = client(ray).post("/v1/completions", json=ASK)
    assert (answer.json()["choices"][0]["text"], answer.headers[REPLICA]) == ("yes", "b")
    assert ray.sessions[1] == f"!a {ray.sessions[0]}"
    assert client(ray).get("/health").status_code == 503  # which is asked of one, and told as it is


def test_where_all_restart_the_client_is_told_so_once() -> None:
    engines = [fake(saying("no")) for _ in "abc"]
    for engine in engines:
        engine._state = "restarting"
    ray = FakeRay({name: replica(name, engine) for name, engine in zip("abc", engines)})
    told = client(ray).post("/v1/completions", json=ASK)
    assert (told.status_code, error(told)["code"]) == (503, "server_is_overloaded")
    assert len(ray.sessions) == 2
    assert ELSEWHERE not in told.headers


def test_a_slow_script_streams_through_the_window() -> None:
    """The application's own disconnect check works on what the window hands it."""
    ray = one(lambda request: [Pause(0.02), *saying("a", "b")(request)])
    answer = client(ray).post("/v1/completions", json={**ASK, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(answer)) == "ab"
