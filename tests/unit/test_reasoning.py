"""Reasoning told from the answer, however the output is cut, and its tokens counted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.errors import ConfigError
from server.openai.pieces import Reasoning, Text
from server.openai.reasoning import REASONING_FORMATS, ReasoningSplitter, find_reasoning_format

PLAIN, OPEN, CLOSED = "user: hi\nassistant:\n", "assistant:\n<think>\n", "assistant:\n<think>\n\n</think>\n\n"


def split(name: str, prompt: str, parts: list[str]) -> tuple[str, str, int | None]:
    """(reasoning, answer, where the answer begins)"""
    splitter = ReasoningSplitter(REASONING_FORMATS[name], prompt)
    pieces = [piece for part in parts for piece in splitter.push(part)] + splitter.finish()
    kinds = [type(piece) for piece in pieces]
    assert kinds == sorted(kinds, key=lambda kind: kind is Text), "reasoning behind the answer"
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    return reasoning, "".join(piece.text for piece in pieces if isinstance(piece, Text)), splitter.end


CASES = [
    ("qwen3", PLAIN, "<think>\nHm.\n\nYes.\n</think>\n\nHello", ("Hm.\n\nYes.", "Hello")),
    ("qwen3", PLAIN, "\n <think>a</think>b", ("a", "b")),
    ("qwen3", PLAIN, "Hello <think>a</think>", ("", "Hello <think>a</think>")),
    ("qwen3", PLAIN, "<thin", ("", "<thin")),
    ("qwen3", PLAIN, "  ", ("", "  ")),
    ("qwen3", PLAIN, "<think>cut o", ("cut o", "")),
    ("qwen3", PLAIN, "<think>cut</thi", ("cut</thi", "")),
    ("qwen3", PLAIN, "<think></think>    indented", ("", "    indented")),
    ("qwen3", OPEN, "Hm.\n</think>\n\nHello\n", ("Hm.", "Hello\n")),
    ("qwen3", OPEN, "<think>again</think>b", ("again", "b")),
    ("qwen3", CLOSED, "Hello </think> there", ("", "Hello </think> there")),
    ("deepseek_r1", PLAIN, "Hm.</think>Hello", ("Hm.", "Hello")),
    ("deepseek_r1", PLAIN, "<think>\nHm.</think>Hello", ("Hm.", "Hello")),
    ("deepseek_r1", PLAIN, "never ends", ("never ends", "")),
    ("mistral", PLAIN, "[THINK]a < b[/THINK]c", ("a < b", "c")),
]


@pytest.mark.parametrize(("name", "prompt", "text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_reasoning_is_split_off(name: str, prompt: str, text: str, expected: tuple[str, str], size: int) -> None:
    reasoning, answer, end = split(name, prompt, [text[i : i + size] for i in range(0, len(text), size)])
    assert (reasoning, answer) == expected
    if end is not None:
        assert text[end:].lstrip("\n") == answer


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["qwen3", "deepseek_r1"]),
    st.sampled_from([PLAIN, OPEN, CLOSED]),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "\n", " ", "a", "b\n"]), max_size=12).map(
        "".join
    ),
    st.data(),
)
def test_no_cut_changes_the_split(name: str, prompt: str, text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    assert split(name, prompt, parts) == split(name, prompt, [text])


def test_formats_are_known_by_their_templates() -> None:
    found = [find_reasoning_format("auto", template) for template in ("x </think> y", "[THINK]", "<seed:think>", "")]
    assert found == [REASONING_FORMATS["qwen3"], REASONING_FORMATS["mistral"], REASONING_FORMATS["seed_oss"], None]
    assert find_reasoning_format("none", "<think>") is None
    assert find_reasoning_format("deepseek_r1", "") is REASONING_FORMATS["deepseek_r1"]
    with pytest.raises(ConfigError, match="did you mean 'qwen3'"):
        find_reasoning_format("qwen", "")
