"""Allowed tokens and bad words: what is never drawn, whatever is drafted. At nodes of trees: see test_sampling.py."""

from __future__ import annotations

import itertools
from functools import cache, partial

import pytest
import torch

from decoding.errors import RequestError
from decoding.request import MAX_WORD_TOKENS, MAX_WORDS, GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models.decoder import Decoder
from tests import steps
from tests.doubles import OracleDrafter
from tests.engines import EOS, VOCAB, make_engine, run, tiny_decoder

SMALL = 10
sampling_of = partial(steps.sampling_of, vocab=SMALL, eos=(3,))


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


def banned(params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]) -> set[int]:
    """The tokens that cannot follow."""
    sequence = Sequence(GenerateRequest("r", prompt, params), 0, 0)
    for token in output:
        sequence.append(token)
    zero, no_path = torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64)
    x = sampling_of([sequence]).process(torch.zeros(1, SMALL), zero, zero, no_path)
    return set((x[0] == -torch.inf).nonzero().flatten().tolist())


def test_only_allowed_tokens_are_left_with_their_bias() -> None:
    params = SamplingParams(allowed_token_ids=(2, 4), logit_bias={4: 1.5, 5: 50.0})
    assert banned(params, (1,), ()) == set(range(SMALL)) - {2, 4}
    sequence = Sequence(GenerateRequest("r", (1,), params), 0, 0)
    zero = torch.tensor([0])
    x = sampling_of([sequence]).process(torch.zeros(1, SMALL), zero, zero, None)
    assert x[0, [2, 4]].tolist() == [0.0, 1.5]


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ((1,), (), {6}),
        ((1,), (4,), {5, 6}),
        ((4,), (), {6}),  # the prompt's end is no part of a word
        ((1,), (2, 2), {4, 6}),
        ((1,), (9, 2, 2), {4, 6}),
        ((2,), (2,), {6}),
        ((1,), (2, 2, 4), {5, 6}),
        ((1,), (4, 2), {6}),
    ],
)
def test_a_word_s_last_token_is_banned_where_the_others_stand(
    prompt: tuple[int, ...], output: tuple[int, ...], expected: set[int]
) -> None:
    assert banned(SamplingParams(bad_words=((6,), (4, 5), (2, 2, 4))), prompt, output) == expected


def test_another_row_s_words_ban_nothing_here() -> None:
    rows = [SamplingParams(bad_words=((6,), (7,))), SamplingParams(bad_words=((5,),)), SamplingParams()]
    sequences = [Sequence(GenerateRequest("r", (1,), params), 0, 0) for params in rows]
    row, paths = torch.arange(3), torch.zeros(3, 0, dtype=torch.int64)
    x = sampling_of(sequences).process(torch.zeros(3, SMALL), row, torch.zeros(3).long(), paths)
    assert [set(each.nonzero().flatten().tolist()) for each in x == -torch.inf] == [{6, 7}, {5}, set()]


def test_two_words_with_one_end_are_both_heeded() -> None:
    words = SamplingParams(bad_words=((2, 5), (4, 5)))
    assert banned(words, (1,), (2,)) == banned(words, (1,), (4,)) == {5}


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_the_text_has_neither_bad_words_nor_other_tokens_with_an_oracle_that_does(temperature: float) -> None:
    free = SamplingParams(max_tokens=60, temperature=temperature, seed=3, ignore_eos=True)
    engine = make_engine(target(), prefix_caching=False)
    text = run(engine, [GenerateRequest("r", (3, 1, 4), free)])["r", 0].tokens
    pairs = tuple(dict.fromkeys(zip(text[::5], text[1::5], strict=False)))[:8]
    allowed = tuple(token for token in range(VOCAB) if token % 5)
    params = SamplingParams(**{**vars(free), "bad_words": pairs, "allowed_token_ids": allowed})
    request = GenerateRequest("r", (3, 1, 4), params)
    plain = run(engine, [request])["r", 0].tokens
    written = set(itertools.pairwise(plain))
    assert plain != text
    assert not written & set(pairs)
    assert set(plain) <= set(allowed)
    for proposed in (text, plain):
        texts = {("r", 0): [3, 1, 4, *proposed]}
        drafting = make_engine(target(), {"oracle": lambda c, t=texts: OracleDrafter(c, t)}, max_nodes=9, max_depth=9)
        outcome = run(drafting, [request])["r", 0]
        assert outcome.tokens == plain
        assert outcome.last.speculation is not None
        assert outcome.last.speculation.drafted > 0


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        (SamplingParams(allowed_token_ids=(VOCAB,)), "allowed_token_ids", "has token id"),
        (SamplingParams(bad_words=((1, VOCAB),)), "bad_words", "has token id"),
        (SamplingParams(bad_words=((),)), "bad_words", "must have 1 to"),
        (SamplingParams(bad_words=((1,) * (MAX_WORD_TOKENS + 1),)), "bad_words", "must have 1 to"),
        (SamplingParams(bad_words=((1,),) * (MAX_WORDS + 1)), "bad_words", "at most"),
        (SamplingParams(allowed_token_ids=(EOS,), min_tokens=1), "allowed_token_ids", "forbid every token"),
        (SamplingParams(allowed_token_ids=(7,), bad_words=((3, 7),)), "allowed_token_ids", "forbid every token"),
        (
            SamplingParams(allowed_token_ids=(7, EOS), stop_token_ids=(7,), min_tokens=2),
            "allowed_token_ids",
            "forbid every token",
        ),
        (SamplingParams(bad_words=tuple((t,) for t in range(VOCAB))), "bad_words", "forbid every token"),
    ],
)
def test_bans_that_cannot_be(params: SamplingParams, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        make_engine(target()).submit(GenerateRequest("r", (1,), params))
    assert caught.value.param == param


@pytest.mark.parametrize("ops", steps.ON_CPU)
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_vocabulary_without_any_allowed_token_is_sure_of_nothing(
    ops: str, filters: dict[str, float], temperature: float
) -> None:
    """No number would be one that poisons what is learned of the drafter, for all requests and for good."""
    rows = [SamplingParams(temperature=temperature, allowed_token_ids=(2, 4), **filters), SamplingParams()]  # type: ignore[arg-type]
    sampling = sampling_of([Sequence(GenerateRequest("r", (1,), params), 0, 7) for params in rows], ops=ops)
    row, zero, ids = torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 3, 5, 6, 7])
    x = sampling.process(torch.randn(2, len(ids)), row, zero, None, ids)
    guessed, confidence = sampling.guess(x, row, zero, 3, 1.0, ids)
    assert confidence[0].tolist() == [0.0, 0.0, 0.0]
    assert 0 < confidence[1].sum() <= 1.0 + 1e-6
    assert torch.isin(guessed, ids).all()
