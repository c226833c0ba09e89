"""Asking both endpoints: what reaches the engine, and what is refused."""

from __future__ import annotations

from typing import Any

from decoding.request import GenerateRequest
from server.fake_client import Script
from tests.api.harness import api, fake, saying

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "import os"}]
ASK: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "def f"}, CHAT: {"messages": HELLO}}


def reached(
    url: str, body: dict[str, Any], script: Script | None = None, *, template: str | None = None
) -> GenerateRequest:
    """What of a request reaches the engine."""
    engine = fake(script or saying("y"))
    with api(engine, template=template) as client:
        response = client.post(url, json={**ASK[url], **body})
    assert response.status_code == 200, response.text
    return engine.requests[0]


def refused(url: str, body: dict[str, Any], param: str, word: str = "", *, template: str | None = None) -> None:
    """A 400 that names the field, with a word of its message."""
    with api(template=template) as client:
        response = client.post(url, json={**ASK[url], **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), response.text
    assert word in error["message"]
