"""Whole answers with very much in them: bounded, and nobody else waits while they are written."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.limits import Limits
from server.openai.choice_output import Delta, ScoredToken
from server.openai.large import FEW_SCORED, in_json, made
from server.settings import ServerSettings
from tests.api.harness import api, events, fake, ids, saying
from tests.api.test_errors import CHAT, COMPLETIONS, HELLO, check_error

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.text(), VALUES), st.integers(0, 1))
def test_pieces_make_the_same_json(answer: dict[str, Any], depth: int) -> None:
    large: Any = [answer, [], {}, "x"] * 260  # more than what is encoded at once
    for _ in range(depth):
        large = {"a": [large, answer], "b": {}}
    for value in (answer, {"choices": large}):
        assert json.loads(asyncio.run(in_json(value))) == value


def test_a_small_answer_is_made_here_and_a_large_one_in_a_thread() -> None:
    def where(scored: int) -> int:
        token = ScoredToken(1, -0.5, (), 0)
        return asyncio.run(made([Delta(0, scored=(token,) * scored)], threading.get_ident))

    assert where(FEW_SCORED) == threading.get_ident()
    assert where(FEW_SCORED + 1) != threading.get_ident()


BODIES: list[tuple[str, dict[str, Any], Callable[[dict[str, Any]], int]]] = [
    (COMPLETIONS, {"prompt": "x", "logprobs": 5}, lambda choice: len(choice["logprobs"]["tokens"])),
    (
        CHAT,
        {"messages": HELLO, "logprobs": True, "top_logprobs": 5},
        lambda choice: len(choice["logprobs"]["content"]),
    ),
]


@pytest.mark.parametrize(("path", "body", "count"), BODIES)
def test_a_large_answer_is_complete(path: str, body: dict[str, Any], count: Callable[[dict[str, Any]], int]) -> None:
    text = "word " * 100
    with api(saying(*[text] * 3)) as client:
        answer = client.post(path, json={**body, "n": 4}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {count(choice) for choice in answer["choices"]} == {3 * len(ids(text))}


@pytest.mark.parametrize(("path", "body", "count"), BODIES)
def test_what_a_whole_answer_keeps_has_a_bound(path: str, body: dict[str, Any], count: Any) -> None:
    engine = fake(saying(*["word word word "] * 20))
    few = ServerSettings(("demo",), limits=Limits(max_answer_tokens=300))
    with api(engine, few) as client:
        assert "Stream it" in check_error(client.post(path, json={**body, "n": 4}), 400, "answer_too_large", None)
        assert engine.cancelled
        assert engine.stats().running == 0
        assert events(client.post(path, json={**body, "n": 4, "stream": True}))
        plain = {name: value for name, value in body.items() if "logprobs" not in name}
        assert client.post(path, json=plain).status_code == 200
