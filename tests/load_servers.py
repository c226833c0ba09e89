"""Servers that stream what a test tells them to, when it tells them to: doubles for the load-testing client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

OK = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
Body = dict[str, Any]


@dataclass(frozen=True)
class Script:
    """How a request is answered.

    Attributes:
        chunks: tokens that each chunk of text holds.
        first: seconds before the first chunk.
        gap: seconds before each other one.
        usage: "continuous", "final" or "none", as far as the request asks for it.
        error: an error event in mid-stream, after the chunks.
        done: the stream ends with [DONE].
        status: other than 200: there is no stream.
        refuse: a field of stream_options that is answered with a 400.
        account: of speculation, in the last usage.
        metrics: names and by how much each request raises them, of /metrics.
    """

    chunks: Sequence[int] = (1, 1, 1, 1)
    first: float = 0.0
    gap: float = 0.0
    usage: str = "continuous"
    error: str | None = None
    done: bool = True
    status: int = 200
    refuse: str | None = None
    account: Body | None = None
    metrics: dict[str, int] = field(default_factory=dict)


@dataclass
class FakeServer:
    """Running; ``script`` says how requests are answered, given the body and how many came before.

    Attributes:
        bodies: of all requests.
        most: requests that were in flight at once.
    """

    script: Callable[[Body, int], Script]
    url: str = ""
    bodies: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most: int = 0
    counted: dict[str, int] = field(default_factory=dict)
    _running: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            if head.startswith("GET /metrics"):
                lines = [f"# TYPE {name} counter\n{name}_total {value}\n" for name, value in self.counted.items()]
                await self._plain(writer, 200, "".join(lines).encode())
            elif head.startswith("GET"):
                await self._plain(writer, 200, {"data": [{"id": "fake-model"}]})
            else:
                self.keys.append(headers.get("authorization", ""))
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                await self._answer(writer, body)
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: Body) -> None:
        script = self.script(body, len(self.bodies))
        self.bodies.append(body)
        for name, count in script.metrics.items():
            self.counted[name] = self.counted.get(name, 0) + count
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            if script.refuse is not None and script.refuse in body.get("stream_options", {}):
                script = replace(script, status=400)
            if script.status != 200:
                message = f"no, because of stream_options.{script.refuse}" if script.refuse else "no"
                await self._plain(writer, script.status, {"error": {"message": message}})
            else:
                await self._stream(writer, body, script)
        finally:
            self._running -= 1

    async def _stream(self, writer: asyncio.StreamWriter, body: Body, script: Script) -> None:
        writer.write(OK.encode())
        asked = body.get("stream_options", {})
        sent = 0
        await asyncio.sleep(script.first)
        for place, count in enumerate(script.chunks):
            if place:
                await asyncio.sleep(script.gap)
            sent += count
            choice = {"index": 0, "text": "a" * count, "finish_reason": None}
            event: Body = {"choices": [choice if "prompt" in body else _chat(choice)]}
            if script.usage == "continuous" and asked.get("continuous_usage_stats"):
                event["usage"] = {"completion_tokens": sent}
            await self._event(writer, event)
        if script.error is not None:
            await self._event(writer, {"error": {"message": script.error}})
        if script.usage != "none" and asked.get("include_usage"):
            account = {} if script.account is None else {"speculation": script.account}
            usage = {"prompt_tokens": 7, "completion_tokens": sent, **account}
            await self._event(writer, {"choices": [], "usage": usage})
        if script.done:
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()

    @staticmethod
    async def _event(writer: asyncio.StreamWriter, event: Body) -> None:
        writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await writer.drain()

    @staticmethod
    async def _plain(writer: asyncio.StreamWriter, status: int, body: Body | bytes) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()


def _chat(choice: Body) -> Body:
    return {"index": 0, "delta": {"content": choice["text"]}, "finish_reason": None}


@contextlib.contextmanager
def fake_server(script: Script | Callable[[Body, int], Script]) -> Iterator[FakeServer]:
    """A fake server on a free port, with a thread and a loop of its own."""
    server = FakeServer(script if callable(script) else lambda body, number: script)
    started, loop = threading.Event(), asyncio.new_event_loop()

    async def run(stop: asyncio.Event) -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        async with listener:
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: asyncio.Runner(loop_factory=lambda: loop).run(run(stop)))
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
