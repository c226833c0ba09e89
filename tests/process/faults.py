"""What fault tests do to a server, and what must be true of it afterwards."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.api.harness import eventually
from tests.process.serving import Served

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SETTLE_SECONDS = 60.0
MIB = 2**20
GROWTH = 24 * MIB  # of a process, beyond what is known to stay: what allocators keep


@dataclass(frozen=True)
class Held:
    """What a server holds and has counted: memory in bytes.

    Attributes:
        engine: resident memory of the engine's process.
        ended: choices of answers, by the HTTP side's count, whatever became of them.
        finished: choices by the engine's count; a restarted engine begins anew.
    """

    descriptors: int
    resident: int
    engine: int
    ended: float
    finished: float
    restarts: float

    @classmethod
    def of(cls, server: Served) -> Held:
        pid, found = server.process.pid, server.metrics()
        return cls(
            len(list(Path(f"/proc/{pid}/fd").iterdir())),
            resident(pid),
            resident(server.engine_pid()),
            found["saccade_choices_ended_total"],
            found["saccade_requests_finished_total"],
            found["saccade_engine_restarts_total"],
        )


def resident(pid: int) -> int:
    """Bytes of a process that are in memory (Linux)."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def settled(server: Served, before: Held | None = None, *, descriptors: int = 1, growth: int = GROWTH) -> Held:
    """Wait until nothing is left of what was asked: no request, no page, no connection, no memory; the server serves
    on. Every choice ended once on both sides: what the HTTP process told and what the engine made are the same number.

    Args:
        before: what it held then; None: the first look.
        descriptors: that it may hold more than then; one of the last scrape's own connections may be closing.
        growth: bytes that a process may have grown by.

    Returns:
        what it holds now.
    """

    def quiet() -> bool:
        found = server.metrics()
        pages = found["saccade_pages_free"] + found["saccade_pages_cached"] == found["saccade_pages_total"]
        idle = found["saccade_running"] == found["saccade_waiting"] == 0
        return pages and idle and found["saccade_http_requests_in_flight"] == 1  # the scrape itself

    assert eventually(quiet, SETTLE_SECONDS), server.metrics()
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": [40, 41], "max_tokens": 3}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert httpx.get(f"{server.url}/ready").status_code == 200
    if before is not None:
        known = before
        assert eventually(lambda: Held.of(server).descriptors <= known.descriptors + descriptors, SETTLE_SECONDS)
        assert eventually(lambda: _balanced(known, Held.of(server)), 5), (before, Held.of(server))
        # what a burst has left goes back when nothing is to be done, which is looked for every few seconds
        assert eventually(lambda: _grown(known, Held.of(server)) < growth, SETTLE_SECONDS), (before, Held.of(server))
    return Held.of(server)


def _grown(before: Held, after: Held) -> int:
    return max(after.resident - before.resident, after.engine - before.engine)


def _balanced(before: Held, after: Held) -> bool:
    restarted = after.restarts != before.restarts
    return restarted or after.ended - before.ended == after.finished - before.finished


def open_to(url: str, receive_buffer: int | None = None) -> socket.socket:
    opened = socket.socket()
    if receive_buffer is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    opened.settimeout(60)
    opened.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    return opened


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content


def how_it_ended(client: httpx.Client, body: dict[str, Any]) -> str:
    """The one end of a streamed request: a finish reason, an error's code, or how the rule of one end was broken."""
    with client.stream("POST", "/v1/completions", json=body) as response:
        content = response.read().decode()
    if response.status_code != 200:
        return str(response.json()["error"]["code"])
    *frames, done, rest = content.split("\n\n")
    if (done, rest) != ("data: [DONE]", ""):
        return "no end"
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames if frame.startswith("data: ")]
    errors = [chunk["error"]["code"] for chunk in chunks if "error" in chunk]
    reasons = [
        choice["finish_reason"]
        for chunk in chunks
        for choice in chunk.get("choices", ())
        if choice["finish_reason"] is not None
    ]
    ends = errors or reasons
    expected = 1 if errors else body.get("n", 1)
    return str(ends[0]) if len(ends) == expected and not (errors and reasons) else f"{len(ends)} ends"


def ends_of(server: Served, bodies: Sequence[dict[str, Any]]) -> Counter[str]:
    """All at once."""
    client = httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=None))
    with client, ThreadPoolExecutor(len(bodies)) as pool:
        return Counter(pool.map(lambda body: how_it_ended(client, body), bodies))


def come_and_go(url: str, dice: random.Random, body: dict[str, Any]) -> None:
    """Connect, and leave at some moment, politely or not."""
    whole = request_bytes(body)
    with contextlib.suppress(OSError), open_to(url, dice.choice([None, 4096])) as opened:
        sent = dice.choice([0, 1, len(HEAD) // 2, len(HEAD), len(whole) - 1, len(whole), len(whole), len(whole)])
        opened.sendall(whole[:sent])
        time.sleep(dice.choice([0, 0, 0.01, 0.05, 0.2]) * dice.random())
        if dice.random() < 0.3:
            opened.settimeout(0.05)
            opened.recv(dice.choice([1, 100, 5000]))
        if dice.random() < 0.5:  # RST in place of FIN
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
