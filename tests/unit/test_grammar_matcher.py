"""What may follow: masks against their definition, at every path of a tree, in whatever order it is walked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.grammar.compiler import LIMITS, GrammarCompiler
from decoding.grammar.masks import GrammarMasks, unpacked_anywhere, unpacked_by_host
from decoding.grammar.matcher import Matcher, words_of
from decoding.request import Grammar
from models.tree import GUESSED, NO_PARENT, PINS, Trees
from tests.engines import EOS, VOCAB, demo_tokenizer
from tests.grammars import CHOICES, GRAMMARS, SCHEMA, choice, compiled, matcher, regex

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
