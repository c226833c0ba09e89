"""Measures what steps and drafting cost on this machine, by running them: a few seconds when a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from decoding.calibration import rising
from decoding.commit import Totals
from decoding.costs import CostTable, DraftPrice
from decoding.drafters.base import Drafter
from decoding.drafters.team import Proposal
from decoding.errors import SaccadeError
from decoding.plan import Guide, Plan, Quota, RowQuota
from decoding.planner import Limits, StepTimes, roots_of
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from decoding.step import Stepper
from models.tree import NO_PARENT, Trees, ancestor_masks
from models.tree_ops import ChosenTrees

logger = logging.getLogger("saccade.engine")

NODES = (0, 1, 2, 3, 4, 5, 7, 9, 11, 15, 19, 23, 27, 31, 39, 47, 55, 63)  # one row's trees
MANY = ((4, 31), (8, 31))  # (rows, nodes of each) of larger steps
ROWS = 8  # rows by which the price of a row is found
PROMPT = 24
CONTEXT = 512
REPEATS = ((0.004, 4), (0.2, 2), (float("inf"), 1))  # steps shorter than this are measured so often, a round
ROUNDS = ((0.004, 5), (0.05, 3), (float("inf"), 1))  # one-token steps shorter than this: so many rounds over the sizes
WARM_UP = 2


@dataclass
class ProbePlanner:
    """Gives every row a tree of so many random children of its root, and lets one drafter draft in vain."""

    limits_of: Limits
    nodes: int = 0
    drafter: Drafter | None = None
    depth: int = 1
    gear: str = "probe"

    def limits(self, plan: Plan) -> Quota:
        names = frozenset({self.drafter.name} if self.drafter else ())
        wanted = RowQuota(max(self.nodes, int(bool(names))), self.depth, names)
        for row in plan.deciding:
            if wanted.nodes and names:
                self.limits_of.reserve(row, wanted)
            elif wanted.nodes:
                self.limits_of.reserve_slots(row, wanted.nodes)
        guides = {name: Guide(self.depth, least_gain=0.0) for name in names}
        return Quota(tuple(wanted for _ in plan.deciding), guides)

    def quota(self, plan: Plan, limits: Quota, guesses: list[Proposal]) -> Quota:
        return limits

    def choose(self, plan: Plan, proposals: list[Proposal], quota: Quota, device: torch.device) -> ChosenTrees:
        rows, width = len(plan.deciding), 1 + self.nodes
        if not rows or not self.nodes:
            return roots_of(plan, device)
        tokens = torch.arange(width, device=device).repeat(rows, 1)
        tokens[:, 0] = torch.tensor([int(row.sequence.tokens[-1]) for row in plan.deciding], device=device)
        parents = torch.zeros_like(tokens)
        parents[:, 0] = NO_PARENT
        drafted = (parents != NO_PARENT).long()
        trees = Trees(tokens, parents, torch.full(tokens.shape, 0.5, device=device), drafted)
        return ChosenTrees(trees, ancestor_masks(parents), [width] * rows, 1)

    def learn(self, plan: Plan, chosen: ChosenTrees, made: int, times: StepTimes) -> None:
        """Whoever measures looks at the stepper's clocks."""

    def forget(self, sequence: Sequence) -> None:
        """Nothing to forget."""


class TextEnded(SaccadeError):
    """A made-up text ended, as those of a model do that breaks down: there is nothing to measure."""


class Probe:
    """Runs an idle stepper on made-up texts, and leaves it as it was."""

    def __init__(self, stepper: Stepper, limits: Limits, vocab_size: int, max_rows: int) -> None:
        self._stepper = stepper
        self._planner = ProbePlanner(limits)
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._number = 0

    def measure(self) -> CostTable | None:
        """The cost table of this stepper.

        None where its pool or its context is too small to run anything, or the target breaks down.
        """
        stepper = self._stepper
        kept, stepper.planner = stepper.planner, self._planner
        try:
            return self._table() if self._begin(1, PROMPT) else None
        except TextEnded:
            return None
        finally:
            stepper.planner = kept
            self._end()
            stepper.cache.prefixes.clear()
            stepper.committer.totals = Totals()
            stepper.reset_clocks()

    def _table(self) -> CostTable:
        sizes = [nodes for nodes in NODES if nodes < self._vocab_size]
        tokens, seconds = [1 + nodes for nodes in sizes], [self._steps(nodes) for nodes in sizes]
        # a slow moment of the machine must not be taken for the price of one size: they take turns
        for _ in range(next(count for limit, count in ROUNDS if seconds[0] < limit) - 1):
            self._begin(1, PROMPT)
            seconds = [min(known, self._steps(nodes)) for known, nodes in zip(seconds, sizes, strict=True)]
        row, context = self._row_price(seconds[tokens.index(ROWS)]), self._context_price()
        for rows, nodes in MANY:
            if self._begin(rows, PROMPT):
                tokens.append(rows * (1 + nodes))
                seconds.append(max(self._steps(nodes) - row * (rows - 1), seconds[-1]))
        drafters = {d.name: self._draft_price(d) for d in self._stepper.drafters.members}
        prices = np.array(seconds)
        smooth = tuple(rising(prices, np.ones_like(prices)).tolist())
        table = CostTable(tuple(tokens), smooth, row, context, drafters)
        table.check()
        return table

    def _row_price(self, one_row: float) -> float:
        """Seconds that a further row adds to a step of as many tokens."""
        if not self._begin(ROWS, PROMPT):
            return 0.0
        return max(0.0, self._steps(0) - one_row) / (ROWS - 1)

    def _context_price(self) -> float:
        """Seconds that a token of context adds."""
        self._begin(1, PROMPT)
        short = self._steps(0)
        if not self._begin(1, CONTEXT):
            return 0.0
        return max(0.0, self._steps(0) - short) / (CONTEXT - PROMPT)

    def _draft_price(self, drafter: Drafter) -> DraftPrice:
        deepest = max(1, min(drafter.max_depth, self._planner.limits_of.max_depth))
        many = ROWS if self._max_rows >= ROWS else 1
        taken: dict[tuple[int, int], float] = {}
        token = 0.0
        for rows in (1, many):  # twice the same if there is but one: what runs for the first time is slow
            if not self._begin(rows, PROMPT):
                continue
            token = self._catching_up(drafter, rows) / (rows * PROMPT)
            for depth in sorted({1, deepest}):
                taken[rows, depth] = self._drafting(drafter, depth)
        return draft_price(taken, deepest, token)

    def _catching_up(self, drafter: Drafter, rows: int) -> float:
        """Seconds that a drafter takes for the prompts of rows that begin, part of it with its first drafts."""
        stepper, planner = self._stepper, self._planner

        def clock() -> float:
            return stepper.drafters.taken[drafter.name] if stepper.target.device.type == "cpu" else stepper.seconds

        found: list[float] = []
        while not found or len(found) < next(count for limit, count in REPEATS if found[0] < limit):
            read = stepper.drafters.taken[drafter.name]
            self._begin(rows, PROMPT)
            read = stepper.drafters.taken[drafter.name] - read
            planner.drafter, planner.depth, before = drafter, 1, clock()
            stepper.step()
            found.append(read + clock() - before)
        later = self._least(clock)
        planner.drafter = None
        return max(0.0, min(found) - later)

    def _steps(self, nodes: int) -> float:
        """Seconds of a step with so many nodes in each row, drafting left out."""
        self._planner.nodes, self._planner.drafter = nodes, None
        return self._least(lambda: self._stepper.seconds - self._stepper.drafters.seconds)

    def _drafting(self, drafter: Drafter, depth: int) -> float:
        """Seconds of a drafter in a step."""
        self._planner.nodes, self._planner.drafter, self._planner.depth = 0, drafter, depth
        stepper = self._stepper
        if stepper.target.device.type == "cpu":
            taken = self._least(lambda: stepper.drafters.taken[drafter.name])
        else:  # a device works behind the host's back: drafting is what a step takes longer
            taken = self._least(lambda: stepper.seconds)
            self._planner.drafter = None
            taken = max(0.0, taken - self._least(lambda: stepper.seconds))
        self._planner.drafter = None
        return taken

    def _least(self, clock: Callable[[], float]) -> float:
        for _ in range(WARM_UP):
            self._stepper.step()
        found: list[float] = []
        while True:
            before = clock()
            self._stepper.step()
            found.append(clock() - before)
            self._check()
            if len(found) >= next(count for limit, count in REPEATS if found[0] < limit):
                return min(found)  # whatever else runs on the machine only adds

    def _begin(self, rows: int, prompt: int) -> bool:
        """Make an idle stepper run so many texts of so many tokens; False where it cannot."""
        self._end()
        longest = self._stepper.target.max_model_len
        tokens = min(longest - prompt, 512)
        pool = self._stepper.cache.prefixes.pool
        if rows > self._max_rows or tokens < 128 or rows * (prompt + tokens) > pool.num_pages * 16:
            return False
        self._planner.nodes, self._planner.drafter = 0, None
        generator = torch.Generator().manual_seed(rows * prompt)
        for _ in range(rows):
            ids = torch.randint(self._vocab_size, (prompt,), generator=generator).tolist()
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            sequence = Sequence(GenerateRequest(f"probe-{self._number}", tuple(ids), params), 0, 0)
            sequence.made_up = True
            self._stepper.scheduler.add(sequence)
            self._number += 1
        while self._stepper.scheduler.waiting or any(s.generated == 0 for s in self._stepper.scheduler.running):
            self._stepper.step()
        self._check()
        return True

    def _check(self) -> None:
        if not self._stepper.scheduler.running:
            raise TextEnded

    def _end(self) -> None:
        scheduler = self._stepper.scheduler
        for sequence in [*scheduler.running, *scheduler.waiting]:
            self._stepper.committer.end(sequence, "cancelled")


def draft_price(taken: dict[tuple[int, int], float], deepest: int, token: float) -> DraftPrice:
    """The price that fits what was taken by (rows, depth): one number of rows or two, depths 1 and ``deepest``."""
    sizes = sorted({rows for rows, _ in taken})
    if not sizes:
        return DraftPrice(token=token)
    few, many = sizes[0], sizes[-1]
    row = max(0.0, taken[many, 1] - taken[few, 1]) / max(1, many - few)
    further = {rows: max(0.0, taken[rows, deepest] - taken[rows, 1]) / max(1, deepest - 1) for rows in sizes}
    further_row = max(0.0, further[many] - further[few]) / max(1, many - few)
    return DraftPrice(
        first=max(0.0, taken[few, 1] - row * few),
        row=row,
        further=max(0.0, further[few] - further_row * few),
        further_row=further_row,
        token=token,
    )
