"""The suffix drafter: what it drafts, what it learns and from whom, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch

from decoding.drafters import DrafterChoice
from decoding.drafters.base import DrafterContext
from decoding.drafters.suffix import SuffixDrafter, SuffixOptions, settings_of
from decoding.drafters.suffix_search import PlainSuffixCache
from decoding.engine import Engine
from decoding.errors import ConfigError
from decoding.messages import SpeculationStats
from decoding.planner import Limits
from decoding.probe import Probe
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from models.decoder import Decoder
from tests.engines import ROOT, Outcome, make_engine, run, tiny_decoder

DEFAULTS = SuffixOptions()
CONTEXT = DrafterContext(
    name="suffix",
    bit=1,
    target=cast(Any, None),
    tokenizer=cast(Any, None),
    dtype=torch.float32,
    device=torch.device("cpu"),
    attention="auto",
    max_model_len=4096,
    max_step_tokens=64,
)


def plain_cache(**options: Any) -> PlainSuffixCache:
    return PlainSuffixCache(settings_of(SuffixOptions(**options)))


def drafted(cache: PlainSuffixCache, text: list[int], tree: int = 0, nodes: int = 24) -> list[tuple[int, int]]:
    """(parent column, token) of each node of a draft after ``text``, which is a prompt."""
    number, known = cache.admit(tree, len(text)), torch.tensor(text)
    tokens, parents, _, _ = cache.trees([number], [known], [nodes], [8], 0)
    cache.forget(number, known, False)
    return list(zip(parents[0].tolist(), tokens[0].tolist(), strict=True))[1:]


# the definition, by hand ----------------------------------------------------------------------------------------------


def test_a_row_drafts_from_its_own_text() -> None:
    assert drafted(plain_cache(), [1, 2, 3, 4, 9, 1, 2, 3]) == [(0, 4), (1, 9), (2, 1)], "as many nodes as tokens match"
    assert drafted(plain_cache(max_spec_factor=2.0), [1, 2, 3, 4, 9, 1, 2, 3]) == [
        (0, 4),
        (1, 9),
        (2, 1),
        (3, 2),
        (4, 3),
    ]
    assert drafted(plain_cache(), [1, 2, 3, 4]) == []


def test_of_equals_the_latest_goes_first_and_of_others_the_more_frequent() -> None:
    assert drafted(plain_cache(), [1, 2, 3, 1, 2, 4, 1, 2]) == [(0, 4), (0, 3)]
    assert drafted(plain_cache(), [1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2]) == [(0, 3), (1, 1)]


def test_improbable_continuations_are_left_out() -> None:
    text = [1, 2, 3] * 12 + [1, 2, 4, 1, 2]  # 4 follows once in 13 times
    assert (0, 4) not in drafted(plain_cache(), text)
    assert (0, 4) in drafted(plain_cache(min_token_prob=0.01, max_spec_factor=20.0), text)


def test_outputs_are_asked_and_the_own_text_wins_ties() -> None:
    cache = plain_cache()
    cache.insert(0, torch.tensor([5, 6, 7, 8, 9]))
    assert drafted(cache, [1, 5, 6]) == [(0, 7), (1, 8)]
    assert drafted(cache, [1, 5, 6], tree=1) == [], "of another salt"
    assert drafted(cache, [5, 6, 1, 1, 5, 6]) == [(0, 1), (1, 1)]


def test_confidence_rises_with_the_match() -> None:
    cache = plain_cache()
    cache.insert(0, torch.tensor([5, 6, 7, 8, 9]))
    firsts = []
    for text in ([6], [5, 6]):
        number = cache.admit(0, len(text))
        firsts.append(cache.trees([number], [torch.tensor(text)], [4], [4], 0)[2][0, 1].item())
    assert 0 < firsts[0] < firsts[1] < 1


# in an engine ---------------------------------------------------------------------------------------------------------


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


class Served:
    """A tiny engine and its drafter."""

    def __init__(self, options: SuffixOptions = DEFAULTS, **settings: object) -> None:
        self.engine = make_engine(target(), {"suffix": self._build(options)}, **settings)

    def _build(self, options: SuffixOptions) -> Any:
        def build(context: DrafterContext) -> SuffixDrafter:
            self.drafter = SuffixDrafter(options, context)
            return self.drafter

        return build

    def run(self, *requests: GenerateRequest) -> list[Outcome]:
        outcomes = run(self.engine, list(requests))
        return [outcomes[request.request_id, 0] for request in requests]


def ask(name: str, salt: str = "", tokens: int = 60, **wishes: Any) -> GenerateRequest:
    params = SamplingParams(tokens, 1.0, seed=3, ignore_eos=True)
    return GenerateRequest(name, (1, 2, 3, 4), params, SpeculationParams(**wishes), salt)


def stats(outcome: Outcome) -> SpeculationStats:
    assert outcome.last.speculation is not None
    return outcome.last.speculation


def test_a_request_that_comes_again_is_drafted() -> None:
    served = Served()
    first, again = (served.run(ask(name))[0] for name in ("first", "again"))
    assert again.tokens == first.tokens
    assert stats(again).steps <= 60 / 5
    assert stats(again).steps < stats(first).steps


def test_salts_do_not_see_each_other() -> None:
    served = Served()
    alone = stats(served.run(ask("one", "a"))[0])
    assert stats(served.run(ask("two", "b"))[0]) == alone, "drafted and accepted as if there had been nobody"
    assert stats(served.run(ask("three", "a"))[0]).accepted > alone.accepted


def test_outputs_are_learned_once_whatever_happens_to_their_requests() -> None:
    served = Served(num_pages=12, max_num_seqs=4)
    wishes: list[dict[str, Any]] = [{}, {"enabled": False}, {"drafters": ()}, {"max_nodes": 2}]
    requests = [ask(f"r{number}", tokens=50 + number, **wish) for number, wish in enumerate(wishes)]
    served.run(*requests)
    assert served.engine.stats().preemptions > 0, "the pool is meant to be too small"
    assert served.drafter.cache.usage()[1] == sum(request.params.max_tokens for request in requests)
    assert not served.drafter._followed


def test_requests_that_are_cancelled_leave_their_output_and_nothing_else() -> None:
    served = Served(max_num_seqs=1)
    for name in ("runs", "waits"):
        served.engine.submit(ask(name))
    made = sum(len(event.token_ids) for _ in range(5) for event in served.engine.step())
    served.engine.close()
    assert served.drafter.cache.usage()[:2] == [1, made]
    assert not served.drafter._followed


def test_nothing_is_learned_from_a_probe() -> None:
    served = Served()
    stepper = served.engine._stepper
    limits = Limits(stepper.cache, stepper.drafters.members, 8, 4)
    with torch.inference_mode():
        assert Probe(stepper, limits, 48, 8).measure() is not None
    assert stepper.drafters.taken["suffix"] == 0, "clocks are as before"
    assert served.drafter.cache.usage()[:2] == [0, 0]
    assert not served.drafter._followed


def test_what_is_kept_is_bounded() -> None:
    served = Served(SuffixOptions(max_cached_requests=3))
    for number in range(6):
        served.run(ask(f"r{number}", salt=str(number % 2), tokens=10))
    assert served.drafter.cache.usage()[:2] == [3, 30]
    again = stats(served.run(ask("again", salt="1", tokens=10))[0])
    assert again.accepted > 0, "the newest stay"


def test_an_engine_without_kernels_drafts_the_same() -> None:
    outcomes = []
    for fused in (True, False):
        served = Served()
        if not fused:
            served.drafter.cache = plain_cache()
        outcomes.append([stats(served.run(ask(name))[0]) for name in ("first", "again")])
    assert outcomes[0] == outcomes[1]


def test_the_demo_model_says_it_again_at_once() -> None:
    engine = Engine.load(
        f"{ROOT}/demo/target", dtype="float32", speculate=("suffix",), num_pages=200, plan="fixed:nodes=24,depth=16"
    )
    params = SamplingParams(max_tokens=200, temperature=0.8, seed=5, ignore_eos=True)
    first, again = (engine.generate("class Reader:\n    def read(", params)[0] for _ in range(2))
    assert again.text == first.text
    assert len(again.token_ids) / again.speculation.steps > 9
    assert len(again.token_ids) / again.speculation.steps > 2 * len(first.token_ids) / first.speculation.steps


# options --------------------------------------------------------------------------------------------------------------


def test_options_are_read() -> None:
    choice = DrafterChoice.parse("suffix=/var/suffixes:max_cache_mb=64,max_spec_factor=2,min_token_prob=0.2")
    expected = SuffixOptions("/var/suffixes", max_cache_mb=64, max_spec_factor=2.0, min_token_prob=0.2)
    assert choice.options == expected
    assert DrafterChoice.parse("suffix").options == SuffixOptions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tree_depth": 1}, "max_tree_depth must be in 2"),
        ({"max_cached_requests": 0}, "max_cached_requests must be at least 1"),
        ({"max_cache_mb": 0}, "max_cache_mb must be in 1"),
        ({"max_spec_factor": 0.0}, "max_spec_factor must be in"),
        ({"max_spec_factor": float("nan")}, "max_spec_factor must be in"),
        ({"min_token_prob": 0.0}, "min_token_prob must be in"),
        ({"save_interval": -1}, "save_interval must not be negative"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"suffix: {message}"):
        SuffixDrafter(replace(SuffixOptions(), **options), CONTEXT)
