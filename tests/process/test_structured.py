"""Structured output through the whole server: what it does together with everything else that a request can ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from benchmarks.schema_judge import complaint
from tests.api.harness import events, tokenizer
from tests.process.serving import DEMO, Served, serving

pytestmark = pytest.mark.process

PROMPT = "import json\n\nanswer = json.loads('''"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "kind": {"enum": ["function", "class", "module"]},
        "lines": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
ASK = {"max_tokens": 100, "temperature": 1, "seed": 5, "guided_json": SCHEMA}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(*DEMO, "--speculate", "prediction") as served:
        yield served


def post(server: Served, path: str = "completions", **body: Any) -> httpx.Response:
    whole = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    return httpx.post(f"{server.url}/v1/{path}", json={**whole, **ASK, **body}, timeout=60)


def ask(server: Served, path: str = "completions", **body: Any) -> dict[str, Any]:
    response = post(server, path, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check(choice: dict[str, Any]) -> str:
    """The choice's text, which is complete and right."""
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert complaint(text, SCHEMA) is None
    return text


def test_speculation_streams_and_logprobs_leave_the_text_as_it_is(server: Served) -> None:
    text = check(ask(server)["choices"][0])
    plain = ask(server, speculation=False)
    assert check(plain["choices"][0]) == text
    assert plain["usage"]["speculation"]["drafted"] == 0
    chunks = events(post(server, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert check(ask(server, logprobs=3)["choices"][0]) == text


def test_forced_tokens_come_several_at_a_time(server: Served) -> None:
    account = ask(server, speculation={"drafters": []})["usage"]["speculation"]
    assert account["tokens_per_step"] > 1.2
    assert account["by_drafter"]["forced"]["accepted"] > 0


def test_all_choices_are_right_and_the_first_is_the_only_one(server: Served) -> None:
    answer = ask(server, n=4)
    texts = [check(choice) for choice in answer["choices"]]
    assert len(set(texts)) > 1
    assert texts[0] == check(ask(server)["choices"][0])


def test_chat_and_its_fields(server: Served) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    body = {"guided_json": None, "response_format": named}
    text = check(ask(server, "chat/completions", **body)["choices"][0])
    assert check(ask(server, "chat/completions")["choices"][0]) == text
    scored = ask(server, "chat/completions", **body, logprobs=True, top_logprobs=2)["choices"][0]
    assert check(scored) == text
    spelled = b"".join(bytes(token["bytes"]) for token in scored["logprobs"]["content"][:-1])
    assert spelled.decode() == text  # the last token is the end of the text
    chunks = events(post(server, "chat/completions", **body, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_logprobs_are_the_models_own(server: Served) -> None:
    """The same tokens as a prompt that is scored, without a grammar, have the same logprobs."""
    choice = ask(server, logprobs=0)["choices"][0]
    check(choice)
    scores = choice["logprobs"]["token_logprobs"][:-1]  # the last token is the end of the text
    ids = {tokenizer().token_bytes(token): token for token in range(tokenizer().vocab_size)}
    made = [ids[token.encode()] for token in choice["logprobs"]["tokens"][:-1]]
    whole = [*tokenizer().encode(PROMPT), *made]
    scored = ask(server, guided_json=None, prompt=whole, echo=True, max_tokens=0, logprobs=0)["choices"][0]
    assert scores == pytest.approx(scored["logprobs"]["token_logprobs"][-len(made) :], abs=0.05)


def test_a_stop_string_ends_the_text_where_it_stands(server: Served) -> None:
    text = check(ask(server)["choices"][0])
    cut = ask(server, stop=['"kind"'])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index('"kind"')], "stop")


def test_too_few_tokens_leave_it_unfinished(server: Served) -> None:
    text = check(ask(server)["choices"][0])
    short = ask(server, max_tokens=4)["choices"][0]
    assert short["finish_reason"] == "length"
    assert text.startswith(short["text"])


def test_a_prediction_is_drafted_as_far_as_the_grammar_goes_along(server: Served) -> None:
    text = check(ask(server, temperature=0)["choices"][0])
    expected = {"type": "content", "content": text.replace('"kind"', '"sort"')}
    answer = ask(server, temperature=0, prediction=expected)
    assert check(answer["choices"][0]) == text
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"guided_choice": ["left", "right", "links"]}, lambda text: text in ("left", "right", "links")),
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, lambda text: text[3] == "-" and len(text) == 6 and text[:3].isdigit()),
        ({"guided_grammar": 'start: "a" (b | c)\nb: "b"\nc: /c{2}/'}, lambda text: text in ("ab", "acc")),
        ({"response_format": {"type": "json_object"}, "temperature": 0, "logit_bias": {}}, None),
    ],
)
def test_other_rules(server: Served, rule: dict[str, Any], fits: Any) -> None:
    answer = ask(server, guided_json=None, **rule)
    choice = answer["choices"][0]
    plain = ask(server, guided_json=None, **rule, speculation=False)["choices"][0]
    assert plain["text"] == choice["text"]
    if fits is not None:
        assert choice["finish_reason"] == "stop"
        assert fits(choice["text"])
    else:  # nothing makes an object end but the model
        assert choice["text"].startswith("{")
        assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["text"]), dict)


class Part(pydantic.BaseModel):
    """As people write them for the official client."""

    kind: Literal["bolt", "nut"]
    count: int = pydantic.Field(ge=1, le=20)


class Order(pydantic.BaseModel):
    urgent: bool
    parts: list[Part] = pydantic.Field(min_length=1, max_length=2)


def test_the_official_client_parses_into_models(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)
    messages: Any = [{"role": "user", "content": PROMPT}]
    done = client.chat.completions.parse(
        model="demo/target", messages=messages, response_format=Order, max_tokens=200, seed=1
    )
    order = done.choices[0].message.parsed
    assert isinstance(order, Order)
    assert 1 <= len(order.parts) <= 2


def test_the_official_clients_errors_name_the_place(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo/target", prompt="x", extra_body={"guided_json": {"type": "strin"}})
    assert (refused.value.code, refused.value.param) == ("invalid_grammar", "guided_json")
    assert "'#/type'" in refused.value.message


def test_responses_are_held_to_a_format_too(server: Served) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    done = client.responses.parse(model="demo/target", input=PROMPT, text_format=Order, max_output_tokens=200)
    assert isinstance(done.output_parsed, Order)
    wrong: Any = {"format": {"type": "json_schema", "name": "it", "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="demo/target", input=PROMPT, text=wrong)
    assert (refused.value.code, refused.value.param) == ("invalid_grammar", "text.format.schema")
