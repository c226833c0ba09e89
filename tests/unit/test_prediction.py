"""The drafter that follows the client's prediction: where it finds its place again, and what that is worth."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence as Many
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from decoding.assemble import LoadedModel, build_drafters, build_stepper, load_target
from decoding.config import EngineConfig
from decoding.drafters.alignment import Alignment, AlignmentRules, FusedAlignments, PlainAlignments
from decoding.drafters.base import DrafterContext
from decoding.drafters.prediction import PredictionDrafter, PredictionOptions
from decoding.engine import Engine
from decoding.errors import ConfigError, RequestError
from decoding.plan import Plan, PlannedRow, Quota, RowQuota
from decoding.request import GenerateRequest, SamplingParams, SpeculationParams
from decoding.sequence import Sequence
from tests.engines import ROOT, run, whole

CONTEXT = DrafterContext(
    name="prediction",
    bit=1,
    target=cast(Any, None),
    tokenizer=cast(Any, None),
    dtype=torch.float32,
    device=torch.device("cpu"),
    attention="auto",
    max_model_len=4096,
    max_step_tokens=64,
    target_folder=Path("."),
)
ASKED = frozenset(["prediction"])
PROMPT = (900, 901, 902)


class Row:
    """One sequence with a prediction, without an engine."""

    def __init__(self, prediction: Many[int], number: int = 0, **options: int) -> None:
        params = SamplingParams(max_tokens=2000)
        request = GenerateRequest(str(number), PROMPT, params, prediction_ids=tuple(prediction))
        self.sequence = Sequence(request, 0, 1)
        self.drafter = PredictionDrafter(PredictionOptions(**options), CONTEXT)

    def say(self, *tokens: int) -> None:
        for token in tokens:
            self.sequence.append(token)

    def nodes(self, nodes: int = 63, depth: int = 16) -> list[tuple[int, int, float]]:
        """(parent, token, confidence) of each drafted node."""
        row = PlannedRow(self.sequence, self.sequence.length - 1, 1)
        quota = Quota((RowQuota(nodes, depth, ASKED),))
        trees = self.drafter.propose(Plan((row,), (row,)), quota, cast(Any, None))
        if trees is None:
            return []
        trees.validate()
        assert trees.tokens[0, 0] == self.sequence.tokens[-1]
        assert set(trees.source[0, 1:].tolist()) == {2}
        columns = (trees.parents[0].tolist(), trees.tokens[0].tolist(), trees.confidence[0].tolist())
        return list(zip(*columns, strict=True))[1:]

    def chain(self, depth: int = 16) -> list[int]:
        """The tokens of the likeliest path."""
        said, column = [], 0
        drafted = list(enumerate(self.nodes(depth=depth), start=1))
        while below := [(chance, -number, token) for number, (parent, token, chance) in drafted if parent == column]:
            _, number, token = max(below)
            said.append(token)
            column = -number
        return said


LINES = [[100 + 10 * line + place for place in range(9)] + [7] for line in range(40)]  # each ends with the same token
TEXT = [token for line in LINES for token in line]


# finding the place ---------------------------------------------------------------------------------------------------


def test_a_right_prediction_fills_the_depth_from_the_start() -> None:
    row = Row(TEXT)
    for _ in range(10):
        assert row.chain(16) == TEXT[row.sequence.generated :][:16]
        row.say(*TEXT[row.sequence.generated :][:17])


def test_trust_grows_with_what_came_true() -> None:
    row = Row(TEXT)
    first = row.nodes()[0][2]
    row.say(*TEXT[:8])
    assert 0.5 < first < row.nodes()[0][2] < 1


@pytest.mark.parametrize(
    ("came", "goes_on"),
    [
        ([500], 31),  # one token for one
        ([500, 501], 31),  # two for one: the token after them is found
        ([], 31),  # one left out
        ([500, 501, *TEXT[30:32]], 32),  # two put in
        ([500, 501, 502, 503, 504, 505, 7], 40),  # a line's rest replaced; its end is every line's end
        ([*range(500, 520), 7, *TEXT[30:32]], 32),  # lines put in
    ],
)
def test_after_an_edit_the_prediction_is_followed_again(came: list[int], goes_on: int) -> None:
    row = Row(TEXT)
    row.say(*TEXT[:30])
    row.nodes()
    row.say(*came)
    if came[-1:] == [501] or not came:  # what follows an edit of unequal length shows itself with its first token
        row.say(TEXT[goes_on])
        goes_on += 1
    assert TEXT[goes_on] in [token for parent, token, _ in row.nodes() if parent == 0]
    row.say(*TEXT[goes_on : goes_on + 3])
    assert row.chain() == TEXT[goes_on + 3 : goes_on + 19]


def test_lines_left_out_are_stepped_over() -> None:
    row = Row(TEXT)
    row.say(*TEXT[:30], *LINES[25][:3])
    assert row.chain() == TEXT[253:269]


def test_what_moved_far_is_found_by_a_long_match() -> None:
    row = Row(TEXT)
    row.say(*TEXT[:30])
    row.nodes()
    row.say(*TEXT[300:312])
    assert row.chain() == TEXT[312:328]
    row.say(*TEXT[30:42])
    assert row.chain() == TEXT[42:58]


def test_of_equal_matches_the_nearest_is_followed_first() -> None:
    block = list(range(50, 60))
    prediction = [1, *block, 2, 3, *block, 4, *range(100, 140), *block, 5]
    row = Row(prediction)
    row.say(1, *block, 9, *block[:6])
    assert row.chain(8) == [*block[6:], 4, 100, 101, 102]


def test_two_places_that_may_both_be_right_are_two_branches() -> None:
    row = Row([1, 2, 3, 4, 5, 6, 7, 8])
    row.say(1, 2, 500)
    first = {token: chance for parent, token, chance in row.nodes() if parent == 0}
    assert set(first) == {3, 4}, "the new token was put in, or stands for another"
    assert first[3] + first[4] < 1
    one = Row([1, 2, 3, 4, 5, 6, 7, 8], branches=1)
    one.say(1, 2, 500)
    assert [token for parent, token, _ in one.nodes() if parent == 0] == [4]


def test_it_catches_up_with_what_it_was_not_asked_for() -> None:
    asked, unasked = Row(TEXT), Row(TEXT)
    said = [*TEXT[:25], 500, *TEXT[26:70], 501, 502, *TEXT[71:90]]
    for token in said:
        asked.say(token)
        asked.nodes()
    unasked.say(*said)
    assert asked.chain() == unasked.chain() == TEXT[90:106]


def test_a_prediction_that_is_used_up_or_foreign_falls_silent() -> None:
    row = Row([1, 2, 3])
    row.say(1, 2, 3)
    assert row.nodes() == []
    row.say(*range(600, 700))
    assert row.nodes() == []
    foreign = Row(range(40))
    foreign.say(*range(600, 700))
    assert foreign.nodes() == []


def test_a_prediction_that_contains_the_prompt_is_found_behind_it() -> None:
    row = Row([*PROMPT, *TEXT])
    row.say(TEXT[0])
    assert row.chain() == TEXT[1:17]


@pytest.mark.parametrize("seed", range(20))
def test_places_are_within_the_prediction_whatever_comes(seed: int) -> None:
    luck = random.Random(seed)
    words = luck.choice([1, 2, 5])
    prediction = [luck.randrange(words) for _ in range(luck.choice([1, 2, 7, 60]))]
    row = Row(prediction, max_match=luck.choice([1, 2, 32, 64]), branches=luck.choice([1, 2, 5]))
    for _ in range(60):
        limit, depth = luck.choice([1, 4, 24, 63]), luck.choice([1, 3, 16, 63])
        nodes = row.nodes(limit, depth)
        assert len(nodes) <= limit
        assert len({(parent, token) for parent, token, _ in nodes}) == len(nodes)
        assert all(0 < chance < 1 for _, _, chance in nodes)
        row.say(*(luck.randrange(words) for _ in range(luck.choice([1, 1, 2, 9]))))


def test_an_alignment_says_how_long_a_match_is() -> None:
    alignment = Alignment(np.array([5, 6, 7, 8, 9, 5, 6]))
    alignment.follow([1, 7])
    text = np.array([5, 6, 7])
    [best, *_] = alignment.places(text, 32, 2)
    assert (best.index, best.match) == (3, 3)
    assert (alignment.index, alignment.lost) == (3, 0), "it is certain, so the place is known again"


# the kernel -----------------------------------------------------------------------------------------------------------


def grown(luck: random.Random, text: list[int], prediction: list[int], place: int, words: int) -> int:
    """Let a text go on: mostly as predicted from a place on, sometimes with an edit; returns the place after that."""
    for _ in range(luck.choice([0, 1, 1, 3, 9])):
        edit = luck.random()
        if edit < 0.1:
            text.append(luck.randrange(words))
        elif edit < 0.2:
            place = luck.randrange(len(prediction) + 1)
        if place < len(prediction):
            text.append(prediction[place])
            place += 1
    return place


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_finds_what_the_definition_finds(seed: int) -> None:
    """While texts follow their predictions and leave them, also after steps in which a row was not asked."""
    luck = random.Random(seed)
    rules = AlignmentRules(luck.choice([1, 2, 4, 32, 64]), luck.choice([1, 2, 3, 9]))
    both = PlainAlignments(rules), FusedAlignments(rules)
    words = luck.choice([1, 2, 5, 50, 1000])
    predictions = [[luck.randrange(words) for _ in range(luck.choice([1, 3, 20, 300]))] for _ in range(3)]
    texts = [[luck.randrange(words)] for _ in predictions]
    numbers = [[each.begin(torch.tensor(tokens), 1) for tokens in predictions] for each in both]
    places, drafted = [0, 0, 0], 0
    for _ in range(40):
        known = [torch.tensor(text) for text in texts]
        nodes, depths = (
            [luck.choice([0, 1, 8, 24, 63]) for _ in texts],
            [luck.choice([0, 1, 5, 16, 63]) for _ in texts],
        )
        expected, found = (each.trees(mine, known, nodes, depths, 1) for each, mine in zip(both, numbers, strict=True))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        drafted += found[0].shape[1] - 1
        places = [grown(luck, *each, words) for each in zip(texts, predictions, places, strict=True)]
    assert drafted > 0


def test_a_text_that_is_not_followed_is_refused() -> None:
    alignments = FusedAlignments(AlignmentRules(32, 2))
    with pytest.raises(IndexError, match="text 3 is not followed"):
        alignments.trees([3], [torch.tensor([1])], [8], [8], 0)


# requests ------------------------------------------------------------------------------------------------------------


def test_rows_without_a_prediction_cost_nothing_and_get_bare_roots() -> None:
    row, other = Row(TEXT), Row((), number=1)
    plan_rows = tuple(PlannedRow(each.sequence, each.sequence.length - 1, 1) for each in (other, row))
    plan, limit = Plan(plan_rows, plan_rows), RowQuota(5, 5, ASKED)
    trees = row.drafter.propose(plan, Quota((limit, limit)), cast(Any, None))
    assert trees is not None
    assert (trees.parents >= 0).sum(dim=1).tolist() == [0, 5]
    assert list(row.drafter._followed) == [row.sequence.id]
    alone = Plan(plan_rows[:1], plan_rows[:1])
    assert row.drafter.propose(alone, Quota((limit,)), cast(Any, None)) is None
    row.drafter.forget(row.sequence.id)
    assert not row.drafter._followed


def test_ids_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="prediction has token id 48") as caught:
        GenerateRequest("r", (1,), prediction_ids=(3, 48)).validate(48, 100, ())
    assert caught.value.param == "prediction"


@pytest.mark.parametrize("options", [{"max_match": 0}, {"max_match": 65}, {"branches": 0}, {"branches": 65}])
def test_options_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PredictionDrafter(PredictionOptions(**options), CONTEXT)


# on the demo target --------------------------------------------------------------------------------------------------


@cache
def loaded() -> LoadedModel:
    return load_target(EngineConfig(f"{ROOT}/demo/target", dtype="float32"))


@cache
def engine(plan: str | None) -> Engine:
    """An engine with the drafter under a plan; None: a plain one."""
    speculate = () if plan is None else ("prediction",)
    config = EngineConfig(f"{ROOT}/demo/target", dtype="float32", speculate=speculate, plan=plan or "auto")
    return Engine(config, loaded(), build_stepper(config, loaded(), build_drafters(config, loaded())))


GREEDY = SamplingParams(400, 0.0)
SOURCES = (1, 2)  # of the demo's prompts: after these the target writes lines of ordinary length
PLANS = ("fixed:nodes=16,depth=16", "auto")


@cache
def source(number: int) -> list[int]:
    """The beginning of a file, in tokens."""
    line = (ROOT / "demo/prompts.jsonl").read_text().splitlines()[number]
    return loaded().tokenizer.encode(json.loads(line)["prompt"])[:300]


@cache
def greedy_text(number: int) -> tuple[int, ...]:
    [generation] = engine(None).generate(source(number), GREEDY)
    assert len(generation.token_ids) == 400
    return tuple(generation.token_ids)


def tokens_per_step(plan: str, number: int, prediction: str | Many[int]) -> float:
    [generation] = engine(plan).generate(source(number), GREEDY, prediction=prediction)
    assert tuple(generation.token_ids) == greedy_text(number), "a prediction changes no text"
    assert whole(engine(plan))
    return len(generation.token_ids) / generation.speculation.steps


@pytest.mark.parametrize("number", SOURCES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_right_prediction_yields_eight_tokens_a_step(plan: str, number: int) -> None:
    assert tokens_per_step(plan, number, greedy_text(number)) >= 8


def edited(text: str, share: float, seed: int) -> str:
    """A text with a share of its lines renamed in, left out, doubled or replaced, one at least."""
    luck = random.Random(seed)
    lines = text.splitlines(keepends=True)
    for number in sorted(luck.sample(range(len(lines)), max(1, round(share * len(lines)))), reverse=True):
        line = lines[number]
        changed = [line.replace(" ", " renamed_", 1), "", line + line, "    # another line\n"]
        lines[number] = changed[luck.randrange(len(changed))]
    return "".join(lines)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", SOURCES)
@pytest.mark.parametrize("plan", PLANS)
def test_with_a_twentieth_of_its_lines_edited_five(plan: str, number: int, seed: int) -> None:
    prediction = edited(loaded().tokenizer.decode(greedy_text(number)), 0.05, seed)
    assert tokens_per_step(plan, number, prediction) >= 5


def test_a_prediction_of_another_text_does_no_harm() -> None:
    for plan in PLANS:
        assert tokens_per_step(plan, SOURCES[0], "Nothing of this will be said. " * 40) >= 1
        assert tokens_per_step(plan, SOURCES[0], "") == 1


def test_accepted_nodes_are_accounted() -> None:
    prompt = tuple(source(SOURCES[0]))
    params = SamplingParams(60, 0.0)
    truth = greedy_text(SOURCES[0])[:60]
    request = GenerateRequest("r", prompt, params, prediction_ids=truth)
    outcome = run(engine(PLANS[0]), [request])["r", 0]
    assert outcome.tokens == list(truth)
    stats = outcome.last.speculation
    assert stats is not None
    mine = stats.by_drafter["prediction"]
    assert mine.accepted == stats.accepted == 60 - stats.steps
    assert mine.drafted >= mine.accepted
    off = GenerateRequest("r", prompt, params, SpeculationParams(drafters=()), prediction_ids=truth)
    plain = run(engine(PLANS[0]), [off])["r", 0].last.speculation
    assert plain is not None
    assert (plain.steps, plain.drafted) == (60, 0)
