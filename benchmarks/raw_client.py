"""A client that costs next to nothing: one connection a request, bytes as they come, looked at only for their end.

For load that the server is to suffer from, not the client; ``leave`` makes it go away in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from typing import Any

_DONE = b"data: [DONE]"


@dataclass(frozen=True)
class Outcome:
    """How one request ended; times in seconds since it was sent.

    ``end`` is "done", "left" (we did), "error" (an error event in the stream), "cut" (no end), "refused" (no
    connection) or "status" (any other answer than 200).
    """

    end: str
    status: int = 0
    first_seconds: float = 0.0  # to the first byte of the answer
    seconds: float = 0.0

    @property
    def answered(self) -> bool:
        return self.end == "done"


async def ask(port: int, body: dict[str, Any], *, leave: float | None = None, seconds: float = 120.0) -> Outcome:
    """Send a request to /v1/completions on this machine and read its answer.

    Args:
        leave: seconds after which the connection is closed, whatever has come.
        seconds: to wait for the end of the answer; later it counts as cut.
    """
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    started = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Outcome("refused", seconds=time.monotonic() - started)
    try:
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        async with asyncio.timeout(seconds if leave is None else leave):
            return await _read(reader, started)
    except TimeoutError:
        return Outcome("left" if leave is not None else "cut", seconds=time.monotonic() - started)
    except OSError:
        return Outcome("cut", seconds=time.monotonic() - started)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, started: float) -> Outcome:
    line = await reader.readline()
    first = time.monotonic() - started
    received = line + await reader.read()
    status = int(line.split()[1]) if line.count(b" ") >= 2 else 0
    if status == 0:
        end = "cut"
    elif status != 200:
        end = "status"
    elif b"text/event-stream" in received[:1000]:
        end = "cut" if _DONE not in received[-200:] else "error" if b'data: {"error"' in received else "done"
    else:
        end = "done"
    return Outcome(end, status, first, time.monotonic() - started)
