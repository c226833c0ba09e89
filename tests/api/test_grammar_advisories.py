"""Advisories about grammars, schemas and tool calls, each as a test that it does not apply here."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from decoding.errors import RequestError
from decoding.request import Grammar
from server.grammar_worker import REMEMBERED, GrammarWorker
from server.openai.tools.base import Offer
from server.openai.tools.table import TOOL_FORMATS
from tests.api.harness import api, saying
from tests.api.test_errors import CHAT, HELLO

ROOT = Path(__file__).parents[2]


def checked(body: Callable[[GrammarWorker], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        worker = GrammarWorker(ROOT / "demo/target", lambda: 8192, seconds=20)
        try:
            await body(worker)
            await worker.check(Grammar("regex", "[a-z]+"))  # it goes on
        finally:
            await worker.close()

    asyncio.run(main())


def test_cve_2025_48942_48943_and_issue_43920_invalid_grammars_kill_nothing() -> None:
    async def body(worker: GrammarWorker) -> None:
        await worker.check(Grammar("json_schema", '{"type": "object"}'))  # a good one first
        for bad in (
            Grammar("json_schema", '{"type": "something"}'),
            Grammar("json_schema", '{"type": "string", "pattern": "("}'),
            Grammar("json_schema", "not json"),
            Grammar("regex", "(unclosed"),
            Grammar("regex", "[z-a]"),
            Grammar("grammar", "start: nothing_like_that"),
        ):
            with pytest.raises(RequestError) as raised:
                await worker.check(bad)
            assert raised.value.code in ("invalid_grammar", "grammar_too_complex")

    checked(body)


def test_cve_2025_57809_and_llama_cpp_22606_recursion_ends() -> None:
    async def body(worker: GrammarWorker) -> None:
        deep = '{"items": ' * 400 + "{}" + "}" * 400
        loop = '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'
        for hostile in (
            Grammar("json_schema", '{"$ref": "#"}'),
            Grammar("json_schema", loop),
            Grammar("json_schema", deep),
            Grammar("regex", "(((((a{1,500}){1,500}){1,500}){1,500}){1,500})"),
            Grammar("regex", "(" * 5000 + "a" + ")" * 5000),
        ):
            with contextlib.suppress(RequestError):  # served or refused, but answered
                await worker.check(hostile)

    checked(body)


def test_cve_2025_29770_and_2025_32381_unique_grammars_fill_neither_disk_nor_memory(tmp_path: Path) -> None:
    async def body(worker: GrammarWorker) -> None:
        for number in range(40):
            await worker.check(Grammar("regex", f"a{number}"))
        assert len(worker._known) <= min(REMEMBERED, 41)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path))
        checked(body)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


MALFORMED: list[Any] = [{"type": 5}, {"type": "object", "properties": {"a": {"pattern": 1}}}, "x", [1], 7]


@pytest.mark.parametrize("parameters", MALFORMED)
def test_cve_2025_48944_malformed_tool_schemas_crash_no_route(parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    with api(saying("y")) as client:
        for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
            body = {"messages": HELLO, "tools": [tool], "tool_choice": choice}
            assert client.post(CHAT, json=body).status_code in (200, 400)
        assert client.post(CHAT, json={"messages": HELLO}).status_code == 200


def test_cve_2025_48944_malformed_tool_schemas_crash_no_compiler() -> None:
    async def body(worker: GrammarWorker) -> None:
        for parameters in MALFORMED:
            with pytest.raises(RequestError):
                await worker.check(Grammar("json_schema", json.dumps(parameters)))

    checked(body)


@pytest.mark.parametrize("name", list(TOOL_FORMATS))
@pytest.mark.parametrize(
    "unit", ["[", "{", '{"name": "', "weather(", "<tool_call>", "a=", "((", "<function=weather>", "\\"]
)
def test_cve_2025_48887_tool_parsers_take_linear_time(name: str, unit: str) -> None:
    """Backtracking would not end on texts like these."""
    parser = TOOL_FORMATS[name].parser(Offer(frozenset({"weather"}), lambda: "call_1"))
    text = unit * (60_000 // len(unit))
    pieces = [*parser.push(text[:50_000]), *parser.push(text[50_000:]), *parser.finish()]
    assert len(pieces) < 20_000


@pytest.mark.parametrize("name", list(TOOL_FORMATS))
def test_cve_2025_9141_tool_parsers_run_no_code(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "written"
    code = f"__import__('pathlib').Path({str(victim)!r}).touch()"
    offer = Offer(
        frozenset({"weather"}), lambda: "call_1", schemas={"weather": {"properties": {"at": {"type": "object"}}}}
    )
    for text in (
        f"<tool_call>\n<function=weather>\n<parameter=at>\n{code}\n</parameter>\n</function>\n</tool_call>",
        f'<tool_call>{{"name": "weather", "arguments": {code}}}</tool_call>',
        f"[weather(at={code})]",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {code}}}]',
    ):
        parser = TOOL_FORMATS[name].parser(offer)
        parser.push(text)
        parser.finish()
    assert not victim.exists()
