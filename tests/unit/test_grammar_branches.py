"""Masks along a path do not depend on which other paths were visited before: each is that of a matcher of its own."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from decoding.grammar.matcher import Matcher
from decoding.request import Grammar
from server.openai.json_schema.reading import schema_source
from tests.grammars import compiled, matcher
from tests.schemas.case import DIGIT
from tests.schemas.corpus import load

WHOLE = 8192  # the demo tokenizer's vocabulary
NESTED = {"type": "array", "items": {"type": "array", "items": DIGIT, "maxItems": 2}, "maxItems": 3}
SCHEMAS = [json.dumps(NESTED), *(schema_source(case.schema, case.name) for case in load()[::15])]


def fresh(source: str, path: tuple[int, ...]) -> np.ndarray | None:
    """The mask after a path, walked once from the beginning."""
    return matcher(Grammar("json_schema", source), WHOLE).masks([path])[0]


def same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else bool(np.array_equal(one, other))


def test_a_number_left_behind_does_not_stand_in_the_way() -> None:
    """[[1 and back to [[, then ]: what may follow is not what followed the number."""
    opened, one, closed = 2820, 24, 68
    state = matcher(Grammar("json_schema", json.dumps(NESTED)), WHOLE)
    state.masks([(opened, one)])
    assert same(state.masks([(opened, closed)])[0], fresh(json.dumps(NESTED), (opened, closed)))


class Counted(Matcher):
    """Counts its copies of the library's matcher, which take the longer the longer the text is."""

    copies = 0

    def _begin(self) -> None:
        self.copies += 1
        super()._begin()


LISTS = Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 500}))


def drawn(state: Matcher, path: tuple[int, ...], lots: random.Random) -> int:
    """A token that may come after a path, not an end while there is another."""
    [words] = state.masks([path])
    assert words is not None
    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    return int(lots.choice([token for token in allowed if token != 0] or allowed))


def test_a_text_that_is_what_was_visited_is_never_copied() -> None:
    """Plain decoding, and drafts that are accepted to the last; of others, one copy a step."""
    lots, state = random.Random(7), Counted(compiled(LISTS, WHOLE), (0,))
    for _ in range(60):
        assert state.commit([drawn(state, (), lots)]) == (1, None)
    assert state.copies == 0
    for _ in range(20):
        chain: tuple[int, ...] = ()
        for _ in range(4):
            chain = (*chain, drawn(state, chain, lots))
        assert state.commit(chain) == (4, None)
    assert state.copies == 0
    for _ in range(20):
        first = drawn(state, (), lots)
        drawn(state, (first, drawn(state, (first,), lots)), lots)
        assert state.commit([first]) == (1, None)
    assert state.copies <= 20


def test_what_is_forced_is_visited_once() -> None:
    """To be proposed, to be judged, and to become text."""
    names = {"type": "object", "properties": {name * 9: {"type": "boolean"} for name in "abc"}, "required": [*"abc"]}
    names["required"] = list(names["properties"])
    lots, state = random.Random(5), Counted(compiled(Grammar("json_schema", json.dumps(names)), WHOLE), (0,))
    forced, ending = 0, None
    while ending is None:
        chain = tuple(state.forced())
        assert all(state.allows(chain[: count + 1]) for count in range(len(chain)))
        state.masks([chain[:count] for count in range(len(chain) + 1)])
        forced += len(chain)
        _, ending = state.commit(chain or [drawn(state, (), lots)])
    assert forced > 20
    assert ending == "stop"
    assert state.copies == 0


@pytest.mark.parametrize("source", SCHEMAS)
def test_random_trees(source: str) -> None:
    lots = random.Random(source)
    state: Matcher = matcher(Grammar("json_schema", source), WHOLE)
    text: tuple[int, ...] = ()
    for _ in range(4):
        paths: list[tuple[int, ...]] = [()]
        for _ in range(12):
            parent = lots.choice(paths)
            words = fresh(source, (*text, *parent))
            if words is None:
                continue
            bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            paths.append((*parent, int(lots.choice(bits.tolist()[:6] + bits.tolist()[-6:]))))
        lots.shuffle(paths)
        for place in range(0, len(paths), 3):
            some = paths[place : place + 3]
            for path, words in zip(some, state.masks(some), strict=True):
                assert same(words, fresh(source, (*text, *path))), (text, path)
        longest = max(paths, key=len)
        kept, ending = state.commit(longest)
        text = (*text, *longest[:kept])
        if ending is not None:
            break
