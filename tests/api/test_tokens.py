"""What is told of tokens: best_of, which ranks by logprobs, the prompt's logprobs, token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from decoding.messages import TokenEvent, TokenLogprobs
from decoding.request import GenerateRequest
from server.fake_client import Line, Script
from tests.api.asking import ASK, CHAT, COMPLETIONS, HELLO, reached, refused
from tests.api.harness import EOS, STATS, api, events, fake, ids, saying, scored, tokenizer

# best_of -------------------------------------------------------------------------------------------------------------


def draws(*made: tuple[str, float]) -> Script:
    """Each choice says one text, all tokens of which have one logprob."""

    def script(request: GenerateRequest) -> Iterable[Line]:
        for choice, (text, logprob) in enumerate(made):
            turn = ids(text)
            scores = None if request.params.logprobs is None else tuple(scored(token, logprob) for token in turn)
            name = request.request_id
            yield TokenEvent(name, choice, turn, logprobs=scores, finish_reason="length", speculation=STATS)

    return script


FOUR = draws(("a b c", -2.0), ("return", -0.5), ("x", -1.0), ("y z", -0.5))


def test_best_of_returns_the_likeliest_for_their_length_best_first() -> None:
    with api(FOUR) as client:
        body = client.post(COMPLETIONS, json={"prompt": "p", "n": 3, "best_of": 4, "max_tokens": 8}).json()
    assert [choice["text"] for choice in body["choices"]] == ["return", "y z", "x"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert all(choice["logprobs"] is None for choice in body["choices"]), "nobody asked for them"
    made = sum(len(ids(text)) for text in ("a b c", "return", "x", "y z"))
    assert body["usage"]["completion_tokens"] == made


def test_best_of_ranks_each_prompt_s_choices_alone_and_can_tell_logprobs() -> None:
    ask = {"prompt": ["p", "q"], "best_of": 4, "logprobs": 0, "return_token_ids": True}
    engine = fake(FOUR)
    with api(engine) as client:
        body = client.post(COMPLETIONS, json=ask).json()
    assert [request.params.n for request in engine.requests] == [4, 4]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "return"), (1, "return")]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [list(ids("p")), list(ids("q"))]
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [[-0.5], [-0.5]]


def test_best_of_ranks_by_what_is_returned() -> None:
    """What follows a stop string is no part of the answer."""

    def script(request: GenerateRequest) -> Iterable[Line]:
        for choice, tail in enumerate((-9.0, -0.1)):
            tokens = ids("a b") + ids(" x c")
            logprobs = [*[-0.2 - 0.1 * choice] * 3, *[tail] * (len(tokens) - 3)]
            scores = tuple(scored(token, each) for token, each in zip(tokens, logprobs, strict=True))
            yield TokenEvent(request.request_id, choice, tokens, logprobs=scores, finish_reason="length")

    assert len(ids("a b")) == 2
    assert len(ids(" x")) == 1
    with api(script) as client:
        ask = {"prompt": "p", "best_of": 2, "stop": " x", "logprobs": 0}
        [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.2] * 3


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"best_of": 2, "n": 3}, "best_of", "n is 3"),
        ({"best_of": 129}, "best_of", "128"),
        ({"best_of": 0}, "best_of", "best_of must be"),
        ({"best_of": 2, "n": 0}, "n", "at least 1"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"best_of": 100, "prompt": ["x"] * 11}, "best_of", "1024"),
    ],
)
def test_best_of_that_cannot_be(body: dict[str, Any], param: str, word: str) -> None:
    refused(COMPLETIONS, body, param, word)


def test_best_of_one_is_plain_and_can_stream() -> None:
    with api(saying("y")) as client:
        chunks = events(client.post(COMPLETIONS, json={"prompt": "x", "best_of": 1, "stream": True}))
    assert chunks[0]["choices"][0]["text"] == "y"
    assert reached(COMPLETIONS, {"best_of": 1}).params.logprobs is None


# the prompt's logprobs -----------------------------------------------------------------------------------------------


def scoring(request: GenerateRequest) -> Iterable[Line]:
    """One token, after a prompt whose tokens have ranks 3, 1, 3, 1 ... and three alternatives."""
    prompt = request.prompt_ids
    told = [
        TokenLogprobs(token, -1.5, ((7, -0.25), (8, -0.5), (token, -1.5)), rank=3)
        if place % 2
        else TokenLogprobs(token, -0.25, ((token, -0.25), (8, -0.5), (9, -float("inf"))), rank=1)
        for place, token in enumerate(prompt[1:], start=1)
    ]
    top = request.params.prompt_logprobs
    entries = None if top is None else (None, *(replace(entry, top=entry.top[:top]) for entry in told))
    for choice in range(request.params.n):
        yield TokenEvent(
            request.request_id,
            choice,
            ids("y"),
            logprobs=None if request.params.logprobs is None else (scored(ids("y")[0]),),
            prompt_logprobs=entries if choice == 0 else None,
            finish_reason="length",
        )


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_prompt_logprobs_have_vllm_s_form(url: str) -> None:
    with api(scoring) as client:
        body = client.post(url, json={**ASK[url], "prompt_logprobs": 2}).json()
    prompt = ids("def f") if url == COMPLETIONS else tuple(tokenizer().apply_chat_template(HELLO))
    told = body["choices"][0]["prompt_logprobs"] if url == COMPLETIONS else body["prompt_logprobs"]
    assert len(told) == len(prompt)
    assert told[0] is None
    text = tokenizer().token_text
    assert told[1] == {
        str(prompt[1]): {"logprob": -1.5, "rank": 3, "decoded_token": text(prompt[1])},
        "7": {"logprob": -0.25, "rank": 1, "decoded_token": text(7)},
        "8": {"logprob": -0.5, "rank": 2, "decoded_token": text(8)},
    }
    assert list(told[1]) == [str(prompt[1]), "7", "8"], "the prompt's own token first"


def test_every_choice_has_its_prompt_s_logprobs() -> None:
    with api(scoring) as client:
        ask = {"prompt": ["a b", "c d e"], "n": 2, "prompt_logprobs": 0}
        choices = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [2, 2, 3, 3]
    assert all(len(entry) == 1 for choice in choices for entry in choice["prompt_logprobs"][1:])
    assert all(choice["logprobs"] is None for choice in choices)


def test_impossible_alternatives_have_the_least_logprob() -> None:
    with api(scoring) as client:
        ask = {"prompt": "a b c", "prompt_logprobs": 3}
        [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert choice["prompt_logprobs"][2]["9"]["logprob"] == -9999.0


def test_echo_and_prompt_logprobs_have_their_own_numbers_of_alternatives() -> None:
    with api(scoring) as client:
        ask = {"prompt": "a b c", "echo": True, "logprobs": 1, "prompt_logprobs": 3}
        [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:3]] == [2, 1]
    assert len(choice["prompt_logprobs"][2]) == 3
    assert (
        reached(COMPLETIONS, {"echo": True, "logprobs": 4, "prompt_logprobs": 1}, scoring).params.prompt_logprobs == 4
    )


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_prompt_logprobs_that_cannot_be(url: str) -> None:
    refused(url, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed")
    for value in (-1, 21):
        refused(url, {"prompt_logprobs": value}, "prompt_logprobs", "[0, 20]")


# token ids -----------------------------------------------------------------------------------------------------------


def test_token_ids_of_whole_answers() -> None:
    with api(saying("return", " n", reason="stop")) as client:
        text = client.post(COMPLETIONS, json={"prompt": "def f", "return_token_ids": True}).json()
        chat = client.post(CHAT, json={"messages": HELLO, "return_token_ids": True, "n": 2}).json()
    made = [*ids("return"), *ids(" n"), EOS]
    [choice] = text["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (list(ids("def f")), made)
    assert chat["prompt_token_ids"] == tokenizer().apply_chat_template(HELLO)
    assert [choice["token_ids"] for choice in chat["choices"]] == [made, made]
    assert text["usage"]["completion_tokens"] == len(made)


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_streamed_token_ids_are_those_of_the_whole_answer(url: str) -> None:
    """Tokens whose text is held back, in what may become a stop string, come with a text of their own: none."""
    ask = {**ASK[url], "return_token_ids": True, "stop": " three", "n": 2}
    with api(saying("one", " th", "ree four")) as client:
        whole = client.post(url, json=ask).json()["choices"]
        chunks = events(client.post(url, json={**ask, "stream": True}))
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        told = [token for choice in own for token in choice.get("token_ids", [])]
        assert told == whole[index]["token_ids"]
    expected = list(ids("def f")) if url == COMPLETIONS else tokenizer().apply_chat_template(HELLO)
    told = [
        (chunk["choices"][0]["index"], place["prompt_token_ids"])
        for chunk in chunks
        for place in (chunk["choices"][0] if url == COMPLETIONS else chunk,)
        if "prompt_token_ids" in place
    ]
    assert told == [(0, expected), (1, expected)]


def test_an_answer_of_no_tokens_has_no_ids() -> None:
    with api(saying("never")) as client:
        ask = {"prompt": "a b", "echo": True, "max_tokens": 0, "return_token_ids": True}
        [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([], list(ids("a b")))


@pytest.mark.parametrize("prompt", ["<|im_start|>return x", [1, *ids("return x")]])
@pytest.mark.parametrize("skip", [True, False])
def test_offsets_are_places_in_the_echoed_text(prompt: str | list[int], skip: bool) -> None:
    """A special token that the client wrote is part of the text; one among token ids is, if it is not skipped."""
    ask = {"prompt": prompt, "echo": True, "logprobs": 0, "skip_special_tokens": skip}
    with api(scoring) as client:
        [choice] = client.post(COMPLETIONS, json=ask).json()["choices"]
    text, told = choice["text"], choice["logprobs"]
    begin = len("<|im_start|>") if isinstance(prompt, str) or not skip else 0
    assert told["text_offset"][:3] == [0, begin, begin + len("return")]
    assert text[begin:].startswith("return x")
