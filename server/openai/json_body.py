"""From the bytes of a request to a JSON object, with limits on what they take, and errors that name what is wrong."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import pydantic_core
from starlette.requests import Request

from decoding.errors import RequestError
from server.body_memory import HeldBody
from server.limits import Limits

# A body of unknown length over the limit is still read, up to this many times the limit, and thrown away: a client that
# is answered while it sends would see a broken connection in place of the error.
_DISCARD_FACTOR = 4


async def read_json(request: Request, limits: Limits, held: HeldBody) -> dict[str, Any]:
    """The request's JSON object; its bytes stay counted in ``held``.

    Lone surrogates, invalid UTF-8 and nesting deeper than 200 are errors. NaN and Infinity pass, as in Python: the
    fields refuse them, with an error that names the field.

    Raises:
        RequestError: its code is content_too_large, unsupported_media_type or invalid_json.
        OverloadedError: all bodies together have become too large.
        LateError: it did not arrive in time.
        ClientDisconnect: the client left while sending.
    """
    _check_headers(request)
    content = await read_body(request, limits.max_body_size, held)
    _check_values(content, limits.max_body_values)
    return _parse(content)


async def read_body(request: Request, max_bytes: int, held: HeldBody) -> bytearray:
    """The request's bytes, whatever they are; they stay counted in ``held``.

    Raises:
        RequestError: its code is content_too_large.
        OverloadedError, LateError, ClientDisconnect: see ``read_json``.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:19]) > max_bytes:
        raise _too_large(max_bytes)  # what is sent all the same is thrown away below the application
    body = _Body(max_bytes, held)
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            if not body.add(chunk):
                break
    return body.content()


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(
            "Send the request with the header Content-Type: application/json.", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError(
            "Send the body as it is: this server does not decompress, so leave the header Content-Encoding out.",
            code="unsupported_media_type",
        )


class _Body:
    """Pieces of a body."""

    def __init__(self, max_bytes: int, held: HeldBody) -> None:
        self._max_bytes = max_bytes
        self._held = held
        self._content = bytearray()  # not a list: pieces of one byte would take forty each
        self._received = 0

    def add(self, chunk: bytes) -> bool:
        """Take in a piece; False when enough of a body that is too large has been read."""
        self._received += len(chunk)
        if self._received > self._max_bytes:
            self._content = bytearray()
            self._held.free()
            return self._received <= self._max_bytes * _DISCARD_FACTOR
        self._held.take(len(chunk))
        self._content += chunk
        return True

    def content(self) -> bytearray:
        """Raises RequestError when it is too large."""
        if self._received > self._max_bytes:
            raise _too_large(self._max_bytes)
        return self._content


def _too_large(max_bytes: int) -> RequestError:
    message = f"The request body is too large; this server takes {max_bytes} bytes."
    return RequestError(message, code="content_too_large")


def _check_values(body: bytearray, most: int) -> None:
    """Refuse a body of very many small values before it is parsed: nothing else runs meanwhile.

    A name costs a hundred times what its bytes cost as text. So names, strings, arrays and objects are counted, and
    numbers, of which long prompts are made, by the dozen; all by calls that take some milliseconds a megabyte.
    """
    if body.count(b'"') // 2 + _weight(body) <= most:
        return
    # some of these may stand within strings: without what is escaped, every second piece between quotes is a string
    unescaped = bytes(body).replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = unescaped.count(b'"') // 2
    if strings > most or strings + _weight(b"".join(unescaped.split(b'"')[::2])) > most:
        raise RequestError(
            f"The request body has too many values; this server takes {most} strings, arrays and objects.",
            code="invalid_json",
        )


def _weight(outside: bytes | bytearray) -> int:
    """Arrays and objects, and numbers by the dozen, in JSON without strings."""
    return outside.count(b"[") + outside.count(b"{") + outside.count(b",") // 12


def _parse(body: bytearray) -> dict[str, Any]:
    if not body.strip():
        raise RequestError("The request body is empty; send a JSON object.", code="invalid_json")
    try:
        value = pydantic_core.from_json(body)
    except ValueError as error:
        # the parser's message has the place and what was expected, and none of the input
        raise RequestError(f"The request body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    return value
