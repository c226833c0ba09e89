"""The engine used in-process with text: generate, stream, stop strings, the model's defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from decoding.engine import Engine
from decoding.errors import RequestError
from decoding.generation import Generation
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest, SamplingParams
from decoding.text import TextDelta
from tests.engines import ROOT, whole


@cache
def demo() -> Engine:
    speculate = (f"draft={ROOT}/demo/draft", "ngram")
    return Engine.load(f"{ROOT}/demo/target", dtype="float32", speculate=speculate, max_depth=8)


CODE = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"


def greedy(max_tokens: int = 40, **params: object) -> SamplingParams:
    params = {"temperature": 0.0, **params}
    return SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]


def test_generate_takes_text_or_ids_one_or_several() -> None:
    engine = demo()
    ids = engine.tokenizer.encode(CODE)
    (by_text,) = engine.generate(CODE, greedy())
    assert engine.tokenizer.decode(ids + by_text.token_ids) == CODE + by_text.text
    for prompts, count in ((ids, 1), ([CODE, ids], 2), ([CODE], 1)):
        generations = engine.generate(prompts, greedy())
        assert [generation.text for generation in generations] == [by_text.text] * count
    both = engine.generate([CODE, "import"], greedy(8, temperature=0.9, seed=1, n=2))
    assert [g.text for g in both[:2]] == [
        g.text for g in engine.generate(CODE, greedy(8, temperature=0.9, seed=1, n=2))
    ]
    assert len(both) == 4
    assert whole(engine)


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_stop_string_cuts_text_tokens_and_logprobs(cut: int) -> None:
    engine = demo()
    (free,) = engine.generate(CODE, greedy(logprobs=0))
    stop = free.text[cut : cut + 3]
    (stopped,) = engine.generate(CODE, greedy(logprobs=0), stop=[stop, "never said"])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert stop in engine.tokenizer.decode(stopped.token_ids)
    assert stop not in engine.tokenizer.decode(stopped.token_ids[:-1]), "it ends at the token that completes it"
    assert [entry.token_id for entry in stopped.logprobs or []] == stopped.token_ids
    assert whole(engine)


def texts_of(pieces: list[TextDelta | Generation]) -> tuple[str, Generation]:
    *deltas, last = pieces
    assert isinstance(last, Generation)
    assert all(isinstance(delta, TextDelta) and delta.text for delta in deltas)
    return "".join(delta.text for delta in deltas), last


def test_a_stream_is_the_same_text_in_pieces() -> None:
    engine = demo()
    (free,) = engine.generate(CODE, greedy())
    pieces = list(engine.stream(CODE, greedy()))
    text, last = texts_of(pieces)
    assert text == last.text == free.text
    assert len(pieces) > 5
    stop = free.text[10:14]
    text, last = texts_of(list(engine.stream(CODE, greedy(), stop=[stop])))
    assert text == last.text == free.text[: free.text.index(stop)]
    assert last.finish_reason == "stop"
    assert whole(engine)


def test_a_stream_left_early_frees_its_pages() -> None:
    engine = demo()
    pieces = engine.stream(CODE, greedy())
    next(pieces)
    assert engine.has_work
    assert isinstance(pieces, Iterator)
    pieces.close()  # type: ignore[attr-defined]
    assert whole(engine)


def test_streams_side_by_side_keep_their_texts() -> None:
    """Whoever steps the engine, every event reaches the request that it belongs to."""
    engine = demo()
    prompts = [CODE, "import os\nimport sys\n", "class Tree:\n    def"]
    alone = [engine.generate(prompt, greedy())[0].text for prompt in prompts]
    streams = [engine.stream(prompt, greedy()) for prompt in prompts]
    pieces: list[list[TextDelta | Generation]] = [[next(stream)] for stream in streams]
    assert engine.generate(CODE, greedy())[0].text == alone[0]
    for own, stream in zip(reversed(pieces), reversed(streams), strict=True):
        own.extend(stream)
    assert [texts_of(own)[0] for own in pieces] == alone
    assert whole(engine)


def test_submitted_requests_lose_nothing_to_generate() -> None:
    engine = demo()
    request = GenerateRequest("mine", tuple(engine.tokenizer.encode(CODE)), greedy())
    (expected,) = engine.generate(CODE, greedy())
    engine.submit(request)
    events: list[TokenEvent] = engine.step()
    engine.generate("import", greedy(60))
    while engine.has_work:
        events += engine.step()
    assert [token for event in events for token in event.token_ids] == expected.token_ids
    assert {event.request_id for event in events} == {"mine"}
    assert whole(engine)


def test_a_refused_prompt_leaves_nothing_behind() -> None:
    engine = demo()
    with pytest.raises(RequestError, match="empty"):
        engine.generate([CODE, []], greedy())  # type: ignore[list-item]
    with pytest.raises(RequestError, match="stop string"):
        engine.generate(CODE, greedy(), stop=[""])
    assert whole(engine)
    assert engine.generate(CODE, greedy(3))[0].token_ids


def test_defaults_of_the_model_are_told(tmp_path: Path) -> None:
    assert demo().info.default_sampling == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "max_length": 9}))
    engine = Engine.load(f"{ROOT}/demo/target", generation_config=str(tmp_path))
    assert engine.info.default_sampling == {"temperature": 0.6, "top_k": 20.0}
    assert engine.info.eos_token_ids == (0,)
    neutral = Engine.load(f"{ROOT}/demo/target", generation_config="vllm")
    assert neutral.info.default_sampling == {}
    assert neutral.info.dtype == "bfloat16", "the checkpoint's"
