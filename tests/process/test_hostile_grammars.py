"""Requests that mean harm, against a real server: each gets its answer, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.test_errors import check_error
from tests.process.serving import DEMO, Served, serving
from tests.schemas.hostile import COMPLEX, Hostile, requests

pytestmark = pytest.mark.process

REQUESTS = list(requests())
ASK = {"prompt": "answer = ", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(*DEMO) as served:
        yield served


def ask(server: Served, body: dict[str, Any] | bytes) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({**ASK, **body}).encode()
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, timeout=30)


def test_there_are_many_of_all_kinds() -> None:
    assert len(REQUESTS) >= 50
    assert len({hostile.name for hostile in REQUESTS}) == len(REQUESTS)
    refused = [hostile for hostile in REQUESTS if hostile.code is not None]
    assert len(refused) >= 50


@pytest.mark.parametrize("hostile", REQUESTS, ids=lambda hostile: hostile.name)
def test_each_is_answered_and_the_service_goes_on(server: Served, hostile: Hostile) -> None:
    engine = server.engine_pid()
    response = ask(server, hostile.body)
    if hostile.heavy and response.status_code == 400:
        check_error(response, 400, COMPLEX, hostile.param)
    elif hostile.code is None:
        assert response.status_code == 200, response.text
    else:
        message = check_error(response, 400, hostile.code, hostile.param)
        assert "Traceback" not in message
    ordinary = ask(server, {"max_tokens": 1})
    assert ordinary.status_code == 200, ordinary.text
    assert server.engine_pid() == engine


def test_afterwards_nothing_is_left(server: Served) -> None:
    for body in ({"guided_choice": ["yes", "no"]}, {"response_format": {"type": "json_object"}}):
        assert ask(server, body).status_code == 200
    found = server.metrics()
    assert found["saccade_running"] == 0
    assert found["saccade_pages_free"] + found["saccade_pages_cached"] == found["saccade_pages_total"]
    assert "Traceback" not in "".join(server.log)
