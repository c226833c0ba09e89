"""Which replica a request goes to: the keys of its beginnings, and who has seen them. Without Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.ray.affinity import Affinity
from server.ray.prefix_keys import BLOCK_CHARS, LOOK_BYTES, MOST_KEYS, prefix_keys

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
NAMES = ("a", "b", "c", "d")
LOADS = dict.fromkeys(NAMES, 0)

texts = st.text(st.sampled_from("xyz\n é\U0001f600"), max_size=4 * BLOCK_CHARS)
loads = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 60), min_size=1)
key_lists = st.lists(st.sampled_from([f"k{n}" for n in range(12)]), unique=True, max_size=5)


def keys(path: str, owner: str = "", **fields: Any) -> tuple[str, ...]:
    return prefix_keys(path, json.dumps(fields).encode(), owner)


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Keys that two requests share from the beginning on."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


# keys ----------------------------------------------------------------------------------------------------------------


@given(texts, texts, texts)
@settings(max_examples=60)
def test_prompts_share_a_key_for_every_block_that_they_begin_with(shared: str, one: str, other: str) -> None:
    first, second = keys(COMPLETIONS, prompt=f"{shared}1{one}"), keys(COMPLETIONS, prompt=f"{shared}2{other}")
    assert common(first, second) == min(len(shared) // BLOCK_CHARS, MOST_KEYS)


def test_a_prompt_shorter_than_a_block_has_the_key_of_itself() -> None:
    assert keys(COMPLETIONS, prompt="def f") == keys(COMPLETIONS, prompt="def f", max_tokens=3, seed=1)
    assert len(keys(COMPLETIONS, prompt="def f")) == 1
    assert keys(COMPLETIONS, prompt="def f") != keys(COMPLETIONS, prompt="def g")


def test_a_conversation_keeps_its_keys_as_it_grows() -> None:
    said = [{"role": role, "content": f"{n} " * 200} for n, role in enumerate(("system", "user", "assistant", "user"))]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    before, after = keys(CHAT, messages=said[:2]), keys(CHAT, messages=said)
    assert common(before, after) == len(before) - 1 > 0  # the last one is of the whole
    assert common(keys(CHAT, messages=said), keys(CHAT, messages=said, tools=tools)) == 0
    asked = [{"role": "user", "content": "x" * 600}]
    assert common(keys(RESPONSES, input=asked), keys(RESPONSES, input=[*asked, *said])) >= 2
    assert common(keys(RESPONSES, instructions="Be brief.", input="hi"), keys(RESPONSES, input="hi")) == 0


@pytest.mark.parametrize("name", ["model", "cache_salt"])
def test_what_is_cached_apart_has_other_keys(name: str) -> None:
    assert common(keys(COMPLETIONS, prompt="x" * 999), keys(COMPLETIONS, prompt="x" * 999, **{name: "other"})) == 0
    assert common(keys(COMPLETIONS, prompt="x" * 999), keys(COMPLETIONS, owner="somebody", prompt="x" * 999)) == 0


def test_all_forms_of_a_prompt_have_keys() -> None:
    assert keys(COMPLETIONS, prompt=["x", "y"]) == keys(COMPLETIONS, prompt="x")
    assert keys(COMPLETIONS, prompt=[[1, 2], [3]]) == keys(COMPLETIONS, prompt=[1, 2]) != keys(COMPLETIONS, prompt=[1])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, b""),
        (COMPLETIONS, b"[1]"),
        (COMPLETIONS, b'{"prompt": \xff}'),
        (COMPLETIONS, b'{"prompt": {"a": 1}}'),
        (COMPLETIONS, b'{"prompt": []}'),
        (COMPLETIONS, b'{"prompt": "\\ud800"}'),
        (CHAT, b'{"messages": 3.5}'),
        ("/tokenize", b'{"prompt": "x"}'),
    ],
)
def test_a_request_without_a_text_has_no_keys_or_harmless_ones(path: str, body: bytes) -> None:
    assert len(prefix_keys(path, body)) <= 1


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600"])
def test_of_a_large_body_the_beginning_counts(character: str) -> None:
    long = json.dumps({"prompt": character * LOOK_BYTES, "max_tokens": 5}, ensure_ascii=False).encode()
    longer = json.dumps({"prompt": character * LOOK_BYTES * 2, "max_tokens": 6}, ensure_ascii=False).encode()
    assert len(prefix_keys(COMPLETIONS, long)) == MOST_KEYS
    assert prefix_keys(COMPLETIONS, long) == prefix_keys(COMPLETIONS, longer)


# replicas ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(key_lists, st.sampled_from(NAMES)), max_size=12), key_lists, loads)
def test_an_order_has_every_replica_once_and_begins_with_one_that_has_room(
    sent: list[tuple[list[str], str]], asked: list[str], now: dict[str, int]
) -> None:
    affinity = Affinity(max_imbalance=5)
    for them, replica in sent:
        affinity.remember(them, replica)
    order = affinity.order(asked, now)
    assert sorted(order) == sorted(now)
    assert now[order[0]] - min(now.values()) <= 5
    assert affinity.order(asked, now) == order


def test_a_request_follows_its_longest_beginning() -> None:
    affinity = Affinity()
    affinity.remember(["system", "ann"], "a")
    affinity.remember(["system", "bob"], "b")
    assert affinity.order(["system", "ann", "more"], LOADS)[0] == "a"
    assert affinity.order(["system", "bob", "more"], LOADS)[0] == "b"
    assert affinity.order(["system", "cleo"], LOADS | {"a": 1})[0] == "b"  # both have it: the one with less to do
    assert affinity.order(["else", "ann"], LOADS) == Affinity().order(["else", "ann"], LOADS)


def test_a_replica_with_too_much_to_do_loses_requests_to_one_that_knows_a_part() -> None:
    affinity = Affinity(max_imbalance=4)
    affinity.remember(["system", "ann"], "a")
    affinity.remember(["system"], "b")
    assert affinity.order(["system", "ann"], LOADS | {"a": 4})[0] == "a"
    assert affinity.order(["system", "ann"], LOADS | {"a": 5})[0] == "b"
    assert affinity.order(["system", "ann"], LOADS | {"a": 5, "b": 5})[0] in ("c", "d")


def test_one_hot_beginning_is_spread_over_all() -> None:
    """Everybody asks with the same beginning, and no answer ends: nobody gets much more than the others."""
    affinity, now = Affinity(max_imbalance=4), dict(LOADS)
    for _ in range(200):
        chosen = affinity.order(["hot"], now)[0]
        affinity.remember(["hot"], chosen)
        now[chosen] += 1
    assert max(now.values()) - min(now.values()) <= 5


def test_unknown_beginnings_go_where_every_router_would_send_them() -> None:
    cold = [[f"prompt {n}"] for n in range(400)]
    chosen = [Affinity().order(each, LOADS)[0] for each in cold]
    assert chosen == [Affinity().order(each, dict(reversed(LOADS.items())))[0] for each in cold]
    assert min(Counter(chosen).values()) > 60  # of 100 each
    more = [Affinity().order(each, {**LOADS, "e": 0})[0] for each in cold]
    moved = [(old, new) for old, new in zip(chosen, more) if old != new]
    assert {new for _, new in moved} == {"e"}
    assert 40 < len(moved) < 130  # of 80
    fewer = [Affinity().order(each, {name: 0 for name in NAMES if name != "b"})[0] for each in cold]
    assert all(old == new for old, new in zip(chosen, fewer) if old != "b")


def test_without_keys_the_one_with_least_to_do() -> None:
    affinity = Affinity()
    affinity.remember([], "a")
    assert affinity.order([], {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    assert affinity.order(["k"], {}) == []


@given(st.lists(st.tuples(key_lists, st.sampled_from(NAMES)), max_size=40))
def test_memory_is_bounded_and_forgets_what_was_not_used(sent: list[tuple[list[str], str]]) -> None:
    affinity = Affinity(max_keys=6)
    for them, replica in sent:
        affinity.remember(them, replica)
        assert len(affinity) <= 6
        assert not them or affinity.order(them, LOADS)[0] in NAMES
    if sent and sent[-1][0]:
        them, replica = sent[-1]
        assert affinity.order(them, {replica: 0, "new": 0})[0] == replica


def test_the_longest_beginning_is_forgotten_first() -> None:
    affinity = Affinity(max_keys=2)
    affinity.remember(["one", "two", "three"], "a")
    assert affinity.order(["one", "two"], {"a": 16, "b": 0})[0] == "a"
    assert len(affinity) == 2


def test_replicas_that_are_gone_are_forgotten() -> None:
    affinity = Affinity()
    affinity.remember(["k"], "a")
    affinity.remember(["k", "l"], "b")
    affinity.keep(["b", "c"])
    assert affinity.order(["k"], {"a": 0, "b": 9, "c": 0})[0] == "b"
    affinity.keep(["c"])
    assert len(affinity) == 0
