"""Dictated texts against real decoding: what a replay accepts, and how the oracle ranks."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.acceptance_runs import run
from benchmarks.replay import LISTED, Dictation, OracleTeam, ReplayTeam
from decoding.assemble import LoadedModel, build_drafters, build_stepper
from decoding.config import EngineConfig
from decoding.drafters.base import Drafter, DrafterContext
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.engine import Engine
from decoding.messages import TokenEvent
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.step import Stepper
from models.decoder import Decoder
from tests.contract.test_drafters import EXAMPLES, demo
from tests.doubles import OracleDrafter
from tests.engines import ALL_NODES, EOS, VOCAB, BuildDrafter, demo_tokenizer, make_engine, tiny_decoder

DEPTH = 4
# they learn from what is verified, or from outputs as they grow: a replay verifies more, and its text grows otherwise
LEARNING = ("recycling", "suffix")


@cache
def target() -> Decoder:
    return tiny_decoder(torch.float64)


@cache
def draft() -> Decoder:
    return tiny_decoder(torch.float64, blur=0.05)


def draft_model(beam: int) -> BuildDrafter:
    options = DraftModelOptions("", depth=DEPTH, top_k=3, beam=beam, min_confidence=0.0)
    return lambda context: DraftModelDrafter(options, context, draft())


CONFIG = EngineConfig("tiny", num_pages=256, max_nodes=20, max_depth=DEPTH, plan=ALL_NODES, prefix_caching=False)


class Lab:
    """A target with one drafter, whose step can be given another team and rule."""

    def __init__(self, loaded: LoadedModel, drafters: list[Drafter]) -> None:
        self.loaded = loaded
        self.drafters = drafters
        self.stepper = build_stepper(CONFIG, loaded, drafters)

    @classmethod
    def tiny(cls, build: BuildDrafter) -> Lab:
        model = target()
        loaded = LoadedModel(model, demo_tokenizer(), VOCAB, (EOS,), {})
        context = DrafterContext("d", 0, model, demo_tokenizer(), model.dtype, model.device, "auto", 512, 2048)
        return cls(loaded, [build(context)])

    @classmethod
    def demo(cls, drafter: str) -> Lab:
        return cls(demo(), build_drafters(dataclasses.replace(CONFIG, speculate=(drafter,)), demo()))

    def decode(self, requests: list[GenerateRequest]) -> dict[str, list[TokenEvent]]:
        """As it is served."""
        return self._run(Engine(CONFIG, self.loaded, self.stepper), requests)

    def dictate(self, team: Dictation, requests: list[GenerateRequest]) -> dict[str, list[TokenEvent]]:
        step = self.stepper
        parts = (step.target, step.cache, step.scheduler, step.planner, step.sampler, team, team.dictate)
        return self._run(Engine(CONFIG, self.loaded, Stepper(*parts, step.committer)), requests)

    @staticmethod
    def _run(engine: Engine, requests: list[GenerateRequest]) -> dict[str, list[TokenEvent]]:
        for request in requests:
            engine.submit(request)
        events = run(engine)
        engine.check()
        return events


def requests(temperature: float, coupling: bool | None = None, count: int = 5) -> list[GenerateRequest]:
    random = np.random.default_rng(1)
    return [
        GenerateRequest(
            str(number),
            tuple(random.integers(0, VOCAB, 10 + 7 * number).tolist()),
            SamplingParams(max_tokens=30, temperature=temperature, seed=number, ignore_eos=True),
            SpeculationParams(coupling=coupling),
        )
        for number in range(count)
    ]


def text_of(request: GenerateRequest, events: list[TokenEvent]) -> torch.Tensor:
    return torch.tensor([*request.prompt_ids, *(token for event in events for token in event.token_ids)])


@pytest.mark.parametrize(("temperature", "coupling"), [(0.0, None), (1.0, True), (1.0, False)])
def test_a_replay_accepts_what_decoding_accepted_at_the_same_place(temperature: float, coupling: bool | None) -> None:
    assert compare(Lab.tiny(draft_model(beam=2)), requests(temperature, coupling)) > 10


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_a_replay_accepts_what_decoding_accepted_for_every_drafter(name: str) -> None:
    lab = Lab.demo(EXAMPLES[name]())
    if lab.drafters[0].needs.draws:
        with pytest.raises(ValueError, match="cannot be replayed"):
            compare(lab, requests(0.0, count=1))
        return
    # one by one: how deep drafters draft may depend on the rows beside
    asked = [predicting(lab, request) for t in (0.0, 0.8) for request in requests(t, count=3)]
    if name in LEARNING:
        decoded, replayed = np.array([means(EXAMPLES[name](), request) for request in asked]).mean(axis=0)
        assert decoded > 0.1
        assert replayed == pytest.approx(decoded, rel=0.25)
    else:
        assert sum(compare(lab, [request]) for request in asked) > 5


def predicting(lab: Lab, request: GenerateRequest) -> GenerateRequest:
    """The request with its text as the prediction, some tokens of it wrong, for the drafter that follows one."""
    text = text_of(request, lab.decode([request])[request.request_id])[len(request.prompt_ids) :].tolist()
    wrong = tuple(9 if place % 11 == 7 else token for place, token in enumerate(text))
    return dataclasses.replace(request, prediction_ids=wrong)


def compare(lab: Lab, asked: list[GenerateRequest]) -> int:
    """Decode, replay the text, and hold each step's acceptance against the replay's at the same place.

    Returns:
        how many steps accepted something.
    """
    pairs = accepted(lab, lab, asked)
    assert all(decoded == replayed for decoded, replayed in pairs), pairs
    return sum(decoded > 0 for decoded, _ in pairs)


def means(drafter: str, request: GenerateRequest) -> tuple[float, float]:
    """Tokens that a step of decoding accepts, and that its replay accepts at the same places; neither knows a text."""
    decoded, replayed = np.array(accepted(Lab.demo(drafter), Lab.demo(drafter), [request])).mean(axis=0)
    return float(decoded), float(replayed)


def accepted(lab: Lab, replaying: Lab, asked: list[GenerateRequest]) -> list[tuple[int, int]]:
    """What each step of decoding accepted, and what the replay of its text accepted at the same place."""
    made = lab.decode(asked)
    texts = {request.request_id: text_of(request, made[request.request_id]) for request in asked}
    team = ReplayTeam(replaying.drafters, texts, DEPTH, replaying.stepper.planner)
    replayed = replaying.dictate(team, asked)
    pairs = []
    for request in asked:
        name, events = request.request_id, made[request.request_id]
        assert text_of(request, replayed[name]).tolist() == texts[name].tolist()
        assert [len(event.token_ids) for event in replayed[name]] == [1] * 30
        scored = team.accepted[name]  # of the positions after 1, 2, ... tokens
        assert len(scored) == 30 - DEPTH - 1
        before = 0
        for event in events:
            if 0 < before <= len(scored):
                pairs.append((len(event.token_ids) - 1, scored[before - 1]))
            before += len(event.token_ids)
    assert team.drafted <= 20 * sum(len(scored) for scored in team.accepted.values())
    return pairs


def test_who_knows_the_text_follows_it_to_the_end() -> None:
    asked = requests(0.0)
    random = np.random.default_rng(2)  # any text can be dictated, not the target's alone
    texts = {r.request_id: torch.tensor([*r.prompt_ids, *random.integers(0, VOCAB, 30)]) for r in asked}
    known = {(name, 0): text.tolist() for name, text in texts.items()}
    lab = Lab.tiny(lambda context: OracleDrafter(context, known))
    team = ReplayTeam(lab.drafters, texts, DEPTH, lab.stepper.planner)
    lab.dictate(team, asked)
    assert {tuple(scored) for scored in team.accepted.values()} == {(DEPTH,) * (30 - DEPTH - 1)}


@pytest.mark.parametrize("beam", [1, 3])
def test_the_oracle_ranks_are_the_draft_models_own(beam: int) -> None:
    asked = requests(0.0, count=3)
    random = np.random.default_rng(3)
    texts = {r.request_id: torch.tensor([*r.prompt_ids, *random.integers(0, VOCAB, 30)]) for r in asked}
    lab = Lab.tiny(draft_model(beam))
    team = OracleTeam(lab.drafters, texts, DEPTH)
    lab.dictate(team, asked)
    assert len(team.ranks) == 3 * (30 - DEPTH - 1)

    judge = make_engine(draft(), prefix_caching=False)
    expected: list[tuple[int, ...]] = []
    for place in range(1, 30 - DEPTH):  # rows are noted step by step
        for request in asked:
            first = len(request.prompt_ids) + place
            text = texts[request.request_id].tolist()
            expected.append(tuple(rank_after(judge, text[: first + d], text[first + d]) for d in range(DEPTH)))
    assert team.ranks == expected
    ranks = {rank for ranks in expected for rank in ranks}
    assert LISTED in ranks
    assert len(ranks) > 4


def test_a_coupled_drafter_that_is_the_target_knows_every_draw() -> None:
    options = DraftModelOptions("", depth=DEPTH, top_k=2, beam=1, min_confidence=0.0)
    lab = Lab.tiny(lambda context: DraftModelDrafter(options, context, target()))
    right = {}
    for coupling in (True, False):
        asked = requests(1.0, coupling)
        made = lab.decode(asked)
        team = OracleTeam(lab.drafters, {r.request_id: text_of(r, made[r.request_id]) for r in asked}, DEPTH)
        lab.dictate(team, asked)
        right[coupling] = np.mean([[rank == 0 for rank in ranks] for ranks in team.ranks])
    assert right[True] == 1.0
    assert 0 < right[False] < 0.9


def rank_after(engine: Engine, given: list[int], right: int) -> int:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=LISTED, ignore_eos=True)
    (generation,) = engine.generate(given, params)
    assert generation.logprobs is not None
    best = [token for token, _ in generation.logprobs[0].top]
    return best.index(right) if right in best else LISTED
