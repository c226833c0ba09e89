"""A world for planners without models: recorded proposals, measured costs, simulated time. Nothing in it is random.

A row reads a recorded text from some position on; what its drafters propose there was recorded (record.py), and what a
step takes is a sum over a cost table. So a planner can be asked, in no time and with the same answer everywhere, how
many tokens a second it would have made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.record import Recording
from decoding.costs import CostModel, CostTable
from decoding.drafters.base import Needs
from decoding.drafters.team import Proposal
from decoding.plan import Plan, PlannedRow, Quota
from decoding.planner import Planner, StepTimes
from decoding.request import GenerateRequest, SamplingParams
from decoding.sequence import Sequence
from models.tree import NO_PARENT, Trees

LAST = 8  # positions of a text that are not drafted from: what follows them is not all recorded


@dataclass
class SimulatedDrafter:
    """A name, and what a planner asks of a drafter."""

    name: str
    needs: Needs
    max_depth: int = 8

    def scratch_slots(self, depth: int) -> int:
        return 0

    def ready(self, sequence: Sequence) -> bool:
        return True

    def backlog(self, sequence: Sequence) -> int:
        return 1


class EndlessCache:
    """Pages for everybody."""

    def reserve(self, sequence: Sequence, slots: int) -> bool:
        return True


@dataclass
class Row:
    """A reader of a recorded text."""

    sequence: Sequence
    place: int  # position in the recording of the token that comes next


class World:
    """R rows over a recording.

    Args:
        costs: what things take. May be replaced while the world runs.
        spoilt: maps (drafter's name, seconds that have passed) to whether its trees are all wrong; None: never.
    """

    def __init__(
        self,
        recording: Recording,
        temperature: float,
        rows: int,
        costs: CostTable,
        spoilt: Callable[[str, float], bool] | None = None,
    ) -> None:
        self.recording = recording
        self.costs = CostModel(costs)
        self.seconds = 0.0
        self.tokens = 0
        self._spoilt = spoilt
        self._temperature = temperature
        self._texts = np.flatnonzero(recording.temperatures == temperature)
        self._begun = 0
        self._rows = [self._begin() for _ in range(rows)]

    def drafters(self) -> list[SimulatedDrafter]:
        return [SimulatedDrafter(name, Needs(host=name == "ngram")) for name in self.recording.names]

    def step(self, planner: Planner) -> None:
        """What ``Stepper.step`` does, with what was recorded."""
        rows = tuple(PlannedRow(row.sequence, row.sequence.length - 1, 1) for row in self._rows)
        plan = Plan(rows, rows)
        limits = planner.limits(plan)
        guesses = [p for bit in self._bits(host=True) if (p := self._propose(bit, limits)) is not None]
        quota = planner.quota(plan, limits, guesses)
        made = [p for bit in self._bits(host=False) if (p := self._propose(bit, quota)) is not None]
        chosen = planner.choose(plan, guesses + made, quota, torch.device("cpu"))
        taken = dict.fromkeys(self.recording.names, 0.0)
        for proposal in guesses + made:
            name = self.recording.names[proposal.bit]
            taken[name] = self._drafting(name, quota if proposal in made else limits)
        context = sum(row.end for row in plan.rows)
        step = self.costs.step(len(rows) + sum(chosen.counts) - len(rows), len(rows), context)
        grown = sum(self._advance(row, chosen.trees, number) for number, row in enumerate(self._rows))
        self.tokens += grown
        self.seconds += step + sum(taken.values())
        planner.learn(plan, chosen, grown, StepTimes(step + sum(taken.values()), taken))
        for number, row in enumerate(self._rows):
            if row.sequence.length >= row.sequence.limit - LAST:
                planner.forget(row.sequence)
                self._rows[number] = self._begin()

    def _bits(self, *, host: bool) -> list[int]:
        return [bit for bit, name in enumerate(self.recording.names) if (name == "ngram") == host]

    def _drafting(self, name: str, quota: Quota) -> float:
        rows = sum(1 for row in quota.rows if row.nodes and name in row.drafters)
        deepest = max((row.depth for row in quota.rows), default=1)
        asked = quota.guide(name).depth
        return self.costs.draft(name, rows, min(deepest, 8 if asked is None else asked)) if rows else 0.0

    def _propose(self, bit: int, quota: Quota) -> Proposal | None:
        """The recorded trees of the rows that may draft, cut to the depth that was asked for."""
        name, recording = self.recording.names[bit], self.recording
        asked = quota.guide(name).depth
        width = recording.tokens.shape[2]
        tokens = np.full((len(self._rows), 1 + width), -1)
        parents = np.full_like(tokens, NO_PARENT)
        confidence = np.zeros(tokens.shape, dtype=np.float32)
        confidence[:, 0] = 1.0
        drafted = False
        for number, (row, limit) in enumerate(zip(self._rows, quota.rows, strict=True)):
            tokens[number, 0] = row.sequence.tokens[-1]
            if not limit.nodes or name not in limit.drafters:
                continue
            depth = limit.depth if asked is None else min(limit.depth, asked)
            _hang(recording, bit, row.place, depth, tokens[number], parents[number], confidence[number])
            if self._spoilt is not None and self._spoilt(name, self.seconds):
                tokens[number, 1:] = np.where(parents[number, 1:] == NO_PARENT, -1, tokens[number, 1:] + 100_000)
            drafted = True
        if not drafted:
            return None
        source = (parents != NO_PARENT).astype(np.int64) << bit
        return Proposal(bit, Trees(*(torch.from_numpy(each) for each in (tokens, parents, confidence, source))))

    def _advance(self, row: Row, trees: Trees, number: int) -> int:
        """Append the accepted path and the token after it; how many these are."""
        tokens, parents = trees.tokens[number].tolist(), trees.parents[number].tolist()
        node, made = 0, 0
        while True:
            token = int(self.recording.text[row.place])
            row.sequence.append(token)
            row.place += 1
            made += 1
            children = [i for i, parent in enumerate(parents) if parent == node and tokens[i] == token and i > 0]
            if not children or row.sequence.length >= row.sequence.limit - 1:
                return made
            node = children[0]

    def _begin(self) -> Row:
        """A new row: the next text, from its beginning or from its middle."""
        text = int(self._texts[self._begun % len(self._texts)])
        first, end = int(self.recording.starts[text]), int(self.recording.starts[text + 1])
        skipped = (self._begun // len(self._texts) * 17) % ((end - first) // 2)
        place = first + skipped
        params = SamplingParams(max_tokens=end - place, temperature=self._temperature, ignore_eos=True)
        request = GenerateRequest(f"row-{self._begun}", (int(self.recording.text[place]),), params)
        self._begun += 1
        return Row(Sequence(request, 0, 1), place + 1)


def _hang(
    recording: Recording, bit: int, place: int, depth: int, tokens: np.ndarray, parents: np.ndarray, sure: np.ndarray
) -> None:
    """The upper part of a recorded tree, into a row's arrays."""
    level = np.zeros(len(tokens), dtype=np.int64)
    for column, parent in enumerate(recording.parents[bit, place].tolist(), start=1):
        if parent == NO_PARENT:
            continue
        level[column] = level[parent] + 1
        if level[column] <= depth:
            tokens[column] = recording.tokens[bit, place, column - 1]
            parents[column] = parent
            sure[column] = recording.confidence[bit, place, column - 1]


def rate(world: World, planner: Planner, seconds: float, warm_up: float = 0.0) -> float:
    """Tokens a second of simulated time."""
    while world.seconds < warm_up:
        world.step(planner)
    tokens, started = world.tokens, world.seconds
    while world.seconds < started + seconds:
        world.step(planner)
    return (world.tokens - tokens) / (world.seconds - started)
