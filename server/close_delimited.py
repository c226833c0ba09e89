"""Answers to HTTP/1.0, which knows no chunks: one without a length ends where its connection does.

uvicorn sends chunks to everybody. RFC 9112, 6.1: a server must not, unless the request was of HTTP/1.1 or newer.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_ANY_LENGTH = 2**62


def close_delimited(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """``app`` for the request of ``cycle``, behind whose answer uvicorn closes the connection: it is of HTTP/1.0."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        endless = False

        async def send_plain(message: Message) -> None:
            nonlocal endless
            if message["type"] == "http.response.start":
                endless = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if endless:
                    cycle.chunked_encoding = False
            elif endless:
                # the cycle counts down what it was promised; two senders may wait here for a slow client, so that
                # nothing may come between the promise and what it is of
                while cycle.flow.write_paused and not cycle.disconnected:
                    await cycle.flow.drain()
                last = not message.get("more_body", False)
                cycle.expected_content_length = len(message.get("body", b"")) if last else _ANY_LENGTH
            await send(message)

        await app(scope, receive, send_plain)

    return answer
