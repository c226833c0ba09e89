"""The engine as its callers see it: refusals, cancelling, endings, seeds, choices, caching, logprobs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from decoding.engine import Engine
from decoding.errors import ConfigError, RequestError
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sequence import SequenceId
from models.decoder import Decoder
from tests.doubles import OracleDrafter
from tests.engines import EOS, ROOT, VOCAB, Outcome, make_engine, run, tiny_decoder, whole

PROMPT = (3, 1, 4, 1, 9, 2, 6)


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


def tiny(**settings: object) -> Engine:
    return make_engine(target(), **settings)


def oracle_engine(texts: dict[SequenceId, list[int]], depth: int = 6, **settings: object) -> Engine:
    """An engine whose drafter proposes ``texts``, prompt included."""
    drafters = {"oracle": lambda context: OracleDrafter(context, texts)}
    return make_engine(target(), drafters, max_nodes=2 * depth, max_depth=depth, **settings)


def plain(request: GenerateRequest) -> Outcome:
    return run(tiny(prefix_caching=False), [request])[request.request_id, 0]


def known(request: GenerateRequest) -> dict[SequenceId, list[int]]:
    """What plain decoding would write for a request if nothing ended it early."""
    endless = replace(request.params, max_tokens=60, ignore_eos=True, stop_token_ids=(), min_tokens=0)
    text = plain(replace(request, params=endless)).tokens
    return {(request.request_id, 0): [*request.prompt_ids, *text]}


def ask(request_id: str = "r", prompt: tuple[int, ...] = PROMPT, **params: object) -> GenerateRequest:
    params = {"max_tokens": 30, "temperature": 0.9, "seed": 17, "ignore_eos": True, **params}
    return GenerateRequest(request_id, prompt, SamplingParams(**params))  # type: ignore[arg-type]


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message", "param"),
    [
        (ask(prompt=()), "The prompt is empty", "prompt"),
        (ask(prompt=(1, VOCAB)), f"prompt has token id {VOCAB}; this model's ids are 0 to {VOCAB - 1}", "prompt"),
        (ask(prompt=(-1,)), "prompt has token id -1", "prompt"),
        (
            ask(prompt=(1,) * 500, max_tokens=13),
            r"This model's maximum context length is 512 tokens\. However, you requested 513 tokens "
            r"\(500 in the prompt, 13 in the completion\)",
            "prompt",
        ),
        (ask(temperature=float("nan")), r"temperature must be in \[0, 100\], not nan", "temperature"),
        (ask(temperature=float("inf")), "temperature must be in", "temperature"),
        (ask(temperature=-0.1), "temperature must be in", "temperature"),
        (ask(top_p=0.0), r"top_p must be in \(0, 1\]", "top_p"),
        (ask(min_p=1.5), "min_p must be in", "min_p"),
        (ask(top_k=-2), "top_k must be in", "top_k"),
        (ask(max_tokens=0), "max_tokens must be in", "max_tokens"),
        (ask(min_tokens=31), "min_tokens must be .*30", "min_tokens"),
        (ask(repetition_penalty=0.0), "repetition_penalty must be in", "repetition_penalty"),
        (ask(presence_penalty=2.1), "presence_penalty must be in", "presence_penalty"),
        (ask(logit_bias={VOCAB: 1.0}), f"logit_bias has token id {VOCAB}", "logit_bias"),
        (ask(logit_bias={1: 101.0}), "logit_bias must be in", "logit_bias"),
        (ask(stop_token_ids=(VOCAB,)), f"stop_token_ids has token id {VOCAB}", "stop_token_ids"),
        (ask(seed=2**64), "seed must be in", "seed"),
        (ask(n=0), "n must be in", "n"),
        (ask(logprobs=21), "logprobs must be in", "logprobs"),
        (
            replace(ask(), speculation=SpeculationParams(drafters=("medusa",))),
            "no drafter called 'medusa' runs on this server; there are: oracle",
            "speculation.drafters",
        ),
        (replace(ask(), speculation=SpeculationParams(max_nodes=64)), "max_nodes must be in", "speculation.max_nodes"),
        (replace(ask(), speculation=SpeculationParams(max_depth=-1)), "max_depth must be in", "speculation.max_depth"),
    ],
)
def test_a_request_that_cannot_be_served(request_: GenerateRequest, message: str, param: str) -> None:
    engine = oracle_engine({})
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(request_)
    assert caught.value.param == param
    assert whole(engine)


def test_context_overflow_has_openai_s_code() -> None:
    with pytest.raises(RequestError) as caught:
        tiny().submit(ask(prompt=(1,) * 512))
    assert caught.value.code == "context_length_exceeded"


def test_a_request_larger_than_the_pool() -> None:
    engine = tiny(num_pages=3)
    engine.submit(ask("fits", prompt=(1,) * 18))
    with pytest.raises(RequestError, match=r"needs 64 tokens of K/V cache, and the server has 48") as caught:
        engine.submit(ask(prompt=(1,) * 19))
    assert caught.value.code == "context_length_exceeded"


def test_two_requests_of_one_name() -> None:
    engine = tiny()
    engine.submit(ask(n=2))
    with pytest.raises(RequestError, match="already a request 'r'"):
        engine.submit(ask())
    engine.cancel("r", 0)
    with pytest.raises(RequestError, match="already a request 'r'"):
        engine.submit(ask())  # its other choice still runs
    engine.cancel("r")
    engine.submit(ask())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/no/such/folder"}, "there is no folder '/no/such/folder'"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "cuda"}, "no CUDA device is available"),
        ({"attention": "flesh"}, "unknown --attention 'flesh'"),
        ({"max_nodes": 64}, r"--max-nodes must be in 0 \.\. 63"),
        ({"max_depth": -1}, r"--max-depth must be in 0 \.\. 63"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens must be at least 1"),
        ({"num_pages": 0}, "--num-pages must be at least 1"),
        ({"kv_cache_memory": 2**20}, "raise --kv-cache-memory to at least 9MiB"),
        ({"speculate": ("ngrams",)}, "did you mean 'ngram'"),
        ({"plan": "fixed:min_probability=1.5"}, r"min_probability must be in 0 \.\. 1"),
        ({"plan": "fixed:min_probability=nan"}, r"min_probability must be in 0 \.\. 1"),
        ({"plan": "fixed:nodes=64"}, r"nodes must be in 0 \.\. 63"),
        ({"plan": "fixed:nods=4"}, "has no option 'nods': did you mean 'nodes'"),
        ({"plan": "fixed:nodes=many"}, "nodes must be a number, not 'many'"),
        ({"plan": "static"}, "unknown --plan 'static'"),
        ({"plan": "auto:nodes=4"}, "--plan auto has no options"),
        ({"generation_config": "/no/such/folder"}, "generation_config.json"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, object], message: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=message):
        Engine.load(**{"model": f"{ROOT}/demo/target", "dtype": "float32", **settings})  # type: ignore[arg-type]


# cancelling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_cancelling_frees_everything_at_every_stage(steps: int) -> None:
    """Waiting (a full batch), in the middle of its prompt, decoding."""
    engine = tiny(max_num_seqs=2, max_num_batched_tokens=20)
    for number in range(4):
        engine.submit(ask(f"r{number}", prompt=tuple(range(45 - number))))
    events = [event for _ in range(steps) for event in engine.step()]
    for number in (3, 0, 2, 1):
        ends = engine.cancel(f"r{number}")
        assert [(event.request_id, event.finish_reason) for event in ends] == [(f"r{number}", "cancelled")]
        assert ends[0].token_ids == ()
        begun = any(event.request_id == f"r{number}" for event in events)
        assert (ends[0].seed is None) == begun, "the seed comes once, on the first event"
        assert ends[0].speculation is not None
        engine.check()
        assert engine.cancel(f"r{number}") == []
    assert whole(engine)
    assert engine.step() == []
    stats = engine.stats()
    assert (stats.requests_finished, stats.running, stats.waiting) == (4, 0, 0)


def test_cancelling_one_choice_leaves_the_others() -> None:
    engine = tiny()
    engine.submit(ask(n=3, max_tokens=8))
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(4):
        for event in engine.step():
            tokens[event.choice].extend(event.token_ids)
    (end,) = engine.cancel("r", 1)
    assert (end.choice, end.finish_reason) == (1, "cancelled")
    while engine.has_work:
        for event in engine.step():
            assert event.choice != 1
            tokens[event.choice].extend(event.token_ids)
    together = run(tiny(), [ask(n=3, max_tokens=8)])
    assert [tokens[choice] == together["r", choice].tokens for choice in range(3)] == [True, False, True]
    assert whole(engine)


def test_close_ends_every_request() -> None:
    engine = tiny()
    for number in range(3):
        engine.submit(ask(f"r{number}"))
    engine.step()
    engine.close()
    assert whole(engine)


# endings -------------------------------------------------------------------------------------------------------------


def ends_early(request: GenerateRequest, depth: int = 6) -> tuple[Outcome, Outcome]:
    """A request under an oracle that would have gone on, and in plain decoding."""
    engine = oracle_engine(known(request), depth)
    outcome = run(engine, [request])[request.request_id, 0]
    assert whole(engine)
    return outcome, plain(request)


@pytest.mark.parametrize("place", [1, 2, 8, 13, 14, 20])
@pytest.mark.parametrize("kind", ["eos", "stop token"])
def test_an_end_inside_an_accepted_path_cuts_everything(place: int, kind: str) -> None:
    """Tokens, logprobs and accounting; nothing that was accepted behind the end is told."""
    if kind == "eos":
        request = ask(ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=place - 1, logprobs=1)
    else:
        request = ask(logprobs=1)
        text = known(request)["r", 0][len(PROMPT) :]
        place = next(p for p in range(place, 30) if text[p - 1] not in text[: p - 1])
        request = ask(logprobs=1, stop_token_ids=(text[place - 1],))
    outcome, judge = ends_early(request)
    assert outcome.tokens == judge.tokens
    assert len(outcome.tokens) == len(outcome.logprobs) == place
    assert outcome.last.finish_reason == judge.last.finish_reason == "stop"
    assert outcome.last.stop_token == outcome.tokens[-1]
    stats = outcome.last.speculation
    assert stats is not None
    if kind == "stop token":  # the oracle is right all the way: a step yields 7 tokens, the last one fewer
        assert stats.steps == -(-place // 7)
        assert stats.accepted == place - place // 7
        assert stats.by_drafter["oracle"].accepted == stats.accepted


@pytest.mark.parametrize("depth", [2, 6, 9])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 8, 30])
def test_max_tokens_need_not_fit_the_tree(depth: int, max_tokens: int) -> None:
    outcome, judge = ends_early(ask(max_tokens=max_tokens, logprobs=0), depth)
    assert outcome.tokens == judge.tokens
    assert len(outcome.tokens) == len(outcome.logprobs) == max_tokens
    assert outcome.last.finish_reason == "length"
    assert outcome.last.stop_token is None
    stats = outcome.last.speculation
    assert stats is not None
    assert stats.steps == -(-max_tokens // (depth + 1))
    assert stats.accepted == max_tokens - stats.steps


def test_what_was_accepted_behind_the_end_is_not_cached() -> None:
    """The end stands just before a page is full, and the accepted path went over its edge."""
    request = ask(prompt=tuple(range(9)))
    text = known(request)["r", 0][9:]
    place = next(i for i in range(3, 7) if text[i] not in text[:i])
    engine = oracle_engine(known(request), depth=10)
    run(engine, [replace(request, params=replace(request.params, stop_token_ids=(text[place],)))])
    assert 9 + place + 1 < 16
    stats = engine.stats()
    assert stats.pages_cached == 0
    assert stats.pages_free == stats.pages_total


def test_eos_is_an_end_unless_ignored() -> None:
    biased = {EOS: 100.0}
    assert plain(ask(logit_bias=biased, ignore_eos=False)).tokens == [EOS]
    ignored = plain(ask(logit_bias=biased, ignore_eos=True, max_tokens=4))
    assert (ignored.tokens, ignored.last.finish_reason) == ([EOS] * 4, "length")


def test_the_whole_context_can_be_used() -> None:
    request = ask(prompt=tuple(i % VOCAB for i in range(490)), max_tokens=22, temperature=0.0)
    texts = {("r", 0): [*request.prompt_ids, *plain(request).tokens]}
    outcome = run(oracle_engine(texts, depth=9), [request])["r", 0]
    assert [*request.prompt_ids, *outcome.tokens] == texts["r", 0]
    assert len(texts["r", 0]) == 512


# seeds, choices, caching ---------------------------------------------------------------------------------------------


def test_the_seed_used_is_told_once_and_reproduces_the_text() -> None:
    first = run(tiny(), [ask(seed=None)])["r", 0]
    seeds = [event.seed for event in first.events]
    assert isinstance(seeds[0], int)
    assert seeds[1:] == [None] * (len(seeds) - 1)
    assert run(tiny(), [ask(seed=seeds[0])])["r", 0].tokens == first.tokens
    assert run(tiny(), [ask(seed=None)])["r", 0].events[0].seed != seeds[0]


def test_the_engine_s_seed_serves_requests_without_one() -> None:
    engine = tiny(seed=17)
    outcomes = run(engine, [ask("a", seed=None), ask("b", seed=18)])
    assert outcomes["a", 0].events[0].seed == 17
    assert outcomes["a", 0].tokens == run(tiny(), [ask()])["r", 0].tokens
    assert outcomes["b", 0].events[0].seed == 18


@pytest.mark.parametrize("prompt_len", [1, 16, 40])
def test_choices_differ_share_the_prompt_and_equal_themselves_alone(prompt_len: int) -> None:
    prompt = tuple(i % VOCAB for i in range(prompt_len))
    outcomes = run(tiny(), [ask(prompt=prompt, n=4)])
    texts = [outcomes["r", choice].tokens for choice in range(4)]
    assert len(set(map(tuple, texts))) == 4
    assert texts[0] == run(tiny(), [ask(prompt=prompt)])["r", 0].tokens
    cached = [outcomes["r", choice].events[0].cached_tokens for choice in range(4)]
    assert cached == [0, *[(prompt_len - 1) // 16 * 16] * 3]
    assert texts == [run(tiny(prefix_caching=False), [ask(prompt=prompt, n=4)])["r", c].tokens for c in range(4)]


def test_a_repeated_prompt_is_found_within_its_salt() -> None:
    engine = tiny()
    prompt = tuple(i % VOCAB for i in range(50))

    def cached(salt: str = "", **params: object) -> int:
        request = replace(ask(prompt=prompt, **params), cache_salt=salt)
        return run(engine, [request])["r", 0].events[0].cached_tokens

    assert [cached(), cached(), cached(), cached("tenant"), cached("tenant")] == [0, 48, 48, 0, 48]
    assert cached(prompt_logprobs=0) == 0, "prompt logprobs need the prompt computed"
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (6 * 50, 3 * 48)


def test_generated_text_is_found_as_the_next_prompt() -> None:
    engine = tiny()
    first = run(engine, [ask()])["r", 0]
    again = run(engine, [ask(prompt=(*PROMPT, *first.tokens, 1))])["r", 0]
    assert again.events[0].cached_tokens == (len(PROMPT) + 30) // 16 * 16


# logprobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [0, 3])
def test_logprobs_under_speculation_are_those_of_plain_decoding(logprobs: int) -> None:
    request = ask(logprobs=logprobs, prompt_logprobs=logprobs, top_p=0.9, presence_penalty=0.5)
    texts = known(request)
    outcome, judge = run(oracle_engine(texts), [request])["r", 0], plain(request)
    assert len(outcome.events) < len(judge.events)
    assert [entry.token_id for entry in outcome.logprobs] == outcome.tokens == judge.tokens
    for ours, theirs in zip(outcome.logprobs, judge.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert len(ours.top) == logprobs
    assert all(len(event.logprobs or ()) == len(event.token_ids) for event in outcome.events)
    ours, theirs = outcome.events[0].prompt_logprobs, judge.events[0].prompt_logprobs
    assert ours is not None
    assert theirs is not None
    assert ours[0] is None
    assert [entry and entry.token_id for entry in ours] == [None, *PROMPT[1:]]
    assert [e.logprob for e in ours if e] == pytest.approx([e.logprob for e in theirs if e], abs=1e-9)


def test_logprobs_are_raw() -> None:
    """Before temperature, bias and penalties: the same for a token however it was drawn."""
    prompt = tuple(range(20))
    raw = run(tiny(), [ask(prompt=prompt, temperature=0.0, logprobs=5, max_tokens=1)])["r", 0].logprobs[0]
    other = ask(prompt=prompt, temperature=0.0, logprobs=5, max_tokens=1, logit_bias={7: 100.0}, repetition_penalty=2.0)
    biased = run(tiny(), [other])["r", 0].logprobs[0]
    assert biased.token_id == 7
    assert biased.top == raw.top
    assert raw.top[0] == (raw.token_id, raw.logprob)


def test_rows_that_ask_for_logprobs_do_not_disturb_those_that_do_not() -> None:
    requests = [ask("a", logprobs=2), ask("b", seed=5), ask("c", logprobs=0, seed=6)]
    outcomes = run(tiny(), requests)
    for request in requests:
        outcome = outcomes[request.request_id, 0]
        assert outcome.tokens == plain(request).tokens
        assert all((event.logprobs is None) == (request.params.logprobs is None) for event in outcome.events)
