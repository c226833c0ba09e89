"""First tokens wait for nobody's drafts: what is left undone in their steps, what that may cost, and who joins late."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from benchmarks.simulator import EndlessCache, SimulatedDrafter
from decoding.auto_planner import AutoPlanner
from decoding.costs import EDGES, CostModel, CostTable, DraftPrice
from decoding.drafters.base import DrafterContext, Needs
from decoding.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from decoding.drafters.team import Proposal
from decoding.engine import Engine
from decoding.first_tokens import SHARE, FirstTokens, beside_tokens
from decoding.plan import Plan, PlannedRow, Quota
from decoding.proposal_ops import load_proposal_ops
from decoding.pulse import FULL, PLAIN, Beat
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models.tree import Trees
from models.tree_ops import load_tree_ops
from tests.engines import BuildDrafter, make_engine, run, tiny_decoder

CPU = torch.device("cpu")
TABLE = CostTable(EDGES, tuple(1e-3 * (1 + 0.05 * (t - 1)) for t in EDGES), row=1e-5, context=1e-7)


def sequence(name: str, prompt: int, made: int = 0, n: int = 1, expected: tuple[int, ...] = ()) -> Sequence:
    request = GenerateRequest(name, (1,) * prompt, SamplingParams(100, 0.0, n=n), prediction_ids=expected)
    new = Sequence(request, 0, 0)
    for _ in range(made):
        new.append(2)
    new.cached = new.length - 1 if made else 0
    return new


def plan_of(*sequences: Sequence) -> Plan:
    """All decide."""
    rows = tuple(PlannedRow(each, each.cached, each.length - each.cached) for each in sequences)
    return Plan(rows, rows)


# what it may cost ----------------------------------------------------------------------------------------------------


def beat(plain: tuple[int, float], full: tuple[int, float]) -> Beat:
    """In its full gear, after steps of so many tokens and seconds in each."""
    made = Beat((PLAIN, FULL))
    for gear, (tokens, seconds) in ((PLAIN, plain), (FULL, full)):
        for _ in range(10 if seconds else 0):
            made.saw(gear, tokens, seconds)
    return made


RUNNING, NEW, EXPECTED = sequence("running", 5, made=3), sequence("new", 300), sequence("new", 300, expected=(1, 2))
GAINING = beat((8, 1.0), (20, 1.6))  # 12.5 tokens a second in place of 8; 0.36 s are lost by a plain step, 0.6 saved


def rested() -> FirstTokens:
    """With as much as can be saved up."""
    first = FirstTokens()
    for _ in range(1000):
        first.save(1.0)
    return first


@pytest.mark.parametrize(
    ("plan", "seen", "expected"),
    [
        (plan_of(RUNNING, NEW), GAINING, True),
        (plan_of(NEW), GAINING, True),
        (plan_of(RUNNING), GAINING, False),  # nobody waits
        (plan_of(RUNNING, sequence("choices", 300, n=2)), GAINING, False),  # others wait for what is drafted of it
        (plan_of(RUNNING, EXPECTED), GAINING, True),  # 0.36 s are lost, and 0.6 saved
        (plan_of(RUNNING, EXPECTED), beat((8, 1.0), (30, 1.2)), False),  # 0.68 s are lost, and 0.2 saved
        (plan_of(RUNNING, EXPECTED, *[sequence("more", 9)] * 3), beat((8, 1.0), (30, 1.2)), True),
        (plan_of(RUNNING, NEW), beat((0, 0.0), (20, 1.6)), True),  # nobody knows what is lost
        (plan_of(RUNNING, NEW), beat((8, 1.0), (7, 1.5)), True),  # nothing is lost
    ],
)
def test_drafts_are_left_out_where_somebody_waits_for_a_first_token(plan: Plan, seen: Beat, expected: bool) -> None:
    assert rested().go_alone(plan, seen) is expected


def test_no_more_than_a_share_of_the_time_is_lost_to_first_tokens() -> None:
    first, lost, seconds = FirstTokens(), 0.0, 0.0
    plan = plan_of(RUNNING, NEW)
    for _ in range(2000):  # one comes in every step
        alone = first.go_alone(plan, GAINING)
        taken = 1.0 if alone else 1.6
        lost += 0.36 if alone else 0.0
        seconds += taken
        first.save(taken)
    assert 0.9 * SHARE < lost / seconds <= SHARE


# what nodes cost beside a prompt --------------------------------------------------------------------------------------


def test_prompts_are_no_reason_to_draft() -> None:
    costs = CostModel(TABLE)
    alone, beside = plan_of(RUNNING), plan_of(RUNNING, NEW)
    assert beside_tokens(alone, costs) == pytest.approx(costs.extra(1, RUNNING.length))
    whole = costs.at(beside.chain_tokens) + beside_tokens(beside, costs)
    assert whole == pytest.approx(costs.at(2) + costs.extra(2, RUNNING.length + NEW.length))


def chain(probability: float, length: int, rows: int) -> Trees:
    """A guess for the first of so many rows: each token as probable as the one before it."""
    tokens, parents = torch.full((rows, 1 + length), -1), torch.full((rows, 1 + length), -1)
    confidence, source = torch.zeros(rows, 1 + length), torch.zeros(rows, 1 + length, dtype=torch.int64)
    tokens[:, 0], confidence[:, 0] = 2, 1.0
    tokens[0, 1:] = torch.arange(3, 3 + length)
    parents[0, 1:] = torch.arange(length)
    confidence[0, 1:], source[0, 1:] = probability, 1
    return Trees(tokens, parents, confidence, source)


def bought(plan: Plan) -> int:
    """Nodes of a guess that the planner verifies."""
    drafters = [SimulatedDrafter("ngram", Needs(host=True))]
    ops = load_tree_ops(CPU)
    planner = AutoPlanner(
        *(cast(Any, EndlessCache()), cast(Any, drafters), ops, load_proposal_ops(CPU)),
        CostModel(CostTable(TABLE.tokens, TABLE.seconds, TABLE.row, TABLE.context, {"ngram": DraftPrice()})),
        max_nodes=24,
        max_depth=24,
        max_step_tokens=2048,
        device=CPU,
    )
    limits = planner.limits(plan)
    guess = Proposal(0, chain(0.7, 20, len(plan.deciding)))
    quota = planner.quota(plan, limits, [guess])
    chosen = planner.choose(plan, [guess], quota, CPU)
    return sum(chosen.counts) - len(chosen.counts)


def test_a_node_is_worth_beside_a_prompt_what_it_is_worth_without_one() -> None:
    """What a prompt takes is no part of what tokens cost: else nodes of a percent's chance would be a bargain there."""
    alone, beside = bought(plan_of(RUNNING)), bought(plan_of(RUNNING, sequence("choices", 300, n=2)))
    assert 0 < alone < 20
    assert abs(beside - alone) <= 2


# who reads a prompt when ----------------------------------------------------------------------------------------------


class Asked(DraftModelDrafter):
    """Notes the rows that it is asked to draft for, by how many tokens they have made."""

    made: list[int]

    def propose(self, plan: Plan, quota: Quota, sampling: Any) -> Trees | None:
        rows = zip(plan.deciding, quota.rows, strict=True)
        self.made += [row.sequence.generated for row, limit in rows if self.name in limit.drafters]
        return super().propose(plan, quota, sampling)


def asked(made: list[int]) -> BuildDrafter:
    def build(context: DrafterContext) -> Asked:
        drafter = Asked(
            DraftModelOptions("", depth=3, top_k=1, beam=1, min_confidence=0.0), context, tiny_decoder(torch.float64)
        )
        drafter.made = made
        return drafter

    return build


def cheap_to_draft(engine: Engine) -> Engine:
    """Drafting costs next to nothing, so the planner always drafts."""
    planner = engine._stepper.planner
    assert isinstance(planner, AutoPlanner)
    names = engine.info.drafters
    seconds = tuple(1.0 + 1e-4 * t for t in EDGES)
    planner.costs.replace(CostTable(EDGES, seconds, drafters=dict.fromkeys(names, DraftPrice(first=1e-6, token=1e-9))))
    return engine


@pytest.mark.parametrize("n", [1, 2])
def test_a_draft_model_reads_a_prompt_behind_its_first_token(n: int) -> None:
    """Unless other choices wait to share what it makes of the prompt."""
    made: list[int] = []
    engine = make_engine(tiny_decoder(torch.float64), {"draft": asked(made)}, plan="auto")
    cheap_to_draft(engine)
    prompt = tuple(range(1, 40))
    run(engine, [GenerateRequest("r", prompt, SamplingParams(30, 0.0, ignore_eos=True, n=n))])
    assert made
    assert (min(made) > 0) is (n == 1)
