"""What may follow: masks against their definition, at every path of a tree, in whatever order it is walked."""

from __future__ import annotations

import json
import random
import string
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.errors import RequestError
from decoding.grammar.compiler import KEPT, LIMITS, BackgroundCompiler, GrammarCompiler, outcome
from decoding.grammar.masks import GrammarMasks, unpacked_anywhere, unpacked_by_host
from decoding.grammar.matcher import Matcher, words_of
from decoding.request import MAX_GRAMMAR_BYTES, Grammar
from models.tree import GUESSED, NO_PARENT, PINS, Trees
from tests.engines import EOS, VOCAB, demo_tokenizer
from tests.grammars import CHOICES, GRAMMARS, SCHEMA, choice, compiled, compiler, fulfils, matcher, regex, spelled

WHOLE = 8192  # the demo tokenizer's vocabulary
END = 0  # its end of text
CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")


def allowed(state: Matcher, path: tuple[int, ...] = ()) -> set[int] | None:
    [words] = state.masks([path])
    if words is None:
        return None
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def ids(text: str) -> tuple[int, ...]:
    return tuple(demo_tokenizer().encode(text))


# masks by definition -------------------------------------------------------------------------------------------------


def follows(text: bytes, end: int, vocab_size: int) -> set[int]:
    """Of the choices: every token after which one of them can still be written, and the end after a whole one."""
    tokenizer, wholes = demo_tokenizer(), [each.encode() for each in CHOICES]
    found = {end} if text in wholes else set()
    for token in set(range(vocab_size)) - tokenizer.special_ids:
        more = text + tokenizer.token_bytes(token)
        if more != text and any(whole.startswith(more) for whole in wholes):
            found.add(token)
    return found


@pytest.mark.parametrize(("vocab_size", "end"), [(VOCAB, EOS), (WHOLE, END)])
def test_a_mask_has_what_can_still_become_one_of_the_choices(vocab_size: int, end: int) -> None:
    state, seen, forced = matcher(choice(*CHOICES), vocab_size), 0, 0
    paths: list[tuple[int, ...]] = [()]
    while paths:
        path = paths.pop()
        text = b"".join(demo_tokenizer().token_bytes(token) for token in path)
        expected, found = follows(text, end, vocab_size), allowed(state, path)
        assert found is not None
        if found != expected:  # bytes that must come are asked for in the tokenizer's own spelling
            assert len(found) == 1
            assert found < expected
            forced += 1
        seen += 1
        paths += [(*path, token) for token in found - {end}]
    assert seen > 40
    assert (forced > 0) == (vocab_size == WHOLE), "among single characters there is but one spelling"


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.source[:12])
def test_a_mask_is_what_a_fresh_matcher_takes(grammar: Grammar) -> None:
    random = np.random.default_rng(3)
    state, text = matcher(grammar), ()
    for _ in range(12):
        found = allowed(state, text)
        assert found is not None
        for token in range(VOCAB):
            fresh = matcher(grammar)
            kept, ending = fresh.commit((*text, token))
            assert (token in found) == (kept == len(text) + 1), (text, token)
            assert (ending == "stop") == (token == EOS and token in found)
        followers = sorted(found - {EOS})
        if not followers:
            break
        text = (*text, int(random.choice(followers)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grammar=st.sampled_from([*GRAMMARS, SCHEMA]),
    steps=st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**16)), max_size=9), max_size=5),
)
def test_masks_are_a_function_of_the_tokens(grammar: Grammar, steps: list[list[tuple[int, int]]]) -> None:
    """Trees are walked in any order, text is committed between them: what may follow a path is what it always is."""
    vocab_size = WHOLE if grammar is SCHEMA else VOCAB
    state, text = matcher(grammar, vocab_size), ()
    for tree in steps:
        paths: list[tuple[int, ...]] = [()]
        for parent, pick in tree:
            above = paths[parent % len(paths)]
            followers = sorted(allowed(state, above) or range(VOCAB))
            # every fourth one is anything, most likely refused
            paths.append((*above, pick % VOCAB if pick % 4 == 0 else followers[pick % len(followers)]))
        for path, words in zip(paths, state.masks(paths), strict=True):
            fresh = matcher(grammar, vocab_size)
            alive = fresh.commit(text)[1] is None
            [alone] = fresh.masks([path]) if alive else [None]
            assert (words is None) == (alone is None), path
            assert words is None or np.array_equal(words, alone), path
        kept, ending = state.commit(paths[-1])
        text = (*text, *paths[-1][:kept])
        if ending is not None:
            return


# the end of a text ---------------------------------------------------------------------------------------------------


def test_the_end_comes_where_the_text_is_complete() -> None:
    state = matcher(regex("AB?"))
    assert allowed(state) == {40}
    assert allowed(state, (40,)) == {41, EOS}
    assert allowed(state, (40, 41)) == {EOS}
    assert allowed(state, (40, EOS)) is None, "nothing goes on after an end"
    assert allowed(state, (41,)) is None, "no text gets there"
    assert state.commit([40, 41]) == (2, None)
    assert state.commit([EOS, 40]) == (1, "stop")


@pytest.mark.parametrize("wish", [{"min_tokens": 3}, {"goes_on": True}])
def test_a_text_that_is_to_go_on_ends_where_it_must(wish: dict[str, int]) -> None:
    state = matcher(regex("AB?C?"), **wish)  # type: ignore[arg-type]
    assert allowed(state, (40,)) == {41, 42}
    assert allowed(state, (40, 41)) == {42}
    assert allowed(state, (40, 42)) == {EOS}
    if "min_tokens" in wish:
        assert allowed(matcher(regex("A*"), **wish), (40, 40, 40)) == {40, EOS}  # type: ignore[arg-type]


def test_a_model_without_an_end_ends_with_the_grammar() -> None:
    state = Matcher(compiled(regex("AB")), ())
    assert state.forced() == [40, 41]
    assert state.commit([40]) == (1, None)
    assert state.commit([41, 40]) == (1, "stop")


def test_stop_tokens_end_a_complete_text_too() -> None:
    state = Matcher(compiled(regex("A+")), (EOS, 8))
    assert allowed(state) == {40}
    assert allowed(state, (40,)) == {40, EOS, 8}
    assert state.commit([40, 8, 40]) == (2, "stop")


def test_before_min_tokens_a_stop_token_is_no_text_unless_it_must_be() -> None:
    bound = Matcher(compiled(regex("[AB]{1,3}(A|C)?")), (EOS, 40), min_tokens=2)
    assert allowed(bound) == {41}
    assert allowed(bound, (41,)) == {41, 42}
    assert allowed(bound, (41, 41)) == {EOS, 40, 41, 42}
    assert allowed(Matcher(compiled(regex("AB")), (EOS, 40), min_tokens=2)) == {40}
    free = Matcher(compiled(regex("[AB]{2}")), (EOS, 40), goes_on=True)
    assert allowed(free) == {40, 41}, "ignore_eos does not ignore stop tokens"


# what is forced ------------------------------------------------------------------------------------------------------


def test_forced_tokens_follow_as_the_text_does() -> None:
    state = matcher(SCHEMA, WHOLE)
    begin = state.forced()
    assert demo_tokenizer().decode(begin) == '{"A":'[: len(demo_tokenizer().decode(begin))]
    assert begin
    taken = 0
    while state.forced():
        [token] = [state.forced()[0]]
        assert allowed(state) == {token}, "the mask asks for the same spelling"
        assert state.commit([token])[0] == 1
        taken += 1
    assert taken >= len(begin)
    assert len(allowed(state) or ()) > 1


def test_the_end_is_forced_when_nothing_else_can_follow() -> None:
    state = matcher(choice("CABBAGE"), WHOLE)
    assert state.forced() == [*ids("CABBAGE"), END]
    assert state.allows(ids("CABBAGE"))
    assert not state.allows(ids("CAB")[:1]) or ids("CAB")[:1] == ids("CABBAGE")[:1], "one spelling alone is offered"


# the library's limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"max_items_in_row": 20}, {"step_max_items": 50}], ids=["next token", "mask"])
def test_beyond_the_limits_a_text_ends_where_plain_decoding_ends(limits: dict[str, int]) -> None:
    """Ambiguity grows with the text, until a token cannot be taken, or what follows cannot be computed."""
    limited = GrammarCompiler(demo_tokenizer(), VOCAB, (EOS,), {**LIMITS, **limits})
    start = limited.compile(Grammar("grammar", 'start: s\ns: s s | "A" | "A" s "A"'))
    lengths = []
    for depth in (0, 1, 3, 6):  # plain; then with drafts, whose masks are made before the tokens are taken
        state, text, ending = Matcher(start, (EOS,)), 0, None
        while ending is None:
            state.masks([(40,) * level for level in range(depth + 1)])
            kept, ending = state.commit([40] * (depth + 1))
            text += kept
            assert text < 100
        assert ending == "error"
        lengths.append(text)
    assert lengths[0] > 3
    assert len(set(lengths)) == 1


# tensors -------------------------------------------------------------------------------------------------------------


def test_masks_are_applied_to_the_logits_of_each_node() -> None:
    masks = GrammarMasks([matcher(regex("AB?")), None], VOCAB, CPU)
    row, depth = np.array([0, 0, 1, 0]), np.array([0, 1, 0, 2])
    filled = masks.fill(
        row, depth, np.array([[-1, -1], [40, -1], [-1, -1], [-1, -1]])
    )  # of the last one no path is known
    x = masks.apply(torch.randn(4, VOCAB), filled)
    left = [set((line > -torch.inf).nonzero().squeeze(1).tolist()) for line in x]
    everything = set(range(VOCAB))
    assert left == [{40}, {41, EOS}, everything, everything]
    columns = torch.tensor([1, 41, 46])  # of a draft vocabulary
    y = masks.apply(torch.randn(4, 3), filled, columns)
    assert [(line > -torch.inf).tolist() for line in y[:2]] == [[True] * 3, [False, True, False]]


def test_refused_drafts_are_dropped_and_pinned_ones_stay() -> None:
    masks = GrammarMasks([matcher(regex("AB[CD]"))], VOCAB, CPU)
    tokens = torch.tensor([[1, 40, 41, 42, 41, 40, 40]])
    parents = torch.tensor([[NO_PARENT, 0, 1, 2, 0, 4, 3]])
    source = torch.tensor([[0, 1, 1, 1, 1, 1 | 1 << PINS, 1]])
    source[0, 4] |= 1 << PINS
    kept = masks.permitted(Trees(tokens, parents, torch.full((1, 7), 0.5), source))
    assert kept.tokens.tolist() == [[1, 40, 41, 42, 41, 40, -1]]
    assert kept.parents.tolist() == [[NO_PARENT, 0, 1, 2, 0, 4, NO_PARENT]]
    assert (kept.source & GUESSED).tolist() == [[0, 1, 1, 1, 0, 0, 0]]
    assert (kept.source >> PINS).tolist() == [[0, 0, 0, 0, 1, 1, 0]]
    kept.validate()


@pytest.mark.parametrize("vocab_size", [31, 32, 48, 101])
def test_bits_are_unpacked_alike_everywhere(vocab_size: int) -> None:
    allowed = torch.rand(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) < 0.5
    filled = torch.zeros(5, words_of(vocab_size), dtype=torch.int64)
    for token in range(vocab_size):
        filled[:, token // 32] |= allowed[:, token].long() << token % 32
    filled = filled.to(torch.int32)  # bit 31 is the sign
    assert torch.equal(unpacked_by_host(filled, vocab_size), allowed)
    assert torch.equal(unpacked_anywhere(filled, vocab_size), allowed)


def test_a_slow_matcher_has_no_drafts() -> None:
    class Slow(Matcher):
        is_slow = True

    tokens, parents = torch.tensor([[1, 40]] * 2), torch.tensor([[NO_PARENT, 0]] * 2)
    masks = GrammarMasks([Slow(compiled(regex("A")), (EOS,)), matcher(regex("A"))], VOCAB, CPU)
    kept = masks.permitted(Trees(tokens, parents, torch.full((2, 2), 0.5), torch.tensor([[0, 1]] * 2)))
    assert kept.tokens.tolist() == [[1, -1], [1, 40]]
    assert kept.parents.tolist() == [[NO_PARENT, NO_PARENT], [NO_PARENT, 0]]


def test_a_mask_has_room_for_the_bit_behind_the_last_id() -> None:
    assert [words_of(size) for size in (31, 32, 33, 64)] == [1, 2, 2, 3]


# compiling -----------------------------------------------------------------------------------------------------------

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
