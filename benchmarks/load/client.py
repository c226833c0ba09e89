"""The client: requests go out, streams are read as they come. Its own cost is what limits a measurement.

One event loop, no thread. A body is encoded before its time comes; an event is decoded once, after its time was noted.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from benchmarks.load.events import StreamReader
from benchmarks.load.prompts import Prompt
from benchmarks.load.records import Record
from benchmarks.load.settings import PATHS, Sampling, Server

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 1.0  # a server may close an idle connection just when a request is on its way (RFC 9112, 9.5)
_DETAIL = 300  # characters of an error that are kept


@dataclass(frozen=True)
class Job:
    """A request, ready to go.

    Attributes:
        prompt: its prompt's number.
        wanted: tokens asked for, at most.
        category: of its prompt; None: it has none.
    """

    prompt: int
    path: str
    body: bytes
    wanted: int
    category: str | None = None


def prepare(server: Server, sampling: Sampling, number: int, prompt: Prompt) -> Job:
    """The request that asks a server to answer a prompt. The same prompt has the same seed, whoever is asked."""
    body: dict[str, Any] = {"model": server.model}
    if sampling.endpoint == "chat":
        body["messages"] = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    else:
        body["prompt"] = list(prompt.ids) or prompt.text
    body |= {"max_tokens": prompt.max_tokens, "temperature": sampling.temperature, "seed": sampling.seed + number}
    body |= {"stream": True} | ({"ignore_eos": True} if sampling.ignore_eos else {})
    if server.usage != "none":
        continuous = {"continuous_usage_stats": True} if server.usage == "continuous" else {}
        body["stream_options"] = {"include_usage": True, **continuous}
    body |= server.extra
    return Job(number, PATHS[sampling.endpoint], msgspec.json.encode(body), prompt.max_tokens, prompt.category)


def open_http(
    base_url: str, headers: Mapping[str, str], connections: int | None, timeout: float, keep_alive: bool = True
) -> httpx.AsyncClient:
    """Connections to a server, without the environment's proxies: they would be measured too.

    Args:
        keep_alive: use connections for several requests, unless they were idle for a while.
    """
    kept = connections if keep_alive else 0
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Accept-Encoding": "identity", **headers},
        timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=kept, keepalive_expiry=IDLE_SECONDS),
        trust_env=False,
        verify=ssl.create_default_context() if base_url.startswith("https") else False,
    )


async def post(http: httpx.AsyncClient, path: str, body: bytes) -> tuple[int, bytes]:
    """(status, the answer's content), read as it comes and looked at by nobody.

    Raises:
        httpx.TransportError: no answer, or not a whole one.
    """
    headers = {"Content-Type": "application/json"}
    async with http.stream("POST", path, content=body, headers=headers) as response:
        return response.status_code, b"".join([piece async for piece in response.aiter_raw()])


class LoadClient:
    """Connections to one server; an asynchronous context manager."""

    def __init__(self, server: Server, connections: int | None, timeout: float, keep_alive: bool = True) -> None:
        """
        Args:
            connections: at once, at most; None: as many as are needed.
            timeout: seconds for one request, from its sending to its end.
            keep_alive: use connections for several requests.
        """
        headers = {"Content-Type": "application/json"}
        if server.api_key:
            headers["Authorization"] = f"Bearer {server.api_key}"
        self.server = server
        self._timeout = timeout
        self._http = open_http(server.base_url, headers, connections, timeout, keep_alive)

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def get(self, path: str, timeout: float | None = None) -> httpx.Response:
        """
        Args:
            timeout: seconds; None: those of a request.

        Raises:
            httpx.TransportError: no answer.
        """
        return await self._http.get(path, timeout=self._timeout if timeout is None else timeout)

    async def send(self, job: Job, scheduled: float | None = None) -> Record:
        """Send a request and read its answer to the end. Never raises for what the server does.

        Args:
            scheduled: when it was to be sent; None: now.
        """
        reader, sent = StreamReader(), time.perf_counter()
        error, detail = await self._read(job, reader)
        ended = time.perf_counter()
        counted = reader.source not in ("chunks", "usage of the last chunk")
        return Record(
            prompt=job.prompt,
            scheduled=sent if scheduled is None else scheduled,
            sent=sent,
            ended=ended,
            arrivals=tuple(reader.arrivals),
            counts=tuple(reader.counts) if counted else None,
            source=reader.source,
            output_tokens=reader.output_tokens,
            prompt_tokens=reader.prompt_tokens,
            wanted=job.wanted,
            digest=reader.digest,
            finish_reason=reader.finish_reason,
            drafts=reader.drafts,
            error=error,
            detail=detail[:_DETAIL],
            text=reader.text if reader.source == "chunks" else "",
            category=job.category,
        )

    async def _read(self, job: Job, reader: StreamReader) -> tuple[str | None, str]:
        """(kind of failure or None, what it said)."""
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream("POST", job.path, content=job.body) as response,
            ):
                if response.status_code != 200:
                    return f"http {response.status_code}", (await response.aread()).decode(errors="replace")
                async for piece in response.aiter_raw():
                    reader.feed(piece, time.perf_counter())
        except (TimeoutError, httpx.TimeoutException) as error:
            connecting = isinstance(error, httpx.ConnectTimeout)
            return ("connection" if connecting else "timeout"), f"no end after {self._timeout:g} s"
        except httpx.RequestError as error:
            said = str(error) or type(error).__name__
            return ("truncated" if reader.arrivals else "connection"), said
        return reader.failure or (None, "")
