"""The planner that weighs what drafts bring against what they cost (design section 2).

It maximises, over the whole batch, expected tokens a second:

    (rows + sum of path probabilities) / (drafting + step(query tokens, context))

Twice a step. Before a model drafts: which one, how deep and for which rows (market.py), by the forecast of each row's
coverage (forecast.py), given what the drafters without a model have guessed. After: which nodes, by their calibrated
confidences (calibration.py), at prices that are measured (costs.py). Nothing is drafted and nothing verified where it
does not pay. What is not used is tried now and then, for a share of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from decoding.cache import SequenceCache
from decoding.calibration import Calibration, mode_of
from decoding.costs import LARGEST, CostModel
from decoding.drafters.base import Drafter
from decoding.drafters.team import Proposal
from decoding.forecast import Forecast
from decoding.history import History
from decoding.market import Floats, Guesser, Member, Offer, Scene, lateness, offer_of, rate_without, slope_of
from decoding.plan import Guide, Plan, Quota, RowQuota
from decoding.planner import Limits, StepTimes, roots_of, share_of
from decoding.proposal_ops import ProposalOps
from decoding.sequence import Sequence
from models.transfer import upload
from models.tree import Trees
from models.tree_ops import ChosenTrees, TreeOps

EXPLORING = 0.005  # share of the time that goes into trying each drafter that is not used
PLAIN_STEP = 512  # one step in so many is plain, to know what that costs,
SOON = 24  # or in so many,
MOVED = 0.15  # if all prices (their logarithm) have moved so far since: that may be the price of nodes
DRIFT_STEP = 16  # steps between two of Forecast.drift
FLOOR = (0.01, 0.5)  # path probabilities below which a node is not forecast to be bought


@dataclass
class _Step:
    """What is known and decided of the step that is under way."""

    plan: Plan
    modes: Tensor  # [R]
    slots: Tensor  # [R] of the forecast
    extra: float  # seconds beside its query tokens
    guessed: Floats  # [R] nodes of the guesses that will be verified, about
    asked: set[str] = field(default_factory=set)  # drafters that were asked to guess
    plain: bool = False
    guesses: dict[int, Trees] = field(default_factory=dict)  # calibrated, by bit
    drafting: dict[str, tuple[int, int]] = field(default_factory=dict)  # drafter -> (rows, depth)
    seconds: float = 0.0  # of that drafting
    offer: Offer | None = None
    expected: float = 0.0  # accepted tokens


class AutoPlanner:
    """See the module. What it decides is a function of what it has been told: it looks at no clock, draws no lots."""

    def __init__(
        self,
        cache: SequenceCache,
        drafters: list[Drafter],
        tree_ops: TreeOps,
        proposal_ops: ProposalOps,
        costs: CostModel,
        *,
        max_nodes: int,
        max_depth: int,
        max_step_tokens: int,
        device: torch.device,
    ) -> None:
        self.costs = costs
        self.calibration = Calibration(len(drafters), proposal_ops)
        self.forecast = Forecast(len(drafters), max(max_depth, 1), proposal_ops)
        self.members = [Member(bit, drafter) for bit, drafter in enumerate(drafters) if not drafter.needs.host]
        self._limits = Limits(cache, drafters, max_nodes, max_depth)
        self._tree_ops = tree_ops
        self._proposal_ops = proposal_ops
        self._device = device
        self._max_depth = max_depth
        self._max_step_tokens = max_step_tokens
        self.guessers = [Guesser(bit, drafter.name) for bit, drafter in enumerate(drafters) if drafter.needs.host]
        self._history = History(self.calibration, self.forecast)
        self._floor = 0.05
        self._rate = 0.0  # tokens a second that this step promises
        self._number = 0
        self._last_plain = 0, 0.0  # step, logarithm of all prices
        self._step: _Step | None = None

    # the step ---------------------------------------------------------------------------------------------------------

    def limits(self, plan: Plan) -> Quota:
        """See ``Planner``."""
        self._number += 1
        self._step = None
        if not plan.deciding or not (self.members or self.guessers):
            return Quota(tuple(RowQuota() for _ in plan.deciding))
        sequences = [row.sequence for row in plan.deciding]
        modes = [mode_of(sequence) for sequence in sequences]
        slots = [self.forecast.join(sequence.id, mode) for sequence, mode in zip(sequences, modes, strict=True)]
        self._settle_followers(plan)
        extra = self.costs.extra(len(plan.rows), sum(row.end for row in plan.rows))
        step = self._step = _Step(plan, torch.tensor(modes), torch.tensor(slots), extra, np.zeros(len(sequences)))
        if self._number % DRIFT_STEP == 0:
            self.forecast.drift(step.slots, step.modes)
        if self._is_plain_due():
            step.plain = True
            self._last_plain = self._number, math.log(self.costs.factor)
            return Quota(tuple(RowQuota() for _ in plan.deciding))
        return self._asked_to_guess(self._limits.of(plan, share_of(plan, self._max_step_tokens)))

    def quota(self, plan: Plan, limits: Quota, guesses: list[Proposal]) -> Quota:
        """See ``Planner``."""
        step = self._step
        if step is None or step.plain or not limits.nodes:
            return limits
        for guess in guesses:
            self._calibrate(step, guess)
        drafting: list[set[str]] = [set() for _ in limits.rows]
        guides: dict[str, Guide] = {}
        scene = self._scene(step)
        if self.members:
            step.offer = self._best_offer(step, limits, scene)
            step.expected = float(scene.held.sum()) + (step.offer.gain if step.offer else 0.0)
            if step.offer is not None:
                self._ask(step, step.offer.member, step.offer.depth, step.offer.rows, drafting, guides)
            self._explore(step, limits, drafting, guides)
        return self._granted(step, limits, drafting, guides, bool(guesses))

    def choose(self, plan: Plan, proposals: list[Proposal], quota: Quota, device: torch.device) -> ChosenTrees:
        """See ``Planner``."""
        step = self._step
        if step is None or not proposals or not quota.nodes:
            return roots_of(plan, device)
        for proposal in proposals:
            if proposal.bit not in step.guesses:
                self._calibrate(step, proposal)
        nodes, depth = [row.nodes for row in quota.rows], [row.depth for row in quota.rows]
        trees = [calibrated.to(device) for calibrated in step.guesses.values()]
        return self._tree_ops.choose(trees, nodes, depth, 0.0, 0, self._prices(step, sum(nodes)))

    def learn(self, plan: Plan, chosen: ChosenTrees, made: int, times: StepTimes) -> None:
        """See ``Planner``."""
        if not (self.members or self.guessers):
            return  # nothing will ever be weighed
        step = self._step
        tokens = plan.chain_tokens + sum(chosen.counts) - len(chosen.counts)
        context = sum(row.end for row in plan.rows)
        # where a device works behind the host's back, drafting is known by its price alone
        waits = self._device.type == "cpu"
        drafting = sum(times.drafters.values()) if waits or step is None else step.seconds
        self.costs.learn_step(tokens, len(plan.rows), context, times.all - drafting)
        for member in self.members:
            member.unused += 1
            member.credit += EXPLORING * times.all
        for guesser in self.guessers:
            guesser.credit += EXPLORING * times.all
        if step is None:
            return
        for name, (rows, depth) in step.drafting.items() if waits else ():
            self.costs.learn_draft(name, rows, depth, times.drafters[name])
        if step.offer is not None:
            step.offer.member.judge(step.expected, made - len(plan.deciding))
        self._history.settle(self._floor)

    def forget(self, sequence: Sequence) -> None:
        """See ``Planner``."""
        self.forecast.forget(sequence.id)
        for member in self.members:
            if member.scout == sequence.id:
                member.scout = None

    def _is_plain_due(self) -> bool:
        last, price = self._last_plain
        moved = abs(math.log(self.costs.factor) - price) > MOVED
        return self._number - last >= (SOON if moved else PLAIN_STEP)

    def _asked_to_guess(self, limits: Quota) -> Quota:
        """The limits without the guessers that are not worth their time; each of them is tried now and then."""
        step = self._step
        assert step is not None
        resting = set()
        for guesser in self.guessers:
            rows = sum(1 for row in limits.rows if row.nodes and guesser.name in row.drafters)
            if guesser.is_due(self.costs.draft(guesser.name, rows, 1)):
                guesser.credit = 0.0
                step.asked.add(guesser.name)
            else:
                resting.add(guesser.name)
        if not resting:
            return limits
        return Quota(tuple(replace(row, drafters=row.drafters - resting) for row in limits.rows))

    # before a model drafts --------------------------------------------------------------------------------------------

    def _calibrate(self, step: _Step, proposal: Proposal) -> None:
        calibrated = self.calibration.apply(proposal.bit, proposal.trees, step.modes)
        self._history.add(step.plan, step.modes, proposal, calibrated)
        step.guesses[proposal.bit] = calibrated

    def _scene(self, step: _Step) -> Scene:
        rows = len(step.plan.deciding)
        held = np.zeros((rows, self._max_depth))
        pace, node = self.costs.steps()[min(step.plan.chain_tokens, LARGEST)] / rows, -1.0
        for guesser in self.guessers:
            trees = step.guesses.get(guesser.bit)
            if trees is None:
                if guesser.name in step.asked:
                    guesser.judge(0.0)
                continue
            part, nodes = self._proposal_ops.coverage(trees, self._floor, self._max_depth)
            held = np.maximum(held, part.numpy())
            step.guessed += nodes.numpy()
            node = node if node >= 0 else slope_of(step.plan.chain_tokens, self.costs)
            guesser.judge(max(0.0, float(part.sum()) * pace - float(nodes.sum()) * node))
        covered: Floats = self.forecast.coverage(step.slots).numpy()
        return Scene(
            held, covered, self.forecast.widths.numpy(), step.plan.chain_tokens, float(step.guessed.sum()), step.extra
        )

    def _best_offer(self, step: _Step, limits: Quota, scene: Scene) -> Offer | None:
        """The drafter at work that promises the most tokens a second; None: no model should draft."""
        best: Offer | None = None
        self._rate = rate_without(scene, self.costs)
        pace = 1 / self._rate
        for member in self.members:
            able = self._able(member, step, limits)
            if not able:
                continue
            late = [lateness(member, step.plan.deciding[i].sequence, self._max_depth, self.costs) for i in able]
            deepest = min(member.drafter.max_depth, self._max_depth, max(limits.rows[i].depth for i in able))
            offer = offer_of(member, able, late, deepest, scene, self.costs, pace)
            if offer is not None and offer.rate > self._rate:
                self._rate, best = offer.rate, offer
        return best

    def _able(self, member: Member, step: _Step, limits: Quota) -> list[int]:
        """Rows that the drafter may draft for and can."""
        ready, rows = member.drafter.ready, step.plan.deciding
        pairs = enumerate(zip(rows, limits.rows, strict=True))
        return [i for i, (row, m) in pairs if m.nodes and member.name in m.drafters and ready(row.sequence)]

    def _ask(
        self,
        step: _Step,
        member: Member,
        depth: int,
        rows: list[int],
        drafting: list[set[str]],
        guides: dict[str, Guide],
        *,
        exploring: bool = False,
    ) -> None:
        """Let a drafter draft for these rows."""
        price, factor = self.costs.table.drafters[member.name], self.costs.drafter_factor(member.name)
        further = factor * (price.further + price.further_row * len(rows))
        taus = self.calibration.taus(member.bit, int(step.modes[rows[0]]))
        guides[member.name] = Guide(depth, taus, None if exploring else further * self._rate)
        for row in rows:
            drafting[row].add(member.name)
        seconds = factor * price.seconds(len(rows), depth)
        step.drafting[member.name] = (len(rows), depth)
        step.seconds += seconds
        if exploring:
            member.credit -= seconds

    def _explore(self, step: _Step, limits: Quota, drafting: list[set[str]], guides: dict[str, Guide]) -> None:
        """Try a drafter that is not used on one row, if enough time has been saved up for it."""
        for member in self.members:
            used = step.offer is not None and step.offer.member is member
            depth = min(member.drafter.max_depth, self._max_depth)
            if used or member.credit < self.costs.draft(member.name, 1, depth):
                continue
            able = self._able(member, step, limits)
            near = [i for i in able if not lateness(member, step.plan.deciding[i].sequence, depth, self.costs)]
            if near:
                row = near[self._number % len(near)]
                self._ask(step, member, depth, [row], drafting, guides, exploring=True)
                return

    def _bound(self, step: _Step, row: int) -> int:
        """Nodes of a row where the host does not wait for their number: those that are foreseen, and room for more."""
        foreseen = float(step.guessed[row])
        if step.offer is not None and row in step.offer.rows:
            foreseen += float(self.forecast.widths[step.offer.member.bit, : step.offer.depth].sum())
        return int(1.25 * foreseen + 1)

    def _granted(
        self, step: _Step, limits: Quota, drafting: list[set[str]], guides: dict[str, Guide], guessed: bool
    ) -> Quota:
        """The limits with each row's drafters; slots are reserved for those that have any."""
        rows = []
        for number, (row, limit, names) in enumerate(zip(step.plan.deciding, limits.rows, drafting, strict=True)):
            granted = replace(limit, drafters=frozenset(names | (step.asked & limit.drafters)))
            if self._device.type != "cpu":
                granted = replace(granted, nodes=min(granted.nodes, self._bound(step, number)))
            wanted = limit.nodes and (names or (guessed and granted.drafters))
            rows.append(granted if wanted and self._limits.reserve(row, granted) else RowQuota())
        return Quota(tuple(rows), guides)

    def _settle_followers(self, plan: Plan) -> None:
        """Drafters that sleep do not follow the rows, but for one: their model neither runs nor keeps anything."""
        for member in self.members:
            for row in plan.rows:
                unfollowed = row.sequence.unfollowed
                if not member.sleeps:
                    unfollowed.discard(member.name)
                elif member.scout is None and member.name not in unfollowed:
                    member.scout = row.sequence.id
                elif member.scout != row.sequence.id:
                    unfollowed.add(member.name)

    # after drafting ---------------------------------------------------------------------------------------------------

    def _prices(self, step: _Step, nodes: int) -> Tensor:
        """[nodes + 1] float64, seconds of the whole step with k nodes in all."""
        roots = step.plan.chain_tokens
        index = np.minimum(np.arange(roots, roots + nodes + 1), LARGEST)
        price = self.costs.steps()[index] + (step.seconds + step.extra)
        needed = slope_of(roots, self.costs) * self._rate
        self._floor += 0.1 * (min(max(float(needed), FLOOR[0]), FLOOR[1]) - self._floor)
        return upload(self._device, price)[0]
