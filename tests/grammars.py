"""Grammars for tests, and what they mean without the library that is tested."""

from __future__ import annotations

import json
import re
from functools import cache

from decoding.grammar.compiler import Compiled, GrammarCompiler
from decoding.grammar.matcher import Matcher
from decoding.request import Grammar, Reasoning
from tests.engines import EOS, VOCAB, demo_tokenizer

# over the characters ! .. H, which are the tokens of the tiny models' vocabulary
REGEXES = (
    r"[A-H]{3,9}",
    r"([A-F]+=[0-9]{1,3},)+!",
    r"ABBA(CHECK)?(DEAD|BEEF|DEEDED)[!?]{2}",
    r"\(([A-C]|\([D-H0-9]*\))*\)",
    r"#[0-9A-F]{6}",
    r".{0,20}",
)
CHOICES = ("ABBA", "ABBACHE", "BAD", "BADGE", "CABBAGE", "CAGE", "DEAD", "DEADHEAD", "0123456789", "!?!")


def regex(pattern: str) -> Grammar:
    return Grammar("regex", pattern)


def choice(*texts: str) -> Grammar:
    return Grammar("choice", json.dumps(texts))


SCHEMA = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"A": {"type": "integer", "minimum": 0, "maximum": 999}, "BEAD": {"enum": ["CAB", "DAD", 7]}},
            "required": ["A", "BEAD"],
            "additionalProperties": False,
        }
    ),
)  # needs { and }, which only large vocabularies have
GRAMMARS = (*map(regex, REGEXES), choice(*CHOICES))


def fulfils(text: str, grammar: Grammar) -> bool:
    """Whether a whole text is what the grammar says, by Python's own means."""
    if grammar.kind == "regex":
        return re.fullmatch(grammar.source, text, re.DOTALL) is not None
    return text in json.loads(grammar.source)


def spelled(tokens: list[int]) -> str:
    """The text of tokens of the tiny models, without an end."""
    return "".join(demo_tokenizer().token_text(token) for token in tokens if token != EOS)


def said(tokens: list[int], reasoning: Reasoning | None) -> list[int]:
    """What comes behind the reasoning."""
    if reasoning is None or (reasoning.open is not None and tokens[:1] != [reasoning.open]):
        return tokens
    return tokens[tokens.index(reasoning.close) + 1 :] if reasoning.close in tokens else []


@cache
def compiler(vocab_size: int = VOCAB) -> GrammarCompiler:
    return GrammarCompiler(demo_tokenizer(), vocab_size, (EOS,) if vocab_size == VOCAB else (0,))


@cache
def compiled(grammar: Grammar, vocab_size: int = VOCAB) -> Compiled:
    return compiler(vocab_size).compile(grammar)


def matcher(grammar: Grammar, vocab_size: int = VOCAB, *, min_tokens: int = 0, goes_on: bool = False) -> Matcher:
    """At the beginning of a text."""
    end = EOS if vocab_size == VOCAB else 0
    return Matcher(compiled(grammar, vocab_size), (end,), min_tokens, goes_on)
