"""Calls an ASGI application directly, without a client library: thousands of requests in a test of seconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

SECONDS = 20.0  # for one answer: whoever needs more hangs


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]


def post_all(app: ASGIApp, requests: Iterable[tuple[str, bytes]]) -> list[Answer]:
    """Post bodies to paths, one after the other; the answers in order."""

    async def main() -> list[Answer]:
        return [await post(app, path, body) for path, body in requests]

    return asyncio.run(main())


async def post(app: ASGIApp, path: str, body: bytes) -> Answer:
    """One request to its end.

    Raises:
        TimeoutError: no answer in time.
        Exception: whatever the application did not foresee; it is a mistake in it.
    """
    messages: list[Message] = []
    left = [body]

    async def receive() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    async with asyncio.timeout(SECONDS):
        await app(scope, receive, send)
    start = messages[0]
    found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(message.get("body", b"") for message in messages[1:]))
