"""Requests that come while models draft join the step that is under way; nobody's text is any other for it."""

from __future__ import annotations

import random
from collections import deque
from functools import cache

import pytest
import torch

from decoding.drafters.base import DrafterContext
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.expansion import TreeOptions
from decoding.drafters.feature_drafter import FeatureDrafter
from decoding.drafters.lookahead import LookaheadDrafter, LookaheadOptions
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.drafters.recycling import RecyclingDrafter, RecyclingOptions
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models.decoder import Decoder
from models.tree_ops import TorchTreeOps
from tests.contract.test_tree_ops import random_trees
from tests.engines import VOCAB, BuildDrafter, device_ops, make_engine, run, tiny_decoder, whole
from tests.feature_doubles import ToyFeatureModel


@cache
def model() -> Decoder:
    return tiny_decoder(torch.float64)


def drafting(context: DrafterContext) -> DraftModelDrafter:
    options = DraftModelOptions("", depth=3, top_k=2, beam=2, min_confidence=0.0)
    return DraftModelDrafter(options, context, tiny_decoder(torch.float64, blur=0.05))


def toy(context: DrafterContext) -> FeatureDrafter:
    return FeatureDrafter(
        TreeOptions("", depth=3, top_k=2, beam=2, min_confidence=0.0), context, ToyFeatureModel(model())
    )


DRAFTERS: dict[str, BuildDrafter] = {
    "draft": drafting,
    "ngram": lambda context: NgramDrafter(NgramOptions(), context),
    "lookahead": lambda context: LookaheadDrafter(LookaheadOptions(level=3, window_size=2, guess_set_size=2), context),
    "recycling": lambda context: RecyclingDrafter(RecyclingOptions(), context),
    "toy": toy,
}


def request(number: int, prompt: int, max_tokens: int = 12, **params: object) -> GenerateRequest:
    ids = tuple((5 * i * i + number) % VOCAB for i in range(prompt))
    given = {"temperature": 0.8 * (number % 2), "seed": number, "ignore_eos": True, **params}
    return GenerateRequest(f"r{number}", ids, SamplingParams(max_tokens, **given))  # type: ignore[arg-type]


def alone(asked: GenerateRequest) -> list[list[int]]:
    outcomes = run(make_engine(model()), [asked])
    return [outcomes[asked.request_id, choice].tokens for choice in range(asked.params.n)]


def test_who_comes_while_models_draft_is_in_the_same_step() -> None:
    engine = make_engine(model(), {"draft": drafting})
    engine.submit(request(0, 9))
    engine.step()
    events = engine.step(lambda: engine.submit(request(1, 30)))
    assert {event.request_id for event in events} == {"r0", "r1"}
    assert len(next(event for event in events if event.request_id == "r1").token_ids) == 1
    engine.check()


def test_where_no_model_drafts_nobody_is_asked_for() -> None:
    engine = make_engine(model(), {"ngram": DRAFTERS["ngram"]})
    engine.submit(request(0, 9))
    while engine.has_work:
        engine.step(lambda: pytest.fail("no time has passed since the step was planned"))


@pytest.mark.parametrize(
    "settings", [{"max_num_batched_tokens": 9, "max_nodes": 2}, {"num_pages": 2}, {"max_num_seqs": 1}]
)
def test_without_room_in_the_step_it_waits_for_the_next(settings: dict[str, int]) -> None:
    """For its tokens beside the others' trees, for its pages, or for its row."""
    engine = make_engine(model(), {"draft": drafting}, **settings)
    engine.submit(request(0, 6))
    engine.step()
    late = request(1, 20)
    events = engine.step(lambda: engine.submit(late))
    assert "r1" not in {event.request_id for event in events}
    engine.check()
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for event in engine.step() if event.request_id == "r1" for token in event.token_ids]
        engine.check()
    assert [tokens] == alone(late)


@pytest.mark.parametrize("seed", range(8))
def test_texts_do_not_depend_on_when_requests_come(seed: int) -> None:
    luck = random.Random(seed)
    names = luck.sample(list(DRAFTERS), luck.randint(1, len(DRAFTERS)))
    engine = make_engine(
        model(),
        {name: DRAFTERS[name] for name in sorted({"draft", *names})},
        plan=luck.choice(["fixed:min_probability=0", "auto"]),
        max_num_batched_tokens=luck.choice([12, 40, 2048]),
        num_pages=luck.choice([12, 512]),
        max_num_seqs=luck.choice([2, 64]),
        ops=luck.choice([None, device_ops()]),
    )
    requests = [
        request(
            number,
            luck.randint(1, 60),
            luck.randint(1, 20),
            n=luck.choice([1, 1, 2]),
            presence_penalty=luck.choice([0.0, 0.5]),
            min_tokens=luck.choice([0, 1]),
            logprobs=luck.choice([None, 2]),
        )
        for number in range(9)
    ]
    coming, texts = deque(requests), {}

    def arrivals() -> None:
        for _ in range(luck.randint(0, 2)):
            if coming:
                engine.submit(coming.popleft())

    while coming or engine.has_work:
        if not engine.has_work or luck.random() < 0.1:
            engine.submit(coming.popleft()) if coming else None
        for event in engine.step(arrivals):
            texts.setdefault((event.request_id, event.choice), []).extend(event.token_ids)
        engine.check()
    assert whole(engine)
    for asked in requests:
        assert [texts[asked.request_id, choice] for choice in range(asked.params.n)] == alone(asked)


@pytest.mark.parametrize("width", [1, 6])
def test_bare_roots_behind_chosen_trees(width: int) -> None:
    trees = random_trees(3, width, VOCAB, "bushy", torch.Generator().manual_seed(3))
    chosen = TorchTreeOps().choose([trees], [width] * 3, [width] * 3, 0.0)
    more = chosen.with_roots(torch.tensor([7, 8]))
    more.trees.validate()
    assert more.trees.tokens[3:, 0].tolist() == [7, 8]
    assert not (more.trees.parents[3:] >= 0).any()
    assert more.counts == [*chosen.counts, 1, 1]
    assert more.deepest == chosen.deepest
    assert more.masks[3:, 0].tolist() == [1, 1]
    for part in ("tokens", "parents", "confidence", "source"):
        assert torch.equal(getattr(more.trees, part)[:3], getattr(chosen.trees, part))
    assert torch.equal(more.masks[:3], chosen.masks)


class Slow(FeatureDrafter):
    """Notes how many tokens were out when its model read a prompt."""

    out: list[int]
    seen: list[int]

    def read_prompts(self) -> list[Sequence]:
        if self._unread:
            self.seen.append(sum(self.out))
        return super().read_prompts()


def test_a_feature_drafter_reads_a_prompt_when_its_first_token_is_out() -> None:
    out: list[int] = []
    seen: list[int] = []

    def build(context: DrafterContext) -> Slow:
        drafter = Slow(TreeOptions("", depth=3, top_k=1, beam=1, min_confidence=0.0), context, ToyFeatureModel(model()))
        drafter.out, drafter.seen = out, seen
        return drafter

    engine = make_engine(model(), {"toy": build})
    for number, asked in enumerate((request(0, 40), request(1, 40, n=2), request(2, 40, max_tokens=1))):
        engine.submit(asked)
        while engine.has_work:
            out.append(sum(len(event.token_ids) for event in engine.step()))
        assert seen, number
        assert seen[0] == (0 if number == 2 else 1), "who gets but one token is read with it: there is no later"
        out.clear()
        seen.clear()
