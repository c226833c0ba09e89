"""Streaming text equals decoding at once, and stops where the text says, however the tokens are cut into pushes."""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from decoding.stop_strings import StopStrings
from decoding.text import TextStream, Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "target"
WORDS = [
    "▁",
    "▁a",
    "▁the",
    "▁stop",
    "st",
    "op",
    "END",
    "a",
    "b",
    "e",
    "n",
    "d",
    "E",
    "N",
    "D",
    "é",
    "你",
    "\n",
    ".",
    " ",
]


def byte_fallback() -> Tokenizer:
    """A tokenizer in the form of Llama 2's: SentencePiece words, bytes for the rest, the first space stripped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return _loaded(backend)


def words(decoder: object) -> Tokenizer:
    """A tokenizer of whole words with another decoder."""
    tokens = ["[UNK]", "[SEP]", *WORDS, "x</w>", "y</w>", "##z", "n't"]
    backend = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("[UNK]", "[SEP]")])
    return _loaded(backend)


def _loaded(backend: tokenizers.Tokenizer) -> Tokenizer:
    from decoding.chat import ChatTemplate

    return Tokenizer(backend, {}, ChatTemplate({}, {}))


TOKENIZERS: dict[str, Tokenizer] = {
    "byte_level": Tokenizer.load(DEMO),
    "byte_fallback": byte_fallback(),
    "metaspace": words(decoders.Metaspace()),
    "wordpiece": words(decoders.WordPiece()),
    "bpe_suffix": words(decoders.BPEDecoder()),
    "joined": words(None),
}
TEXTS = st.text(st.sampled_from("ab ENDstop.\n你é🦉\U0001f469\u200d\U0001f469"), max_size=30) | st.text(max_size=20)


@st.composite
def outputs(draw: st.DrawFn, name: str) -> list[int]:
    """Token ids: random ones (invalid UTF-8 is likely), real text, or parts of both. Special tokens included."""
    tokenizer = TOKENIZERS[name]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    if name == "byte_level":
        ids = ids | st.integers(8, 8 + 255)  # the tokens of single bytes
    parts = st.one_of(st.lists(ids, max_size=12), TEXTS.map(lambda text: tokenizer.encode(text, False)))
    return draw(parts) + draw(parts)


def streamed(stream: TextStream, ids: list[int], rng: random.Random) -> tuple[str, list[str]]:
    """All of the text, and the deltas, of ids pushed in random chunks."""
    deltas = []
    start = 0
    while start < len(ids):
        size = rng.randint(1, 5)
        deltas.append(stream.push(ids[start : start + size]).text)
        start += size
    deltas.append(stream.finish().text)
    return "".join(deltas), deltas


def each_tokenizer(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("name", list(TOKENIZERS))(test)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans(), rng=st.randoms(use_true_random=False))
def test_deltas_concatenate_to_the_decoded_text(name: str, data: st.DataObject, skip: bool, rng: random.Random) -> None:
    tokenizer, ids = TOKENIZERS[name], data.draw(outputs(name))
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    assert streamed(stream, ids, rng)[0] == tokenizer.decode(ids, skip)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_decode_is_that_of_the_library(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer, ids = TOKENIZERS[name], data.draw(outputs(name))
    expected = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    if name == "byte_fallback" and "\ufffd" in expected:
        return  # there we keep the valid characters of a run of bytes; see test_text.py
    assert tokenizer.decode(ids, skip) == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, rng=st.randoms(use_true_random=False))
def test_no_replacement_character_for_a_character_under_way(name: str, text: str, rng: random.Random) -> None:
    tokenizer = TOKENIZERS[name]
    text = text.replace("\ufffd", "")
    stream = TextStream(tokenizer)
    whole, deltas = streamed(stream, tokenizer.encode(text, False), rng)
    assert whole == text.removeprefix(" ") if name == "byte_fallback" else whole == text
    assert not any("\ufffd" in delta for delta in deltas)


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data(), rng=st.randoms(use_true_random=False))
def test_prompt_and_output_together_are_the_text_of_both(name: str, data: st.DataObject, rng: random.Random) -> None:
    tokenizer, both = TOKENIZERS[name], data.draw(outputs(name)) + data.draw(outputs(name))
    cut = data.draw(st.integers(0, len(both)))
    prompt, ids = both[:cut], both[cut:]
    whole = streamed(TextStream(tokenizer, prompt), ids, rng)[0]
    # a prompt may end within a character, which the output then completes
    assert _certain(tokenizer, prompt) + whole == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), include=st.booleans(), rng=st.randoms(use_true_random=False))
def test_text_is_cut_at_the_stop_string_that_is_completed_first(
    name: str, data: st.DataObject, include: bool, rng: random.Random
) -> None:
    tokenizer, ids = TOKENIZERS[name], data.draw(outputs(name))
    text = tokenizer.decode(ids)
    least = data.draw(st.one_of(st.just(0), st.integers(0, len(ids))))
    stops = data.draw(st.lists(st.text("ab ENDstop.\n你", min_size=1, max_size=4), max_size=3))
    if text:  # and one that does occur
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 6))])
    stream = TextStream(tokenizer, stop=tuple(stops), include_stop=include, min_tokens=least)
    whole, _ = streamed(stream, ids, rng)
    last = stream.push([])

    early = len(_certain(tokenizer, ids[:least])) if least < len(ids) else len(text)  # no end counts before
    found = [(text.find(stop, max(early - len(stop) + 1, 0)), stop) for stop in stops]
    ends = [(place + len(stop), -len(stop), stop) for place, stop in found if place >= 0]
    if not ends:
        assert (whole, last.stopped, last.token_count) == (text, False, len(ids))
        return
    end, _, stop = min(ends)
    assert whole == text[: end if include else end - len(stop)]
    assert (last.stopped, last.stop) == (True, stop)
    assert stream.offsets == _offsets(tokenizer, ids)[: last.token_count]
    assert last.token_count == len(stream.offsets) == _tokens_until(tokenizer, ids, end)


def _tokens_until(tokenizer: Tokenizer, ids: list[int], end: int) -> int:
    """The number of tokens whose certain text first reaches character ``end``, found by decoding every prefix anew."""
    return next((count for count in range(len(ids)) if len(_certain(tokenizer, ids[:count])) >= end), len(ids))


def _certain(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids up to a character that more bytes could complete."""
    previous, spelled = None, b""
    for token_id in ids:
        if token_id not in tokenizer.special_ids:
            spelled += tokenizer.piece(token_id, previous, True) or b""
            previous = token_id
    return codecs.getincrementaldecoder("utf-8")("replace").decode(spelled, final=False)


def _offsets(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [len(_certain(tokenizer, ids[:count])) for count in range(len(ids))]


@each_tokenizer
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_offsets_are_where_each_tokens_text_begins(name: str, data: st.DataObject) -> None:
    tokenizer, ids = TOKENIZERS[name], data.draw(outputs(name))
    stream = TextStream(tokenizer)
    stream.push(ids)
    assert stream.offsets == _offsets(tokenizer, ids)


@settings(max_examples=400)
@given(data=st.data())
def test_stop_strings_that_overlap_themselves_are_found(data: st.DataObject) -> None:
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=3))
    beginnings = [stop[:end] for stop in stops for end in range(1, len(stop) + 1)]
    parts = data.draw(st.lists(st.sampled_from(beginnings) | st.text("ab", max_size=3), max_size=8))
    text, found = "".join(parts), StopStrings(tuple(stops), include_stop=False)
    certain, stop = "", None
    for part in parts:
        more, stop = found.push(part)
        certain += more
        if stop is not None:
            break
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if ends:
        end, length = min(ends)
        assert (certain, stop) == (text[: end + length], text[end + length : end])
    else:
        held = found.flush()
        assert (certain + held, stop) == (text, None)
        assert any(stop.startswith(held) for stop in stops)  # no more is held back than may become a stop string
