"""Fields that change what is asked of the engine: truncation, bans, a suffix; and those that are not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from starlette.testclient import TestClient
from tokenizers import decoders, models

from decoding.chat import ChatTemplate
from decoding.text import Tokenizer
from server.app import build_app
from server.openai.fim import Infill
from tests.api.asking import CHAT, COMPLETIONS, HELLO, reached, refused
from tests.api.harness import SETTINGS, api, fake, ids, saying, tokenizer

# truncation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"truncate_prompt_tokens": 2}, [5, 6]),
        ({"truncate_prompt_tokens": 9}, [3, 4, 5, 6]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [3, 4, 5]),
        ({"truncate_prompt_tokens": 1, "truncation_side": "left"}, [6]),
        ({"truncate_prompt_tokens": -1}, [3, 4, 5, 6]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 1022}, [5, 6]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 1023}, [6]),
    ],
)
def test_a_prompt_is_cut_to_its_last_tokens(body: dict[str, Any], expected: list[int]) -> None:
    assert list(reached(COMPLETIONS, {"prompt": [3, 4, 5, 6], **body}).prompt_ids) == expected


def test_text_and_messages_are_cut_too_and_an_echo_tells_what_is_left() -> None:
    assert reached(COMPLETIONS, {"prompt": "a b c d", "truncate_prompt_tokens": 2}).prompt_ids == ids("a b c d")[-2:]
    rendered = tokenizer().apply_chat_template(HELLO)
    assert list(reached(CHAT, {"truncate_prompt_tokens": 1}).prompt_ids) == rendered[-1:]
    long = {"messages": [{"role": "user", "content": "x " * 3000}], "truncate_prompt_tokens": -1, "max_tokens": 24}
    assert len(reached(CHAT, long).prompt_ids) == 1000
    with api(saying("y")) as client:
        ask = {"prompt": "a b c d", "truncate_prompt_tokens": 2, "echo": True}
        [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert choice["text"] == " c dy"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "middle"}, "truncation_side"),
        ({"truncation_side": "left"}, "truncation_side"),
    ],
)
def test_truncation_that_cannot_be(body: dict[str, Any], param: str) -> None:
    refused(COMPLETIONS, body, param, "")
    refused(CHAT, body, param, "")


def test_a_prompt_far_longer_than_what_is_kept_is_refused_unread() -> None:
    with api() as client:
        ask = {"prompt": "x" * 2_000_000, "truncate_prompt_tokens": 5}
        error = client.post(COMPLETIONS, json=ask).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


# bans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_bans_arrive_in_tokens(url: str) -> None:
    params = reached(url, {"allowed_token_ids": [5, 6], "bad_words": ["return", " x", "return"]}).params
    assert params.allowed_token_ids == (5, 6)
    assert set(params.bad_words) == {ids("return"), ids(" return"), ids(" x")}
    assert reached(url, {"bad_words": []}).params.bad_words == ()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [8192]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["5"]}, "allowed_token_ids.0"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"bad_words": ["zqj" * 80]}, "bad_words"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
    ],
)
def test_bans_that_cannot_be(body: dict[str, Any], param: str) -> None:
    refused(COMPLETIONS, body, param, "")


# a suffix ------------------------------------------------------------------------------------------------------------


def infill() -> Infill:
    found = Infill.of(tokenizer())
    assert found is not None
    return found


def test_a_suffix_becomes_the_model_s_own_form() -> None:
    vocab = tokenizer().vocab()
    before, after, middle = (vocab[f"<|fim_{part}|>"] for part in ("prefix", "suffix", "middle"))
    request = reached(COMPLETIONS, {"prompt": "def f(", "suffix": "):\n", "stop_token_ids": [9]})
    assert request.prompt_ids == (before, *ids("def f("), after, *ids("):\n"), middle)
    assert request.params.stop_token_ids == (9, *infill().ends)
    assert set(infill().ends) == {before, after, middle}
    assert reached(COMPLETIONS, {"suffix": "x", "ignore_eos": True}).params.stop_token_ids == ()


def test_several_prompts_have_one_suffix() -> None:
    engine = fake(saying("y"))
    with api(engine) as client:
        body = client.post(COMPLETIONS, json={"prompt": ["a", "b"], "suffix": "c", "n": 2}).json()
    assert len(body["choices"]) == 4
    expected = {infill().prompt(tokenizer(), text, "c", bos=True) for text in ("a", "b")}
    assert {request.prompt_ids for request in engine.requests} == expected
    with api(engine) as client:
        client.post(COMPLETIONS, json={"prompt": list(ids("a")), "suffix": "c"})
    assert engine.requests[-1].prompt_ids in expected


def test_a_suffix_that_cannot_fit_is_named() -> None:
    refused(COMPLETIONS, {"suffix": "x" * 1_000_000}, "suffix", "maximum context length")


def test_an_empty_suffix_asks_for_nothing() -> None:
    assert reached(COMPLETIONS, {"suffix": ""}).prompt_ids == ids("def f")


@pytest.mark.parametrize("other", [{"echo": True}, {"truncate_prompt_tokens": 5}])
def test_what_does_not_go_with_a_suffix(other: dict[str, Any]) -> None:
    refused(COMPLETIONS, {"suffix": "x", **other}, next(iter(other)), "suffix")


def test_a_tokenizer_without_the_tokens_cannot_fill_in() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    client = TestClient(build_app(fake(), Tokenizer(backend, {}, ChatTemplate({}, {})), SETTINGS))
    error = client.post(COMPLETIONS, json={"prompt": "a", "suffix": "b"}).json()["error"]
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")


# what is not there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "body", "word"),
    [
        (COMPLETIONS, {"use_beam_search": True}, "best_of"),
        (CHAT, {"use_beam_search": True}, "best_of"),
        (CHAT, {"documents": [{"text": "x"}]}, "messages"),
        (CHAT, {"chat_template": "{{ x }}"}, "--chat-template"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        (COMPLETIONS, {"reasoning_effort": "low"}, "reasoning_effort"),
        (COMPLETIONS, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
        (COMPLETIONS, {"thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
def test_fields_that_this_server_does_not_have(url: str, body: dict[str, Any], word: str) -> None:
    refused(url, body, next(iter(body)), word)


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_fields_without_an_effect(url: str) -> None:
    harmless = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "verbosity": "low",
        "session_id": "s",
    }
    plain = reached(url, {"seed": 1})
    assert replace(reached(url, {"seed": 1, **harmless}), request_id=plain.request_id) == plain
