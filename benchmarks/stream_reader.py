"""Reads many streams at once and notes when each piece came; parsing waits until all have ended.

A client that parses while it reads would be what limits a measurement of a server.
"""

from __future__ import annotations

import re
import selectors
import socket
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_PIECE_BYTES = 1 << 16
_SILENCE_SECONDS = 30.0
_TEXT = re.compile(rb'"(?:text|content)":"([^"]*)"[^\n]*\n\n')


class Stream:
    """What came over one connection, and when."""

    def __init__(self) -> None:
        self.times: list[int] = []  # nanoseconds of the monotonic clock
        self.pieces: list[bytes] = []

    def texts(self) -> list[tuple[int, int]]:
        """Of each chunk of an answer: when its last byte came, and the characters of its text.

        Raises:
            RuntimeError: the stream broke off, or is an error.
        """
        whole = b"".join(self.pieces)
        if not whole.startswith(b"HTTP/1.1 200") or b"data: [DONE]\n\n" not in whole:
            raise RuntimeError(f"a stream broke off: it ends with {whole[-300:]!r}")
        ends = list(accumulate(map(len, self.pieces)))
        return [(self.times[bisect_left(ends, found.end())], len(found[1])) for found in _TEXT.finditer(whole)]


def read_streams(port: int, requests: Sequence[bytes]) -> list[Stream]:
    """Send each request over a connection of its own to 127.0.0.1, all at once, and read them all to their ends.

    Raises:
        RuntimeError: nothing came for a long time.
    """
    with selectors.DefaultSelector() as selector:
        streams = [Stream() for _ in requests]
        for stream, request in zip(streams, requests, strict=True):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, stream)
        try:
            _read_all(selector)
        finally:
            for key in list(selector.get_map().values()):
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
    return streams


def _read_all(selector: selectors.BaseSelector) -> None:
    while selector.get_map():
        ready = selector.select(_SILENCE_SECONDS)
        if not ready:
            raise RuntimeError(f"no stream sent anything for {_SILENCE_SECONDS:.0f} s")
        for key, _ in ready:
            connection: socket.socket = key.fileobj  # type: ignore[assignment]
            piece = connection.recv(_PIECE_BYTES)
            if piece:
                key.data.times.append(time.monotonic_ns())
                key.data.pieces.append(piece)
            else:
                selector.unregister(connection)
                connection.close()


def post(path: str, body: bytes) -> bytes:
    """An HTTP request that asks for the connection to be closed after the answer."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
