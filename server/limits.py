"""How much one client may take, and all of them together. Each default is written here once."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Limits:
    """Bytes, counts and seconds; ``None`` is no limit of its own."""

    # of one request
    max_body_size: int = 8 * MIB
    max_body_values: int = 65536  # strings (names too), arrays and objects of a body
    max_header_size: int = 64 * KIB  # the request line and all headers
    max_header_count: int = 256
    max_prompt_chars: int | None = None  # of one prompt; the context limits it in any case
    max_prompt_tokens: int | None = None  # of one prompt; the context limits it in any case
    max_n: int = 128
    max_stop: int = 16
    max_logprobs: int = 20

    # of all requests together
    max_queued_requests: int = 1024  # choices that wait for a place in the batch
    max_concurrent_requests: int | None = None  # HTTP requests; None: a full batch and a full queue
    max_connections: int = 4096
    max_body_memory: int = 256 * MIB  # bodies that are being read, parsed or tokenized
    max_answer_tokens: int = 2**21  # of an answer that is not streamed; each alternative with a logprob counts
    max_pending_tokens: int = 65536  # of one request, made and not read yet; each alternative with a logprob counts

    # seconds
    header_timeout: float = 10.0  # from the first byte of a request (or the connection) to the end of its headers
    body_timeout: float = 60.0  # from there to the end of its body
    write_timeout: float = 60.0  # in which a client must read something of what waits for it
    keep_alive_timeout: int = 75  # of a connection between two requests; longer than proxies keep theirs (60)
    request_timeout: float | None = None  # from a request's arrival to the end of its answer
    shutdown_timeout: float = 8.0  # for requests in flight after SIGTERM; docker kills after 10
    watchdog_timeout: float = 300.0  # in which an engine with work must finish a step
