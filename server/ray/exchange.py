"""One request's messages between uvicorn and Ray's proxy, and back pressure through both.

A replica sends what it makes, and what a client does not read would pile up in the proxy. So the proxy's side tells the
replica's how much the client has taken, as messages of a type of their own (``READ``) that Ray hands on like all that
is received; and the replica's side lets no more be under way than ``WINDOW``. Its application then waits as it would
for a socket, and its own limits on slow readers hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message, Receive, Send

READ = "saccade.read"
WINDOW = 64 * 1024  # bytes: what uvicorn holds for a socket before it lets the application wait
TOLD_BYTES = WINDOW // 4  # read, before the replica is told: most answers never get there


class Exchange:
    """The proxy's side.

    Args:
        receive, send: uvicorn's.
        body: that was read already. What still comes is not for the application, and thrown away.
        write_seconds: in which the client must take what was sent.
    """

    def __init__(self, receive: Receive, send: Send, body: bytes, write_seconds: float) -> None:
        self._receive = receive
        self._send = send
        self._body: bytes | None = body
        self._write_seconds = write_seconds
        self._untold = 0  # bytes that the client has read
        self._news = asyncio.Event()
        self._leaving: asyncio.Task[None] | None = None
        self.cut_off = False  # the client was: it did not read

    async def receive(self) -> Message:
        """For Ray's proxy: the body, then what the client has read, at last its leaving."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._disconnected())
        async with _ending(self._news.wait()) as news:
            await asyncio.wait({self._leaving, news}, return_when=asyncio.FIRST_COMPLETED)
        if self.cut_off or self._leaving.done():
            return {"type": "http.disconnect"}
        self._news.clear()
        read, self._untold = self._untold, 0
        return {"type": READ, "bytes": read}

    async def send(self, message: Message) -> None:
        """For Ray's proxy: hand a message to the client, unless it was cut off."""
        if self.cut_off:
            return
        try:
            async with asyncio.timeout(self._write_seconds):
                await self._send(message)
        except TimeoutError:
            self.cut_off = True
            self._news.set()
            return
        self._untold += len(message.get("body", b""))
        if self._untold >= TOLD_BYTES:
            self._news.set()

    async def close(self) -> None:
        """The request is over."""
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Window:
    """The replica's side: an application's ``receive`` and ``send`` with at most WINDOW bytes under way.

    Use it as a context manager around the application.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._received: asyncio.Queue[Message] = asyncio.Queue()  # a body that the proxy has read, and a disconnect
        self._under_way = 0
        self._gone = False
        self._moved = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Window:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reader is not None
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def receive(self) -> Message:
        """For the application."""
        if self._gone and self._received.empty():
            return {"type": "http.disconnect"}
        return await self._received.get()

    async def send(self, message: Message) -> None:
        """For the application; waits for a slow client. To one that has left everything can be sent."""
        while self._under_way > WINDOW and not self._gone:
            self._moved.clear()
            await self._moved.wait()
        self._under_way += len(message.get("body", b""))
        await self._send(message)

    async def _read(self) -> None:
        while not self._gone:
            message = await self._receive()
            if message["type"] == READ:
                self._under_way -= message["bytes"]
            else:
                self._gone = message["type"] == "http.disconnect"
                self._received.put_nowait(message)
            self._moved.set()


@contextlib.asynccontextmanager
async def _ending(work: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that does not outlive the context."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
