"""The planner that weighs what drafts bring against what they cost (design section 2).

It maximises, over the whole batch, expected tokens a second:

    (rows + sum of path probabilities) / (drafting + step(query tokens, context))

Twice a step. Before a model drafts: which one, how deep and for which rows (market.py), by the forecast of each row's
coverage (forecast.py), given what the drafters without a model have guessed. After: which nodes, by their calibrated
confidences (calibration.py), at prices that are measured (costs.py). Nothing is drafted and nothing verified where it
does not pay. What is not used is tried now and then, for a share of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.cache import SequenceCache
from decoding.calibration import Calibration, mode_of
from decoding.costs import CostModel
from decoding.drafters.base import Drafter
from decoding.drafters.team import Proposal
from decoding.first_tokens import FirstTokens, beside_tokens, is_left_alone
from decoding.followers import Followers
from decoding.forecast import Forecast
from decoding.guessers import TRY, Guessers
from decoding.history import History
from decoding.market import UNABLE, Member, Scene, Terms, catching_up, lateness, load_market, slope_of
from decoding.plan import NOTHING, Guide, Plan, Quota, RowQuota
from decoding.planned_step import Crowd, PlannedStep
from decoding.planner import Certain, Limits, StepTimes, roots_of, share_of
from decoding.proposal_ops import ProposalOps
from decoding.pulse import FULL, LIGHT, NAMES, PLAIN, Beat, Pulse
from decoding.sequence import Sequence
from models.transfer import upload
from models.tree_ops import ChosenTrees, TreeOps

EXPLORING = 0.005  # share of the time that goes into trying each drafter that is not used
SOON = 24  # steps after a plain one, another is due
MOVED = 0.15  # if all prices (their logarithm) have moved so far since: that may be the price of nodes
DOUBTS = 10  # plain steps that are made then, one SOON after the other
LONG_STEP = 0.006  # seconds of a plain step beside which the planner's own time does not count
LOOK = 32  # of the steps in a low gear, one in so many teaches what steps cost and what guesses are worth
LONG_LOOK = 8  # the same where steps are long
CREDIT = 64  # steps whose time a drafter's credit is worth at most
DRIFT_STEP = 16  # steps between two of Forecast.drift
FLOOR = (0.01, 0.5)  # path probabilities below which a node is not forecast to be bought


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
        self._light_limits = Limits(cache, [d for d in drafters if d.needs.host], max_nodes, max_depth)
        self._certain = Certain(cache, drafters, max_nodes, max_depth, max_step_tokens)
        self._tree_ops = tree_ops
        self._device = device
        self._max_depth = max_depth
        self._max_step_tokens = max_step_tokens
        self.guessers = Guessers(drafters, costs, proposal_ops, self.forecast.depth)
        self._history = History(self.calibration, self.forecast)
        self._market = load_market()
        self._followers = Followers(self.members)
        self._first_tokens = FirstTokens()
        gears = [PLAIN, *([LIGHT] if self.guessers.members else []), *([FULL] if self.members else [])]
        least = TRY if self.guessers.pinning else 0  # steps of a try
        self._pulse = Pulse(tuple(gears), least)
        self._gear, self.gear = PLAIN, NAMES[PLAIN]
        self._long_pulse = Pulse((PLAIN, gears[-1]), least)
        self._no_quotas: dict[int, Quota] = {}  # by rows: most steps of a plain engine have one of a few
        self._beat: Beat | None = None
        self._crowd = Crowd((), torch.zeros(0, dtype=torch.int64))
        self._look = 1
        self._floor = 0.05
        self._kept_prices: dict[tuple[int, int], Tensor] = {}  # of light steps, by query tokens and rows
        self._rate = 0.0  # tokens a second that this step promises
        self._number = 0
        self._last_plain = 0, 0.0  # step, logarithm of all prices
        self._doubts = 0  # plain steps that are still due soon
        self._step: PlannedStep | None = None
        self._light_step = PlannedStep(Plan((), ()), self._crowd, 0.0)  # always the same one

    # the step ---------------------------------------------------------------------------------------------------------

    def limits(self, plan: Plan) -> Quota:
        """See ``Planner``."""
        self._number += 1
        self._step = self._beat = None
        rows = len(plan.deciding)
        self._gear = self._next_gear(plan) if rows and (self.members or self.guessers.members) else PLAIN
        self.gear = NAMES[self._gear]
        if self._gear == FULL or self._number % self._look == 0 or len(plan.rows) > rows:
            self._followers.settle(plan)  # new rows are never followed by those that sleep
        if self._gear == PLAIN:
            return self._certain.limits(plan) or self._no_quota(rows)
        crowd = self._gather(plan)
        share = share_of(plan, self._max_step_tokens)
        if self._gear == LIGHT:  # no more than a fixed plan does; prices are looked at now and then
            light = self._step = self._light_step
            light.plan, light.crowd, light.pinned = plan, crowd, []
            light.guesses.clear()
            return self.guessers.ask_lightly(self._light_limits.reserved(plan, share), plan.chain_tokens)
        if self._number % DRIFT_STEP == 0:
            self.forecast.drift(self._slots(crowd), crowd.modes)
        step = self._step = PlannedStep(plan, crowd, beside_tokens(plan, self.costs))
        limits = self.guessers.ask(self._limits.of(plan, share), plan.chain_tokens)
        step.drafting.update({name: (asked, 1) for name, asked in self.guessers.asking.items()})  # to learn their price
        return limits

    def quota(self, plan: Plan, limits: Quota, guesses: list[Proposal]) -> Quota:
        """See ``Planner``."""
        step = self._step
        if step is None or not limits.nodes:
            return limits
        for guess in guesses:
            self._calibrate(step, guess, learn=self._gear == FULL or self._number % self._look == 0)
        if self.guessers.pinning:
            step.pinned = self.guessers.pinned(step.guesses, limits)
        if self._gear == LIGHT:
            self.guessers.judge_lightly(plan, step.guesses, limits, self._floor)
            return limits if guesses else self._no_quota(len(limits.rows))
        scene = self._scene(step)
        terms = [self._terms(member, step, limits) for member in self.members]
        deal = step.deal = self._market(scene, terms)
        self._rate = deal.rate
        self._judge_guesses(step, limits)
        drafting: list[set[str]] = [set() for _ in limits.rows]
        guides: dict[str, Guide] = {}
        if deal.member >= 0:
            step.member = self.members[deal.member]
            self._ask(step, step.member, deal.depth, deal.rows, drafting, guides)
        self._explore(step, terms, drafting, guides)
        return self._granted(step, limits, drafting, guides, bool(guesses))

    def choose(self, plan: Plan, proposals: list[Proposal], quota: Quota, device: torch.device) -> ChosenTrees:
        """See ``Planner``."""
        step = self._step
        if not proposals or not quota.nodes:
            return roots_of(plan, device)
        nodes, depth = [row.nodes for row in quota.rows], [row.depth for row in quota.rows]
        if step is None:
            return self._tree_ops.choose([proposal.trees.to(device) for proposal in proposals], nodes, depth, 0.0)
        for proposal in proposals:
            if proposal.bit not in step.guesses:
                self._calibrate(step, proposal, learn=True)
        trees = [calibrated.to(device) for calibrated in step.guesses.values()]
        prices = self._light_prices(step, sum(nodes)) if self._gear == LIGHT else self._prices(step, sum(nodes))
        return self._tree_ops.choose(trees, nodes, depth, 0.0, 0, prices)

    def learn(self, plan: Plan, chosen: ChosenTrees, made: int, times: StepTimes) -> None:
        """See ``Planner``."""
        step = self._step
        self._first_tokens.save(times.all)
        if self._beat is not None:
            self._beat.charge(times.reading)
        if self._beat is not None and plan.chain_tokens == len(plan.deciding):
            self._beat.saw(self._gear, made, times.all)
        # where a low gear is the rule, one step in so many teaches something
        looks = self._look if self._beat is not None and self._gear == self._beat.current != FULL else 1
        if self._number % looks:
            return
        self._kept_prices.clear()
        # where a device works behind the host's back, drafting is known by its price alone
        waits = self._device.type == "cpu"
        drafting = sum(times.drafters.values()) if waits or step is None else step.seconds
        tokens = plan.chain_tokens + sum(chosen.counts) - len(chosen.counts)
        self.costs.learn_step(tokens, len(plan.rows), sum(row.end for row in plan.rows), times.all - drafting)
        saved = EXPLORING * times.all * looks
        for member in self.members:
            member.unused = self._number - member.used_at
            upkeep = times.drafters[member.name] if step is None or member.name not in step.drafting else 0.0
            member.credit = min(member.credit + saved, CREDIT * times.all) - looks * upkeep * member.sleeps
        self.guessers.save(saved)
        if step is None:
            return
        for name in step.drafting.keys() - step.catching_up if waits else ():
            rows, depth = step.drafting[name]
            self.costs.learn_draft(name, rows, depth, times.drafters[name])
        if step.member is not None and step.deal is not None:
            step.member.judge(step.deal.held + step.deal.gain, made - len(plan.deciding), self._number)
        self._history.settle(self._floor, self._number)

    def forget(self, sequence: Sequence) -> None:
        """See ``Planner``."""
        self.forecast.forget(sequence.id)
        self._limits.forget(sequence)
        self._light_limits.forget(sequence)
        self._certain.forget(sequence)
        self._crowd = Crowd((), self._crowd.modes)  # its slot may be another's next
        for member in self.members:
            if member.scout == sequence.id:
                member.scout = None

    def _no_quota(self, rows: int) -> Quota:
        quota = self._no_quotas.get(rows)
        if quota is None:
            quota = self._no_quotas[rows] = Quota((NOTHING,) * rows)
        return quota

    def _gather(self, plan: Plan) -> Crowd:
        key = tuple([row.sequence.id for row in plan.deciding])
        if key != self._crowd.key:
            self._crowd = Crowd(key, torch.tensor([mode_of(row.sequence) for row in plan.deciding]))
        return self._crowd

    def _slots(self, crowd: Crowd) -> Tensor:
        if crowd.slots is None:
            rows = zip(crowd.key, crowd.modes.tolist(), strict=True)
            crowd.slots = torch.tensor([self.forecast.join(sequence, mode) for sequence, mode in rows])
        return crowd.slots

    def _next_gear(self, plan: Plan) -> int:
        # beside long steps thought is free: no low gear saves any
        if self.costs.at(len(plan.deciding)) > LONG_STEP:
            pulse, self._look = self._long_pulse, LONG_LOOK
        else:
            pulse, self._look = self._pulse, LOOK
        self._beat = pulse.beat(len(plan.deciding), plan.deciding[0].sequence.kind)
        if self._first_tokens.go_alone(plan, self._beat):
            return PLAIN
        last, moved = self._last_plain
        if abs(self.costs.moved - moved) > MOVED:
            self._doubts = DOUBTS
        soon = self._doubts > 0 and self._number - last >= SOON
        gear = PLAIN if soon else self._beat.next()
        if gear == PLAIN:
            self._last_plain = self._number, self.costs.moved
            self._doubts = max(0, self._doubts - 1)
        return gear

    # before a model drafts --------------------------------------------------------------------------------------------

    def _calibrate(self, step: PlannedStep, proposal: Proposal, *, learn: bool) -> None:
        calibrated = self.calibration.apply(proposal.bit, proposal.trees, step.crowd.modes)
        if learn:
            self._history.add(step.plan, self._number, step.crowd.modes, proposal, calibrated)
        step.guesses[proposal.bit] = calibrated

    def _scene(self, step: PlannedStep) -> Scene:
        return Scene(
            guesses=list(step.guesses.values()),
            floor=self._floor,
            slots=self._slots(step.crowd),
            table=self.forecast.table,
            steps=self.costs.steps(),
            tokens=step.plan.chain_tokens + sum(step.pinned),
            extra=step.extra,
        )

    def _terms(self, member: Member, step: PlannedStep, limits: Quota) -> Terms:
        """At what a drafter would draft, and for which rows it may and can."""
        drafter, late, deepest = member.drafter, [], 0
        for row, limit in zip(step.plan.deciding, limits.rows, strict=True):
            if member.name in limit.drafters and drafter.ready(row.sequence) and not is_left_alone(row):
                late.append(lateness(member, row.sequence, self._max_depth, self.costs))
                deepest = max(deepest, limit.depth)
            else:
                late.append(UNABLE)
        price, factor = self.costs.table.drafters[member.name], self.costs.drafter_factor(member.name)
        return Terms(
            bit=member.bit,
            first=factor * price.first,
            row=factor * price.row,
            further=factor * price.further,
            further_row=factor * price.further_row,
            trust=member.trust,
            deepest=min(drafter.max_depth, self._max_depth, deepest),
            late=late,
        )

    def _judge_guesses(self, step: PlannedStep, limits: Quota) -> None:
        """Whether the guessers earn their time."""
        asked = self.guessers.asked(limits)
        if step.deal is not None:
            parts = zip(step.deal.parts[::2], step.deal.parts[1::2], strict=True)
            self.guessers.judge(step.plan, dict(zip(step.guesses, parts, strict=True)), asked)
        self.guessers.judge_pinning(step.plan, step.guesses, asked, self._floor)

    def _ask(
        self,
        step: PlannedStep,
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
        taus = self.calibration.taus(member.bit, int(step.crowd.modes[rows[0]]))
        guides[member.name] = Guide(depth, taus, None if exploring else further * self._rate)
        for row in rows:
            drafting[row].add(member.name)
        sequences = [step.plan.deciding[row].sequence for row in rows]
        late = sum([catching_up(member, sequence, self._max_depth, self.costs) for sequence in sequences])
        seconds = factor * price.seconds(len(rows), depth) + late
        step.drafting[member.name] = (len(rows), depth)
        if late:
            step.catching_up.add(member.name)
        step.seconds += seconds
        if exploring:
            member.credit -= seconds

    def _explore(
        self, step: PlannedStep, terms: list[Terms], drafting: list[set[str]], guides: dict[str, Guide]
    ) -> None:
        """Try a drafter that is not used on one row, the one least behind, if enough time has been saved up for it."""
        for member, term in zip(self.members, terms, strict=True):
            able = [row for row, late in enumerate(term.late) if late >= 0.0]
            if member is step.member or member.credit <= 0.0 or not able:
                continue
            row = min(able, key=lambda row: (term.late[row], (row - self._number) % len(step.plan.deciding)))
            late = catching_up(member, step.plan.deciding[row].sequence, self._max_depth, self.costs)
            if member.credit >= self.costs.draft(member.name, 1, max(1, term.deepest)) + late:
                self._ask(step, member, term.deepest, [row], drafting, guides, exploring=True)
                return

    def _bound(self, step: PlannedStep, row: int) -> int:
        """Nodes of a row where the host does not wait for their number: those that are foreseen, and room for more."""
        if step.deal is None:
            return 0
        foreseen = step.deal.guessed[row]
        if step.member is not None and row in step.deal.rows:
            foreseen += float(self.forecast.table.widths[step.member.bit, : step.deal.depth].sum())
        return int(1.25 * foreseen + 1) + (step.pinned[row] if step.pinned else 0)

    def _granted(
        self, step: PlannedStep, limits: Quota, drafting: list[set[str]], guides: dict[str, Guide], guessed: bool
    ) -> Quota:
        """The limits with each row's drafters; slots are reserved for those that have any."""
        rows, unasked = [], self.guessers.names | self._certain.names
        for number, (row, limit, names) in enumerate(zip(step.plan.deciding, limits.rows, drafting, strict=True)):
            if not limit.nodes or not (names or guessed):
                rows.append(NOTHING)
                continue
            nodes = limit.nodes if self._device.type == "cpu" else min(limit.nodes, self._bound(step, number))
            granted = RowQuota(nodes, limit.depth, frozenset(names | (unasked & limit.drafters)))
            wanted = nodes and granted.drafters  # guesses may be of other rows only
            rows.append(granted if wanted and self._limits.reserve(row, granted) else NOTHING)
        return Quota(tuple(rows), guides)

    # after drafting ---------------------------------------------------------------------------------------------------

    def _light_prices(self, step: PlannedStep, nodes: int) -> Tensor:
        """The prices of a light step, as they were when they were last looked at."""
        key = step.plan.chain_tokens, len(step.plan.deciding)
        prices = self._kept_prices.get(key)
        if prices is None or len(prices) <= nodes:
            step.extra = beside_tokens(step.plan, self.costs)
            prices = self._kept_prices[key] = self._prices(step, nodes)
        return prices if len(prices) == nodes + 1 else prices[: nodes + 1]

    def _prices(self, step: PlannedStep, nodes: int) -> Tensor:
        """[nodes + 1] float64, seconds of the whole step with k nodes in all."""
        roots, steps = step.plan.chain_tokens, self.costs.steps()
        sunk = step.seconds + step.extra
        if roots + nodes >= len(steps):
            index = torch.arange(roots, roots + nodes + 1).clamp_(max=len(steps) - 1)
            price = steps[index] + sunk
        else:
            price = steps[roots : roots + nodes + 1] + sunk
        if self._gear == FULL:
            needed = slope_of(roots, self.costs) * self._rate
            self._floor += 0.1 * (min(max(needed, FLOOR[0]), FLOOR[1]) - self._floor)
        return price if self._device.type == "cpu" else upload(self._device, price.numpy())[0]
