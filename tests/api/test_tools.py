"""Tools in /v1/chat/completions: what models are told, what is read of what they say, and what they are held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from decoding.errors import ConfigError
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest
from server.settings import ServerSettings
from tests.api.families import CALL, HERMES, LLAMA, MISTRAL, TIME, TOOLS, WEATHER, serving, special_tokenizer
from tests.api.harness import EOS, api, events, fake, saying, tokenizer

URL = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": TOOLS}
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"
STEPS = ("<tool_", 'call>\n{"name": "wea', 'ther", "arguments": {"ci', 'ty": "Oslo"}}\n</tool', "_call>")


def prompt(engine: Any) -> str:
    return tokenizer().decode(engine.requests[-1].prompt_ids, skip_special_tokens=False)


def choice_of(body: dict[str, Any], *said: str, template: str = HERMES, reason: str = "stop") -> dict[str, Any]:
    with api(saying(*said, reason=reason), template=template) as client:
        response = client.post(URL, json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_a_call_is_the_message() -> None:
    choice = choice_of(ASK, *STEPS)
    (call,) = choice["message"].pop("tool_calls")
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": None, "refusal": None},
        "logprobs": None,
        "finish_reason": "tool_calls",
    }
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_fragments() -> None:
    with api(saying(*STEPS, reason="stop"), template=HERMES) as client:
        chunks = events(client.post(URL, json={**ASK, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    (begin,) = deltas[1]["tool_calls"]
    assert begin.pop("id").startswith("call_")
    assert begin == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}
    fragments = [delta["tool_calls"][0] for delta in deltas[2:-1]]
    assert all(set(fragment) == {"index", "function"} for fragment in fragments)
    assert [fragment["function"]["arguments"] for fragment in fragments] == ['{"ci', 'ty": "Oslo"}']
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_text_before_a_call_is_content() -> None:
    choice = choice_of(ASK, "Let me look. ", TAGGED)
    assert choice["message"]["content"] == "Let me look. "
    assert len(choice["message"]["tool_calls"]) == 1


def test_calls_at_once_unless_one_is_wanted() -> None:
    two = TAGGED + '\n<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    calls = choice_of(ASK, two)["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["weather", "time"]
    assert calls[0]["id"] != calls[1]["id"]
    one = choice_of({**ASK, "parallel_tool_calls": False}, two)["message"]
    assert [call["function"]["name"] for call in one["tool_calls"]] == ["weather"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{broken\n</tool_call>",
        '<tool_call>{"name": "weather", "arguments": {"city": "Os',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "No tools needed <tool",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    choice = choice_of(ASK, text)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_every_choice_is_read_for_itself() -> None:
    with api(saying(*STEPS, reason="stop"), template=HERMES) as client:
        chunks = events(client.post(URL, json={**ASK, "stream": True, "n": 2}))
        whole = client.post(URL, json={**ASK, "n": 2}).json()["choices"]
    for index in range(2):
        calls = [
            c
            for chunk in chunks
            for c in chunk["choices"][0]["delta"].get("tool_calls", ())
            if chunk["choices"][0]["index"] == index
        ]
        assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Oslo"}'
    assert [len(choice["message"]["tool_calls"]) for choice in whole] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_all_tokens_keep_their_logprobs(stream: bool) -> None:
    body = {**ASK, "logprobs": True, "stream": stream}
    with api(saying("Well. ", *STEPS, reason="stop"), template=HERMES) as client:
        response = client.post(URL, json=body)
        choices = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
    tokens = [entry["token"] for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert "".join(tokens) == "Well. " + "".join(STEPS) + "<|endoftext|>"


# what models are told --------------------------------------------------------------------------------------------


def test_templates_get_tools_as_transformers_makes_them() -> None:
    engine = fake(saying("x"))
    with api(engine, template=HERMES) as client:
        strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
        client.post(URL, json={**ASK, "tools": [strict, TIME]})
    nothing = {"type": "object", "properties": {}}
    time = {"type": "function", "function": {"name": "time", "description": "", "parameters": nothing}}
    assert prompt(engine).startswith(f"<tools>{json.dumps(WEATHER)}\n{json.dumps(time)}\n</tools>")


HISTORY = [
    {"role": "user", "content": "Weather in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]


def test_templates_get_arguments_as_objects_and_results_in_their_role() -> None:
    engine = fake(saying("x"))
    with api(engine, template=HERMES) as client:
        assert client.post(URL, json={"messages": HISTORY}).status_code == 200
    assert prompt(engine).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}'
        "\n</tool_call><|im_end|>\n"
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_may_look_into_the_content_of_a_message_that_only_calls() -> None:
    engine = fake(saying("x"))
    with api(engine, template="{% for m in messages %}<{{ m.content.split('</think>')[-1] }}>{% endfor %}") as client:
        assert client.post(URL, json={"messages": HISTORY}).status_code == 200
    assert prompt(engine) == "<Weather in Oslo?><><rain>"


def test_a_template_that_asks_for_the_key_finds_calls_only_where_they_are() -> None:
    engine = fake(saying("x"))
    with api(engine, template=LLAMA) as client:
        client.post(URL, json={"messages": [*HISTORY, {"role": "assistant", "content": "Wet.", "tool_calls": []}]})
    assert prompt(engine) == (
        '<|user|>Weather in Oslo?<|assistant|>{"name": "weather", "parameters": {"city": "Oslo"}}'
        "<|ipython|>rain<|assistant|>Wet."
    )


def test_ids_of_other_servers_are_made_fit_for_mistral() -> None:
    engine = fake(saying("x"))
    with api(engine, template=MISTRAL) as client:
        assert client.post(URL, json={"messages": HISTORY}).status_code == 200
    call_id = prompt(engine).partition("[TOOL_RESULTS]rain")[2][:9]
    assert call_id.isalnum()
    assert prompt(engine).count(call_id) == 2


def test_arguments_that_are_no_object_stay_what_they_were() -> None:
    engine = fake(saying("x"))
    broken = json.loads(json.dumps(HISTORY))
    broken[1]["tool_calls"][0]["function"]["arguments"] = '{"city": '
    with api(engine, template=HERMES) as client:
        assert client.post(URL, json={"messages": broken}).status_code == 200
    assert '"arguments": "{\\"city\\": "}' in prompt(engine)


def test_without_the_choice_of_tools_the_model_knows_of_none() -> None:
    engine = fake(saying(TAGGED, reason="stop"))
    with api(engine, template=HERMES) as client:
        choice = client.post(URL, json={**ASK, "tool_choice": "none"}).json()["choices"][0]
    assert "<tools>" not in prompt(engine)
    assert (choice["message"]["content"], choice["finish_reason"]) == (TAGGED, "stop")


def test_of_allowed_tools_the_model_knows_and_of_others_not() -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
    body = {**ASK, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    engine = fake(saying(TAGGED, reason="stop"))
    with api(engine, template=HERMES) as client:
        choice = client.post(URL, json=body).json()["choices"][0]
    assert "weather" not in prompt(engine).partition("</tools>")[0]
    assert choice["message"]["content"] == TAGGED


# what they are held to -------------------------------------------------------------------------------------------


def held_to(body: dict[str, Any], said: str) -> tuple[GenerateRequest, dict[str, Any]]:
    engine = fake(saying(said, reason="stop"))
    with api(engine) as client:  # the demo's template, which has no place for tools
        response = client.post(URL, json={**ASK, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    return engine.requests[0], choice["message"]


def test_a_required_call_is_held_to_the_tools_schemas() -> None:
    call = {"name": "weather", "parameters": {"city": "Oslo"}}
    request, message = held_to({"tool_choice": "required"}, json.dumps([call, {"name": "time", "parameters": {}}]))
    assert [each["function"]["arguments"] for each in message["tool_calls"]] == ['{"city": "Oslo"}', "{}"]
    assert request.grammar is not None
    assert request.grammar.kind == "json_schema"
    schema = jsonschema.Draft202012Validator(json.loads(request.grammar.source))
    assert schema.is_valid([call, call])
    assert not schema.is_valid([])
    assert not schema.is_valid([{"name": "weather", "parameters": {}}])


def test_a_named_call_is_its_arguments() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    request, message = held_to({"tool_choice": named}, '{"city": "Oslo"}')
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert request.grammar is not None
    assert json.loads(request.grammar.source) == WEATHER["function"]["parameters"]


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


@pytest.mark.parametrize(("said", "reason"), [('{"a":1}', "stop"), (TAGGED, "tool_calls")])
def test_a_form_of_the_answer_leaves_room_for_calls(said: str, reason: str) -> None:
    engine = fake(saying(said, reason="stop"))
    with api(engine, template=HERMES) as client:
        choice = client.post(URL, json={**ASK, "response_format": FORM}).json()["choices"][0]
    assert choice["finish_reason"] == reason
    assert choice["message"]["content"] == (said if reason == "stop" else None)
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert grammar.kind == "grammar"
    assert "<tool_call>" in grammar.source


def test_where_no_grammar_can_write_calls_a_form_of_the_answer_is_refused() -> None:
    for template, form in ((MISTRAL, {"response_format": FORM}), (HERMES, {"guided_regex": "a+"})):
        with api(template=template) as client:
            error = client.post(URL, json={**ASK, **form}).json()["error"]
        assert (error["param"], error["code"]) == ("tool_choice", "unsupported_value")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"tools": TOOLS}, "tools", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name", "invalid_value"),
        (
            {"tools": [{"type": "function", "function": {"nam": "x"}}]},
            "tools.0.function.name",
            "missing_required_parameter",
        ),
        ({"tools": [TIME, TIME]}, "tools.1.function.name", "invalid_value"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
            "invalid_value",
        ),
        ({"tools": [TIME] * 513}, "tools", "invalid_value"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "description": "y" * 2**20}}]},
            "tools",
            "invalid_value",
        ),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type", "invalid_value"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
            "tool_choice.function.name",
            "invalid_value",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "missing_required_parameter",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"function_call": {"name": "f"}}, "function_call", "unsupported_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages.0.tool_call_id",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "invalid_value"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "missing_required_parameter",
        ),
    ],
)
def test_mistakes_are_named(body: dict[str, Any], param: str, code: str) -> None:
    with api() as client:
        response = client.post(URL, json={"messages": ASK["messages"], **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error


def test_functions_are_answered_with_tools() -> None:
    with api() as client:
        error = client.post(URL, json={"messages": ASK["messages"], "functions": [{"name": "f"}]}).json()["error"]
    assert "tools" in error["message"]


def test_a_model_whose_calls_nobody_can_read_has_no_free_choice() -> None:
    settings = ServerSettings(("demo",), tool_call_parser="none")
    with api(settings=settings, template=HERMES) as client:
        error = client.post(URL, json=ASK).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "--tool-call-parser" in error["message"]


def test_a_server_that_must_call_tools_and_cannot_does_not_start() -> None:
    settings = ServerSettings(("demo",), enable_auto_tool_choice=True)
    with pytest.raises(ConfigError, match="--enable-auto-tool-choice"), api(settings=settings):
        pass
    with api(settings=settings, template=HERMES):
        pass


# special tokens --------------------------------------------------------------------------------------------------


def test_markers_that_are_special_tokens_reach_the_parser_and_not_the_client(tmp_path: Path) -> None:
    text = special_tokenizer(tmp_path, MISTRAL, "[TOOL_CALLS]", "[ARGS]", "[OTHER]")

    def script(said: str) -> Any:
        tokens = tuple(text.encode(said))

        def events_of(request: GenerateRequest) -> Any:
            yield TokenEvent(request.request_id, 0, (*tokens, EOS), finish_reason="stop", stop_token=EOS)

        return events_of

    def message(said: str, **more: Any) -> dict[str, Any]:
        with serving(script(said), text) as client:
            found: dict[str, Any] = client.post(URL, json={**ASK, **more}).json()["choices"][0]["message"]
        return found

    (call,) = message('[OTHER][TOOL_CALLS]weather[ARGS]{"city": "Oslo"}')["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert len(call["id"]) == 9
    assert message("[TOOL_CALLS]none")["content"] == "none"
    assert message("[TOOL_CALLS]none", skip_special_tokens=False)["content"] == "[TOOL_CALLS]none"
    assert message("[TOOL_CALLS]none", tool_choice="none")["content"] == "none"


def test_stop_strings_end_an_output_before_it_is_read() -> None:
    choice = choice_of({**ASK, "stop": ["</tool_call>"]}, TAGGED)
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
