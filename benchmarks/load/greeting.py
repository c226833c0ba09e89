"""What is found out about a server before it is measured: that it is there, its model, and how it counts tokens."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import httpx
import msgspec

from benchmarks.load.client import LoadClient, prepare
from benchmarks.load.prompts import Prompt
from benchmarks.load.records import Record
from benchmarks.load.settings import NoServerError, Sampling, Server, Usage
from decoding.errors import ConfigError

logger = logging.getLogger("saccade.bench")

_LESS: dict[Usage, Usage] = {"continuous": "final", "final": "none"}
_REFUSED = ("http 400", "http 422")


async def greet(server: Server, sampling: Sampling, prompt: Prompt, timeout: float) -> tuple[Server, Record]:
    """The server with its model's name and with what it takes of ``stream_options``, and what came of a first request.

    Servers that refuse an unknown option refuse the request: then it is sent again without that option, and the log
    says so, since figures per token are coarser without it.

    Raises:
        NoServerError: nobody answers.
        ConfigError: the server refuses a request like those that are to be measured.
    """
    async with LoadClient(server, 1, timeout) as client:
        if not server.model:
            server = replace(server, model=await _first_model(client))
        while True:
            record = await client.send(prepare(server, sampling, 0, prompt))
            if record.error not in _REFUSED or server.usage not in _LESS:
                break
            asked, server = server, replace(server, usage=_LESS[server.usage])
            if "stream_options" not in record.detail and "usage" not in record.detail:
                again = await client.send(prepare(server, sampling, 0, prompt))
                if again.error in _REFUSED:  # the option was not the reason
                    record, server = again, replace(server, usage="none")
                    break
            logger.warning("%s refuses stream_options with %s usage; it is asked for less", server.label, asked.usage)
    if record.error == "connection":
        raise NoServerError(_nobody(server, record.detail))
    if record.error is not None:
        raise ConfigError(f"{server.label} does not serve a first request: {record.error}: {said(record.detail)}")
    return server, record


async def _first_model(client: LoadClient) -> str:
    server = client.server
    try:
        response = await client.get("/v1/models")
        models: list[dict[str, Any]] = msgspec.json.decode(response.content)["data"]
        return str(models[0]["id"])
    except httpx.TransportError as error:
        raise NoServerError(_nobody(server, str(error) or type(error).__name__)) from error
    except (msgspec.DecodeError, KeyError, IndexError, TypeError) as error:
        answer = f"{response.status_code}: {said(response.text)}"
        raise ConfigError(
            f"{server.base_url}/v1/models names no model ({answer}); give one with --model, and a key with --api-key "
            "if the server asks for one"
        ) from error


def _nobody(server: Server, reason: str) -> str:
    where = f"start it, or give another address with {server.flag}"
    return f"no server answers at {server.base_url} ({reason}); {where}"


def said(text: str) -> str:
    """A server's error in few words."""
    try:
        return str(msgspec.json.decode(text)["error"]["message"])[:200]
    except (msgspec.DecodeError, KeyError, TypeError):
        return " ".join(text.split())[:200]
