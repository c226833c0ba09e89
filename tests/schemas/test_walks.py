"""Texts that no model would write: random walks through each schema's grammar, judged like every answer.

``make test-schemas`` sets SACCADE_SCHEMA_SEEDS, for that many walks through each.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from benchmarks.schema_judge import complaint
from decoding.grammar.matcher import Matcher
from decoding.request import Grammar
from server.openai.json_schema.reading import schema_source
from tests.engines import demo_tokenizer
from tests.grammars import compiled
from tests.schemas.case import Case
from tests.schemas.corpus import load

WALKS = max(3, int(os.environ.get("SACCADE_SCHEMA_SEEDS", "1")))
WHOLE = 8192  # the demo tokenizer's vocabulary
END = 0  # its end of text
LONGEST = 400  # steps
HURRY = 80  # steps after which what closes is always preferred
CLOSING = tuple(b'"]}0123456789')


def walk(case: Case, seed: int) -> str | None:
    """A text of the grammar, drawn from all that may follow; None: it became too long."""
    lots = random.Random(f"{case.name} {seed}")
    state = Matcher(compiled(Grammar("json_schema", schema_source(case.schema, case.name)), WHOLE), (END,))
    made: list[int] = []
    for step in range(LONGEST):
        [words] = state.masks([()])
        assert words is not None, f"nothing may follow {made}"
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        others = [token for token in allowed if token != END]
        if END in allowed and (not others or lots.random() < 0.5):
            return demo_tokenizer().decode(made)
        closing = [token for token in others if demo_tokenizer().token_bytes(token)[:1][0] in CLOSING]
        made.append(lots.choice(closing if closing and lots.random() < step / HURRY else others))
        kept, ending = state.commit(made[-1:])
        assert (kept, ending) == (1, None), f"{made} ended by {ending}"
    return None


@pytest.mark.parametrize("level", range(1, 7))
def test_whatever_a_grammar_allows_satisfies_its_schema(level: int) -> None:
    wrong, short = {}, 0
    cases = [case for case in load() if case.level == level]
    for case in cases:
        for seed in range(WALKS):
            text = walk(case, seed)
            if text is None:
                continue
            short += 1
            if why := complaint(text, case.schema):
                wrong[f"{case.name}, seed {seed}"] = why
    assert not wrong
    assert short > 0.95 * len(cases) * WALKS
