"""Logits that are no numbers: of a draft model they are no drafts, of the target the end of the text that has them."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch

from decoding.cost_file import learn_costs
from decoding.drafters.base import DrafterContext
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.medusa import PROBABILITY, MedusaDrafter, MedusaOptions
from decoding.drafters.ngram import NgramDrafter, NgramOptions
from decoding.drafters.product_tree import Candidates, FixedTrees, ProbableTrees
from decoding.engine import Engine
from decoding.errors import ModelError
from decoding.filters import Filters
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sampling_ops import NOT_A_TOKEN, SAMPLING_OPS
from decoding.sequence import SequenceId
from models.decoder import Decoder
from server.offline import _stream
from tests.doubles import GarbageDrafter, OracleDrafter
from tests.engines import ALL_NODES, VOCAB, BuildDrafter, make_engine, run, tiny_decoder
from tests.medusa import fit_weights, make_heads

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = {"nan": [NAN] * 6, "above all": [0.0, 1.0, INF, 0.0, 0.0, 0.0], "below all": [-INF] * 6}
PROMPTS = ((3, 1, 4, 1, 9, 2, 6), (8, 20, 31, 7, 7, 30))
BOTH_WAYS = ["torch", "cpu", "device"]


def asked(number: int, **params: object) -> GenerateRequest:
    params = {"max_tokens": 40, "temperature": 0.9, "seed": 17 + number, "ignore_eos": True, **params}
    return GenerateRequest(f"r{number}", PROMPTS[number], SamplingParams(**params))  # type: ignore[arg-type]


def texts(engine: Engine, requests: list[GenerateRequest]) -> dict[SequenceId, list[int]]:
    return {name: outcome.tokens for name, outcome in run(engine, requests).items()}


@cache
def known() -> dict[SequenceId, list[int]]:
    """What the sound model writes, prompts included."""
    written = texts(make_engine(tiny_decoder(torch.float64)), [asked(0), asked(1)])
    return {(f"r{number}", 0): [*prompt, *written[f"r{number}", 0]] for number, prompt in enumerate(PROMPTS)}


# draws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", BOTH_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", list(NO_NUMBERS))
def test_nothing_is_drawn_where_the_largest_is_no_number(what: str, dtype: torch.dtype, ops: str) -> None:
    x = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0, 0.0], NO_NUMBERS[what]], dtype=dtype)
    made, warmth, noise = SAMPLING_OPS[ops](), torch.tensor([0.5, 0.5]), torch.zeros(1, 6)
    filters = Filters(torch.tensor([2, 2]), torch.ones(2).double() * 0.9, torch.zeros(2).double(), 2)
    for noise_row in ([-1, -1], [0, 0]):
        assert made.draw(x, warmth, noise, torch.tensor(noise_row)).tolist() == [1, NOT_A_TOKEN]
    assert made.best(x).tolist() == [1, NOT_A_TOKEN]
    assert made.draw_filtered(x, warmth, noise, torch.tensor([0, 0]), filters).tolist() == [1, NOT_A_TOKEN]


# a broken target -----------------------------------------------------------------------------------------------------


def poisoned(token: int, attention: str = "auto") -> Decoder:
    """A model that breaks down at a token: its embedding is no number."""
    model = tiny_decoder(torch.float64, attention=attention)
    model.embedding[token] = NAN
    return model


def poison() -> int:
    """A token that the first text has after some others, and the second text never."""
    first, second = known()["r0", 0], known()["r1", 0]
    return next(token for token in first[len(PROMPTS[0]) + 8 :] if token not in second and token not in PROMPTS[0])


def oracle(context: DrafterContext) -> OracleDrafter:
    return OracleDrafter(context, known())


DRAFTERS: dict[str, dict[str, BuildDrafter]] = {
    "none": {},
    "the truth": {"oracle": oracle},
    "garbage": {"garbage": GarbageDrafter},  # has the token where the text does not
    "both": {"oracle": oracle, "garbage": GarbageDrafter},
}


@pytest.mark.parametrize("attention", ["auto", "reference"])
@pytest.mark.parametrize("drafters", list(DRAFTERS))
def test_a_text_ends_where_plain_decoding_ends_and_others_go_on(drafters: str, attention: str) -> None:
    broken = poison()
    engine = make_engine(poisoned(broken, attention), DRAFTERS[drafters], max_nodes=12, max_depth=6, plan=ALL_NODES)
    done = run(engine, [asked(0), asked(1)])
    whole, text = known()["r0", 0], done["r0", 0]
    place = whole.index(broken, len(PROMPTS[0]))
    assert text.tokens == whole[len(PROMPTS[0]) : place + 1], "the token that breaks it is drawn by a sound model"
    assert text.last.finish_reason == "error"
    assert "no numbers" in str(text.last.error)
    assert text.last.error_code is None, "its client cannot mend it"
    assert done["r1", 0].tokens == known()["r1", 0][len(PROMPTS[1]) :]
    assert done["r1", 0].last.finish_reason == "length"


def test_what_a_broken_text_left_in_the_cache_is_found_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    engine, broken = make_engine(poisoned(40)), (*range(1, 33), 40, *range(1, 33))
    sound = GenerateRequest("sound", (*range(1, 33), 3), SamplingParams(max_tokens=4, temperature=0.0))
    wanted = texts(make_engine(tiny_decoder(torch.float64)), [sound])
    for number in range(2):
        request = GenerateRequest(f"b{number}", broken, SamplingParams(max_tokens=4))
        [outcome] = run(engine, [request]).values()
        assert outcome.tokens == []
        assert outcome.last.finish_reason == "error"
        assert outcome.last.cached_tokens == 0
    assert engine.stats().pages_cached == 0
    assert "request b1: the logits of the model are no numbers after a text of 65 tokens" in caplog.text
    assert texts(engine, [sound]) == wanted


def test_a_prompt_is_scored_without_its_broken_drafts() -> None:
    """The step that reads the prompt has drafts, too: its logprobs are not those of the step that broke down."""
    request = asked(1, prompt_logprobs=0, max_tokens=3)
    [plain] = run(make_engine(tiny_decoder(torch.float64)), [request]).values()
    everywhere = {"garbage": lambda context: Repeating(context, 40)}
    [outcome] = run(make_engine(poisoned(40, "reference"), everywhere, plan=ALL_NODES), [request]).values()
    assert outcome.tokens == plain.tokens
    found, wanted = (done.events[0].prompt_logprobs or () for done in (outcome, plain))
    assert found[0] is None
    scores = [[entry.logprob for entry in each if entry is not None] for each in (found, wanted)]
    assert len(scores[0]) == len(request.prompt_ids) - 1
    assert scores[0] == pytest.approx(scores[1])


class Repeating(GarbageDrafter):
    """One token, again and again."""

    def __init__(self, context: DrafterContext, token: int) -> None:
        super().__init__(context)
        self._token = token

    def nodes(self, sequence: object, limit: object) -> list[tuple[int, int, float]]:
        return [(0, self._token, 0.9), (1, self._token, 0.9)]


def test_an_engine_whose_target_is_broken_starts_and_ends_every_text(caplog: pytest.LogCaptureFixture) -> None:
    """What its steps cost cannot be measured; that it is broken is said."""
    broken = tiny_decoder(torch.float64)
    broken.embedding.fill_(NAN)
    engine = make_engine(broken, {"ngram": lambda context: NgramDrafter(NgramOptions(), context)}, plan="auto")
    learn_costs(engine._stepper, engine.config, VOCAB, None)
    assert "breaks down on random tokens" in caplog.text
    outcomes = run(engine, [asked(0), asked(1)])
    assert [(each.tokens, each.last.finish_reason) for each in outcomes.values()] == [([], "error")] * 2


def test_the_command_ends_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="no numbers"):
        _stream(make_engine(poisoned(40)), "A", SamplingParams(max_tokens=4))  # the token 40
    assert capsys.readouterr().out == "\n"


# a broken draft ------------------------------------------------------------------------------------------------------


def broken_draft(context: DrafterContext) -> DraftModelDrafter:
    model = tiny_decoder(torch.float64)
    model.embedding.fill_(NAN)
    return DraftModelDrafter(DraftModelOptions("", depth=4, min_confidence=0.0), context, model)


def broken_medusa(context: DrafterContext) -> MedusaDrafter:
    target = tiny_decoder(torch.float64)
    text = [[number * 7 % VOCAB for number in range(60)]]
    assert target.head.weight is not None
    weights = fit_weights(target, text, target.head.weight, 3)
    heads = make_heads(target, {name: torch.full_like(weight, NAN) for name, weight in weights.items()})
    options = MedusaOptions("", tree=PROBABILITY)
    return MedusaDrafter(options, context, heads, ProbableTrees(3, options.top_k, torch.device("cpu")))


BROKEN: dict[str, BuildDrafter] = {"draft": broken_draft, "medusa": broken_medusa}


@pytest.mark.parametrize("plan", ["auto", ALL_NODES])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"repetition_penalty": 1.2}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_draft_model_drafts_nothing_and_is_named_once(
    name: str, params: dict[str, object], plan: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [asked(0, **params), asked(1, **params)]
    wanted = texts(make_engine(tiny_decoder(torch.float64)), requests)
    engine = make_engine(tiny_decoder(torch.float64), {name: BROKEN[name]}, plan=plan, max_nodes=12, max_depth=6)
    with caplog.at_level(logging.WARNING):
        assert texts(engine, requests) == wanted
        assert texts(engine, requests) == wanted
    assert engine.stats().drafted == 0
    said = [record.getMessage() for record in caplog.records if "no numbers" in record.getMessage()]
    if plan != "auto":  # which need not ever ask a drafter
        [one] = said
        assert one.startswith(f"{name}: the logits of this drafter are no numbers")


@pytest.mark.parametrize("shape", ["probable", "fixed"])
def test_trees_of_guesses_without_confidence_keep_their_roots(shape: str) -> None:
    cpu = torch.device("cpu")
    paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    grower = ProbableTrees(3, 4, cpu) if shape == "probable" else FixedTrees(paths, cpu)
    tokens = torch.arange(24).view(2, 3, 4)
    confidence = torch.rand(2, 3, 4).sort(dim=2, descending=True).values
    confidence[1] = NAN
    trees = grower.grow(Candidates(torch.tensor([30, 31]), tokens, confidence), 4, 1)
    assert trees.tokens[:, 0].tolist() == [30, 31]
    assert not bool(trees.confidence[0].isnan().any())
    assert bool(trees.confidence[1].isnan().any()), "so that it is noticed"


def test_speculation_that_broke_down_is_switched_off_for_the_text_alone() -> None:
    """In this backend a node that is no number spoils its whole row: the sums over keys have it, times 0."""
    everywhere = {"garbage": lambda context: Repeating(context, 40)}
    engine = make_engine(poisoned(40, "reference"), everywhere, plan=ALL_NODES)
    run(engine, [asked(1)])
    stats = engine.stats()
    assert stats.drafted == 0, "the one step with drafts was forgotten"
    assert stats.steps < 40 + 5
    unharmed = GenerateRequest("off", PROMPTS[1], asked(1).params, SpeculationParams(enabled=False))
    assert texts(engine, [unharmed])["off", 0] == known()["r1", 0][len(PROMPTS[1]) :]
