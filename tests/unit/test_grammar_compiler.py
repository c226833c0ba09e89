"""What compiles and what is refused; what is kept of it; that each kind takes what it says."""

from __future__ import annotations

import json
import random
import string
from concurrent.futures import wait
from pathlib import Path

import pytest

from decoding.errors import RequestError
from decoding.grammar.compiler import KEPT, BackgroundCompiler, outcome
from decoding.request import MAX_GRAMMAR_BYTES, Grammar
from tests.engines import EOS, demo_tokenizer
from tests.grammars import CHOICES, choice, compiler, fulfils, matcher, regex, spelled

WHOLE = 8192  # the demo tokenizer's vocabulary
STATUS = Path("/proc/self/status")


WRONG = {
    "bad regex": Grammar("regex", "(A"),
    "bad grammar": Grammar("grammar", "start: ("),
    "bad GBNF": Grammar("grammar", "root ::= other"),
    "no schema": Grammar("json_schema", "[1]"),
    "not JSON": Grammar("json_schema", "{"),
    "unknown keyword": Grammar("json_schema", '{"type": "array", "uniqueItems": true}'),
    "unknown type": Grammar("json_schema", '{"type": "foo"}'),
    "pattern of another type": Grammar("json_schema", '{"type": "string", "pattern": 1}'),
    "nothing fulfils it": Grammar("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}'),
    "no choices": Grammar("choice", "[]"),
    "choices of another type": Grammar("choice", "[1]"),
}


@pytest.mark.parametrize("grammar", WRONG.values(), ids=list(WRONG))
def test_what_is_no_grammar_is_refused(grammar: Grammar) -> None:
    with pytest.raises(RequestError) as caught:
        compiler(WHOLE).compile(grammar)
    assert caught.value.code == "invalid_grammar"
    assert 20 < len(caught.value.message) < 400


EITHER = [{"type": "object", "properties": {key: {"type": "string"}}} for key in "ab"]
LARGE = {
    "combinations": Grammar("json_schema", json.dumps({"allOf": [{"anyOf": EITHER} for _ in range(16)]})),
    "nesting": Grammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "choices": Grammar("choice", json.dumps([str(number) for number in range(20_000)])),
}


@pytest.mark.parametrize("grammar", LARGE.values(), ids=list(LARGE))
def test_what_is_too_large_is_refused_as_such(grammar: Grammar) -> None:
    with pytest.raises(RequestError) as caught:
        compiler(WHOLE).compile(grammar)
    assert caught.value.code == "grammar_too_complex"


@pytest.mark.parametrize(
    ("grammar", "code"),
    [
        (Grammar("regex", "A" * (MAX_GRAMMAR_BYTES + 1)), "grammar_too_complex"),
        (Grammar("regex", "\ud800"), "invalid_grammar"),
        (Grammar("regex", "A\0"), "invalid_grammar"),
        (Grammar("poem", "A"), "invalid_value"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_one_is_known_without_compiling(grammar: Grammar, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammar.validate()
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (regex("^A+$"), "AA", "B"),
        (regex(r"A\\\$"), "A\\$", "A"),
        (choice("A.B", 'C"/\\\n', "é"), 'C"/\\\n', "AxB"),
        (choice("A.B", 'C"/\\\n', "é"), "é", "e"),
        (Grammar("json_object"), '{"a":[1,"b",null,{}]}', "[1]"),
        (Grammar("json_schema", "true"), "[1]", "x"),
        (Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}}}'), '{"a":5}', '{"a":"5"}'),
        (Grammar("grammar", 'start: "A" b*\nb: "B" | "C"'), "ABCB", "AA"),
        (Grammar("grammar", 'root ::= sum\nsum ::= part ("+" part)*\npart ::= [0-9]+ | "(" sum ")"'), "(1+22)+3", "1+"),
    ],
    ids=lambda each: each.kind if isinstance(each, Grammar) else "",
)
def test_every_kind_takes_what_it_says(grammar: Grammar, good: str, bad: str) -> None:
    for text, right in ((good, True), (bad, False)):
        state, tokens = matcher(grammar, WHOLE), [*text.encode()]
        byte_ids = [by_byte()[each] for each in tokens]
        # single bytes are another spelling than the tokenizer's, so the library's own matcher is asked
        taken = state._inner.try_consume_tokens(byte_ids)
        assert (taken == len(byte_ids) and bool(state._may_end())) == right


def by_byte() -> dict[int, int]:
    """The token of each single byte."""
    tokenizer = demo_tokenizer()
    spelled_by = {tokenizer.token_bytes(token): token for token in range(WHOLE) if token not in tokenizer.special_ids}
    return {byte: spelled_by[bytes([byte])] for byte in range(256) if bytes([byte]) in spelled_by}


def test_compiled_grammars_are_kept_and_failures_are_not() -> None:
    background = BackgroundCompiler(compiler())
    try:
        first = background.start(regex("A+"))
        assert background.start(regex("A+")) is first
        background.forget(regex("A+"))
        assert background.start(regex("A+")) is not first
        for _ in range(2):
            with pytest.raises(RequestError):
                outcome(background.start(regex("(")))
    finally:
        background.close()


def test_what_is_kept_is_bounded_by_number_and_by_size() -> None:
    background = BackgroundCompiler(compiler())
    try:
        first = background.start(regex("A+"))
        for number in range(KEPT - 1):
            background.start(regex(f"A{{{number + 1}}}"))
        assert background.start(regex("A+")) is first
        large = [choice(*(f"{place} {'x' * 190} {number}" for number in range(300))) for place in range(10)]
        futures = [background.start(grammar) for grammar in large]
        wait(futures)
        assert background.start(large[-1]) is futures[-1]
        assert background.start(large[0]) is not futures[0]  # 600 KB in all
        assert background.start(regex("A+")) is not first
    finally:
        background.close()


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from Linux's /proc")
def test_a_hostile_grammar_has_a_small_memory() -> None:
    """It asks which of the last forty characters were an A: another state of the lexer for each text, without end."""
    hostile = compiler(WHOLE).compile(regex("([a-z ]*a[a-z ]{40}b|[a-z ]*c[a-z ]{37}d)[^~]*"))
    letters = [token for byte, token in by_byte().items() if chr(byte) in string.ascii_lowercase]
    dice, before = random.Random(1), resident()
    for _ in range(20):
        text = hostile.start.deep_copy()
        while not text.is_error():
            text.compute_bitmask()
            text.consume_token(dice.choice(letters))
        assert "too many states" in text.get_error()
    assert resident() - before < 30 * 2**20


def resident() -> int:
    return int(STATUS.read_text().split("VmRSS:")[1].split()[0]) * 1024


def test_the_judge_of_these_tests_knows_wrong_from_right() -> None:
    assert fulfils("ABBA", choice(*CHOICES))
    assert not fulfils("ABB", choice(*CHOICES))
    assert not fulfils("A", regex("[A-H]{3,9}"))
    assert spelled([40, 41, EOS]) == "AB"
