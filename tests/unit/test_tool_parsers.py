"""Tool calls out of outputs: every format, every way to cut an output, and outputs that are no calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.errors import ConfigError
from server.openai.pieces import CallArguments, CallStart, Piece, Text, settled
from server.openai.tools.base import Offer, ToolParser
from server.openai.tools.forced import ForcedArgumentsParser, ForcedCallsParser
from server.openai.tools.hermes import HermesParser
from server.openai.tools.llama3_json import Llama3JsonParser
from server.openai.tools.mistral import MistralParser, new_id, template_id
from server.openai.tools.qwen3_coder import Qwen3CoderParser, SeedOssParser
from server.openai.tools.table import TOOL_FORMATS, find_tool_format

NAMES = ("weather", "time")
PARSERS: dict[str, Callable[[Offer], ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "qwen3_coder": Qwen3CoderParser,
    "seed_oss": SeedOssParser,
    "calls": ForcedCallsParser,
    "arguments": ForcedArgumentsParser,
}
SCHEMAS = {"weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
TAGGED = "<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>"
W = '{"name": "weather", "arguments": {"city": "Oslo"}}'
P = '{"name": "time", "parameters": {"zone": [1, {"a": "}"}]}}'
OSLO = ("weather", {"city": "Oslo"})
ZONE = ("time", {"zone": [1, {"a": "}"}]})
Found = tuple[str, list[tuple[str, object]]]

CALLS: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    ("hermes", f"<tool_call>\n{W}\n</tool_call>", "", [OSLO]),
    ("hermes", f"\n\n<tool_call>{W}</tool_call>\n<tool_call>{P}</tool_call>\n", "", [OSLO, ZONE]),
    ("hermes", f"Let me see. <tool_call>{W}</tool_call>", "Let me see. ", [OSLO]),
    ("hermes", f"<tool_call>{W}</tool_call> Done.", " Done.", [OSLO]),
    ("hermes", f"<tool_call>{W}", "", [OSLO]),
    ("hermes", f"<tool_call>{W}</tool_", "", [OSLO]),
    ("hermes", f"<tool_call>{W}<tool_call>{P}", "", [OSLO, ZONE]),
    ("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}</tool_call>', "", [OSLO]),
    (
        "hermes",
        '<tool_call>{"id": 7, "name": "weather", "arguments": {"city": "Oslo"}, "x": [1]}</tool_call>',
        "",
        [OSLO],
    ),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", [("time", {})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [("time", {})]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', "", [OSLO]),
    (
        "hermes",
        '<tool_call>{"name": "time", "arguments": {"a": "1\n2\t3"},}</tool_call>',
        "",
        [("time", {"a": "1\n2\t3"})],
    ),
    (
        "hermes",
        '<tool_call>{"name":"time","arguments":{"a":"</tool_call>\\"\\\\"}}</tool_call>',
        "",
        [("time", {"a": '</tool_call>"\\'})],
    ),
    ("hermes", "plain <b>text</b> <tool", "plain <b>text</b> <tool", []),
    ("hermes", " \n ", " \n ", []),
    ("hermes", "", "", []),
    ("llama3_json", P, "", [ZONE]),
    ("llama3_json", f" <|python_tag|>{P}", "", [ZONE]),
    ("llama3_json", f"{P}; {W}", "", [ZONE, OSLO]),
    ("llama3_json", f"{P}, {W}\n", "", [ZONE, OSLO]),
    ("llama3_json", f"{P}\n<|python_tag|>{W}", "", [ZONE, OSLO]),
    ("llama3_json", '{"type": "function", "function": "time", "parameters": {}}', "", [("time", {})]),
    ("llama3_json", '{"name": "time", "parameters": {}} is it', " is it", [("time", {})]),
    ("llama3_json", f"I call: <|python_tag|>{P}", "I call: ", [ZONE]),
    ("llama3_json", f"No call: {P}", f"No call: {P}", []),
    ("llama3_json", '{"answer": {"name": "weather"}}', '{"answer": {"name": "weather"}}', []),
    ("llama3_json", '  {"name": "Ada", "parameters": {}}', '  {"name": "Ada", "parameters": {}}', []),
    ("qwen3_coder", f"<tool_call>\n{TAGGED}\n</tool_call>", "", [OSLO]),
    ("qwen3_coder", f"So. {TAGGED}{TAGGED} \n", "So. ", [OSLO, OSLO]),
    ("qwen3_coder", f"<tool_call>{TAGGED}</tool_call>\n<tool_call>{TAGGED}</tool_call>ok", "ok", [OSLO, OSLO]),
    ("qwen3_coder", f"<tool_call>{TAGGED}</tool_c", "", [OSLO]),
    ("qwen3_coder", "<tool_call><function=time></function></tool_call>", "", [("time", {})]),
    (
        "qwen3_coder",
        '<function=weather><parameter=city>3 < "4"\n\n</parameters>\n</parameter>'
        "<parameter=days>\n3\n</parameter><parameter=x>[1, True]</parameter><parameter=y>True</parameter></function>",
        "",
        [("weather", {"city": '3 < "4"\n\n</parameters>', "days": 3, "x": "[1, True]", "y": True})],
    ),
    ("seed_oss", f"Hm.<seed:tool_call>{TAGGED}</seed:tool_call>\n{TAGGED}", "Hm.", [OSLO, OSLO]),
    ("mistral", f"[TOOL_CALLS] [{W}]", "", [OSLO]),
    ("mistral", f"[TOOL_CALLS][{W}, {P}]", "", [OSLO, ZONE]),
    ("mistral", f"[TOOL_CALLS] {W}", "", [OSLO]),
    ("mistral", f"Well. [TOOL_CALLS][{W}", "Well. ", [OSLO]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Oslo"}', "", [OSLO]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time[ARGS]{}', "", [OSLO, ("time", {})]),
    ("mistral", '[TOOL_CALLS]weather[CALL_ID]aB3dE5gH1[ARGS]{"city": "Oslo"}', "", [OSLO]),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("calls", '[{"name": "weather", "parameters": {"city": "Oslo"}}]', "", [OSLO]),
    ("calls", f"\n[{W},\n{P}]\n", "", [OSLO, ZONE]),
    ("calls", W, "", [OSLO]),
    ("arguments", ' {"city": "Oslo"} ', "", [OSLO]),
]
BROKEN: list[tuple[str, str]] = [
    ("hermes", "<tool_call>weather(city)</tool_call>"),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": Oslo}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Oslo",}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {}, "arguments": {}'),
    ("hermes", '<tool_call>{"name": "format_disk", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "wea'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"n": NaN}}</tool_call>'),
    ("hermes", "<tool_call>" + '{"name": "weather", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}"),
    ("hermes", '<tool_call>{"' + "x" * 2000),
    ("hermes", "<tool_call><tool_call><tool_call>"),
    ("llama3_json", '{"name": "weather", "parameters": {"city":'),
    ("llama3_json", "<|python_tag|>import os"),
    ("qwen3_coder", "<tool_call>\n<function=disk>\n</function></tool_call>"),
    ("qwen3_coder", "<tool_call> weather</tool_call>"),
    ("qwen3_coder", "<tool_call> <funct"),
    ("qwen3_coder", "<function=weather><parameter=city>Oslo</function>"),
    ("qwen3_coder", "<function=weather>Oslo</function>"),
    ("qwen3_coder", "<function=time><parameter=a>1</parameter><parameter=a>2</parameter></function>"),
    ("qwen3_coder", "<function=" + "x" * 2000),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] nothing to call"),
    ("mistral", "[TOOL_CALLS]disk[ARGS]{}"),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city"'),
    ("mistral", "[TOOL_CALLS]" + "x" * 2000),
    ("calls", "[1]"),
    ("arguments", '{"city": '),
    ("arguments", "none"),
]


def pieces(kind: str, parts: Sequence[str], hidden: Sequence[str] = ()) -> list[Piece]:
    count = itertools.count()
    names = NAMES[:1] if kind == "arguments" else NAMES
    schemas = {name: SCHEMAS.get(name, {}) for name in names}
    parser = PARSERS[kind](Offer(frozenset(names), lambda: f"id{next(count)}", frozenset(hidden), schemas))
    found = [piece for part in parts for piece in parser.push(part)]
    return found + parser.finish()


def told(kind: str, parts: Sequence[str]) -> list[Piece]:
    """The pieces of an output that the limit of tokens cut behind these parts."""
    schemas = {name: SCHEMAS.get(name, {}) for name in NAMES[: 1 if kind == "arguments" else None]}
    parser = PARSERS[kind](Offer(frozenset(schemas), lambda: "id", schemas=schemas))
    return [piece for part in parts for piece in parser.push(part)] + parser.finish(cut=True)


def content(found: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in found if isinstance(piece, Text))


def calls(found: Sequence[Piece]) -> list[tuple[str, str]]:
    arguments: dict[int, str] = {}
    for piece in found:
        if isinstance(piece, CallArguments):
            arguments[piece.index] = arguments.get(piece.index, "") + piece.fragment
    return [(piece.name, arguments.get(piece.index, "")) for piece in found if isinstance(piece, CallStart)]


def read(kind: str, parts: Sequence[str]) -> Found:
    found = settled(pieces(kind, parts))
    return content(found), [(name, json.loads(arguments)) for name, arguments in calls(found)]


@pytest.mark.parametrize(("kind", "text", "said", "called"), CALLS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_calls_are_found(kind: str, text: str, said: str, called: list[tuple[str, object]], size: int) -> None:
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert read(kind, parts) == (said, called)


@pytest.mark.parametrize(("kind", "text"), BROKEN)
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_what_is_no_call_is_text(kind: str, text: str, size: int) -> None:
    said, called = read(kind, [text[i : i + size] for i in range(0, len(text), size)])
    assert (said, called) == (text, [])


def test_a_broken_call_does_not_take_the_next_one_with_it() -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {{"city": "Oslo"}}</tool_call><tool_call>{P}</tool_call>'
    said, called = read("hermes", [text])
    assert called == [ZONE]
    assert said == text[: text.index("<tool_call>", 5)]


def test_a_call_that_does_not_end_does_not_take_the_next_one_with_it() -> None:
    begun = "<tool_call><function=weather><parameter=city>Rome</parameter>"
    for text in (f"{begun}<tool_call>{TAGGED}", f"{begun}{TAGGED}"):
        assert read("qwen3_coder", [text]) == read("qwen3_coder", list(text)) == (begun, [OSLO])


@pytest.mark.parametrize(("kind", "text"), [case[:2] for case in CALLS])
def test_a_call_that_the_limit_cuts_stays_one(kind: str, text: str) -> None:
    """Wherever that is: what a stream has told of before is what the whole answer has."""
    for place in range(len(text)):
        found, by_character = told(kind, [text[:place]]), told(kind, list(text[:place]))
        assert settled(found) == found
        assert content(found) == content(by_character)
        assert calls(found) == calls(by_character)


def test_a_calls_pieces_come_as_soon_as_they_are_certain() -> None:
    parser = HermesParser(Offer(frozenset(NAMES), lambda: "id"))
    steps = ["Hm <tool", '_call>{"name": "weath', 'er", "arguments"', ': {"ci', 'ty": "Os', 'lo"}', "}</tool_call>"]
    assert [parser.push(step) for step in steps] == [
        [Text("Hm ")],
        [],
        [],
        [CallStart(0, "id", "weather"), CallArguments(0, '{"ci')],
        [CallArguments(0, 'ty": "Os')],
        [CallArguments(0, 'lo"}')],
        [],
    ]


def test_ids_are_new_for_each_call() -> None:
    found = pieces("hermes", [f"<tool_call>{W}</tool_call><tool_call>{P}</tool_call>"])
    assert [(p.index, p.id) for p in found if isinstance(p, CallStart)] == [(0, "id0"), (1, "id1")]


def test_special_markers_are_hidden_where_they_mark_nothing() -> None:
    assert content(pieces("mistral", ["a[ARGS]b [TOOL_CALLS]no"], ["[TOOL_CALLS]", "[ARGS]"])) == "ab no"
    assert content(pieces("mistral", ["a[ARGS]b [TOOL_CALLS]no"])) == "a[ARGS]b [TOOL_CALLS]no"


FRAGMENTS = st.sampled_from(
    [TAGGED, "<function=weather>", "<parameter=city>", "</parameter>", "</function>", "<function="]
    + [
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[",
        "]",
        "{",
        "}",
        '"',
        "\\",
        ",",
        ":",
    ]
    + ["name", '"name"', '"arguments"', '"weather"', W, P, "weather", " ", "\n", "null", "1", "é", ";", "<", "\x00"]
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(PARSERS)), st.lists(FRAGMENTS, max_size=14).map("".join), st.data())
def test_no_cut_changes_what_is_read(kind: str, text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    whole, cut = pieces(kind, [text]), pieces(kind, parts)
    assert content(cut) == content(whole)
    assert calls(cut) == calls(whole)
    said, called = read(kind, parts)  # all arguments are objects
    assert all(isinstance(arguments, dict) for _, arguments in called)
    if not called:
        assert said == text


HOSTILE = [
    "<tool_call>" * 4_000,
    '<tool_call>{"name"' * 4_000,
    "<tool_call>" + '{"a":' * 10_000,
    "<" * 40_000,
    " " * 40_000 + "x",
    '<tool_call>{"name": "weather", "arguments": {"a": "' + '\\"' * 20_000,
    f"<tool_call>{W}</tool_call>" * 800,
    f"<tool_call>{W}" + "</tool_cal" * 4_000,
    "[TOOL_CALLS]" * 4_000,
    "<function=weather>" * 3_000,
    "<function=weather><parameter=city>" + "\n</parameter" * 4_000,
    "<function=weather><parameter=x>" + "[" * 30_000 + "</parameter></function>",
    "[TOOL_CALLS]" + "[ARGS]" * 8_000,
    ";" * 40_000,
]


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_outputs_are_read_to_their_end(kind: str, number: int) -> None:
    text = HOSTILE[number]
    whole, cut = pieces(kind, [text]), pieces(kind, [text[i : i + 5] for i in range(0, len(text), 5)])
    assert content(cut) == content(whole)
    assert calls(cut) == calls(whole)


# formats ---------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "hermes": "{% if tools %}<tools>{{ tools | tojson }}</tools> answer in <tool_call></tool_call>{% endif %}",
    "llama3_json": 'Respond in the format {"name": f, "parameters": dictionary of argument name and value}',
    "qwen3_coder": "{% if tools %}<tool_call>\n<function=example_function_name>\n<parameter=x>{% endif %}",
    "seed_oss": "{% if tools %}<seed:tool_call>\n<function=example_function_name>{% endif %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{% if message.tool_calls %}[TOOL_CALLS]{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_known_by_their_templates(name: str) -> None:
    assert find_tool_format("auto", TEMPLATES[name]) is TOOL_FORMATS[name]
    assert find_tool_format(name, "") is TOOL_FORMATS[name]


def test_a_template_of_another_family_has_no_format() -> None:
    assert find_tool_format("auto", "{{ messages }}") is None
    assert find_tool_format("auto", "<tool_call>{name}<arg_key>{key}</arg_key>") is None
    assert find_tool_format("auto", "<|python_tag|> or <function=name>{arguments}</function>") is None
    assert find_tool_format("none", TEMPLATES["hermes"]) is None


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mistral'"):
        find_tool_format("mistrall", "")


def test_ids_of_mistral_are_nine_letters_and_digits() -> None:
    for made in (new_id(), template_id("call_0123456789abcdef"), template_id("x")):
        assert len(made) == 9
        assert made.isalnum()
    assert template_id("aB3dE5gH1") == "aB3dE5gH1"
    assert template_id("call_1") == template_id("call_1") != template_id("call_2")
