"""From the bytes of a request to a JSON object, with a limit on the bytes and an OpenAI error for whatever is wrong."""

from __future__ import annotations

from typing import Any

import pydantic_core
from starlette.requests import Request

from decoding.errors import RequestError

# A body over the limit is still read, up to this many times the limit, and thrown away: a client that is answered while
# it sends would see a broken connection in place of the error.
_DISCARD_FACTOR = 4


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object.

    Lone surrogates, invalid UTF-8 and nesting deeper than 200 are errors. NaN and Infinity pass, as in Python: the
    fields refuse them, with an error that names the field.

    Raises:
        RequestError: its code is content_too_large, unsupported_media_type or invalid_json.
        ClientDisconnect: the client left while sending.
    """
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
    return _parse(await _read(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            chunks.clear()
            if received > max_bytes * _DISCARD_FACTOR:
                break
        else:
            chunks.append(chunk)
    if received > max_bytes:
        raise RequestError(
            f"The request body is too large; this server takes {max_bytes} bytes.", code="content_too_large"
        )
    return b"".join(chunks)


def _parse(body: bytes) -> dict[str, Any]:
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
