"""Which drafter is to draft, how deep and for which rows: the offers of all drafters, compared in tokens a second."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decoding.costs import LARGEST, CostModel
from decoding.drafters.base import Drafter
from decoding.sequence import Sequence, SequenceId

Floats = NDArray[np.float64]

DORMANT = 128  # steps after which a drafter that is not used stops following the rows
HORIZON = 64  # steps over which catching up with a text must pay
FADING = 0.98  # of what was promised and kept, a step
WORTH_RATE = 0.05
AHEAD = 8  # nodes over which the price of one is averaged: steps cost the same up to an edge
TRUST = (0.3, 1.5)  # how far promises are corrected


@dataclass
class Member:
    """A drafter that runs a model, as the planner sees it."""

    bit: int
    drafter: Drafter
    unused: int = 0  # steps since it was last used
    credit: float = 0.0  # seconds saved up for trying it
    scout: SequenceId | None = None  # the one row that it follows while it sleeps
    promised: float = 1.0  # accepted tokens forecast in steps that used it, fading
    kept: float = 1.0  # and those that came

    @property
    def name(self) -> str:
        return self.drafter.name

    @property
    def sleeps(self) -> bool:
        """It does not follow the rows."""
        return self.unused >= DORMANT

    @property
    def trust(self) -> float:
        """What its promises have been worth."""
        return min(max(self.kept / max(self.promised, 1e-6), TRUST[0]), TRUST[1])

    def judge(self, promised: float, kept: float) -> None:
        """A step that used it was to have so many tokens accepted, and had so many."""
        self.unused = 0
        self.promised = FADING * self.promised + (1 - FADING) * promised
        self.kept = FADING * self.kept + (1 - FADING) * kept


@dataclass
class Guesser:
    """A drafter that runs no model, as the planner sees it. Cheap is not free: with many rows it must earn its time."""

    bit: int
    name: str
    worth: float = 1.0  # seconds that its guesses save in a step, fading
    credit: float = 0.0  # seconds saved up for trying it

    def judge(self, saved: float) -> None:
        """A step's guesses were to save so many seconds."""
        self.worth += WORTH_RATE * (saved - self.worth)

    def is_due(self, price: float) -> bool:
        """Whether it is to be asked, at this price."""
        return self.worth >= price or self.credit >= price


@dataclass(frozen=True)
class Scene:
    """A step before any model has drafted."""

    held: Floats  # [R, D] how much of the text the guesses hold, by depth
    covered: Floats  # [R, drafters, D] how much each drafter's tree would
    widths: Floats  # [drafters, D] nodes of a tree, by depth
    tokens: int  # query tokens without drafts
    guessed: float  # nodes of the guesses that will be verified, about
    extra: float  # seconds of the step beside its query tokens: rows, context


@dataclass(frozen=True)
class Offer:
    """A drafter at work."""

    member: Member
    depth: int
    rows: list[int]
    gain: float  # accepted tokens that it promises beside the guesses'
    rate: float  # tokens a second of the whole step


def rate_without(scene: Scene, costs: CostModel) -> float:
    """Tokens a second if no model drafts."""
    steps, rows = costs.steps(), len(scene.held)
    guessed = (rows + float(scene.held.sum())) / (_at(steps, scene.tokens + scene.guessed) + scene.extra)
    return max(guessed, rows / (_at(steps, scene.tokens) + scene.extra))


def offer_of(
    member: Member, able: list[int], late: list[float], deepest: int, scene: Scene, costs: CostModel, pace: float
) -> Offer | None:
    """The best that a drafter can do for the rows that it is able to draft for; None where no row pays.

    Args:
        late: [len(able)] seconds for catching up with each of these rows' texts.
        deepest: depth of its trees at most.
        pace: seconds that a token costs without it.
    """
    steps, level = costs.steps(), slice(0, deepest)
    price, factor = costs.table.drafters[member.name], costs.drafter_factor(member.name)
    fresh = scene.covered[able, member.bit, level] * (1.0 - scene.held[able, level])
    gain = np.cumsum(fresh, axis=1) * member.trust  # [S, D] tokens
    nodes = np.cumsum(scene.widths[member.bit, level])  # [D]
    passes = np.arange(deepest)
    base = scene.tokens + scene.guessed
    slope = slope_of(base, costs)
    own = factor * (price.row + passes * price.further_row) + slope * nodes  # [D] seconds of a row
    waiting = np.array(late)
    pays = gain * pace > own + waiting[:, None]  # [S, D]
    count = pays.sum(axis=0)  # [D]
    promised = (gain * pays).sum(axis=0)
    size = np.minimum(base + count * nodes + 0.5, LARGEST).astype(np.int64)
    drafting = factor * (price.first + price.row * count + passes * (price.further + price.further_row * count))
    seconds = steps[size] + scene.extra + drafting + waiting @ pays
    rate = np.where(count > 0, (len(scene.held) + scene.held.sum() + promised) / seconds, 0.0)
    best = int(rate.argmax())
    if not count[best]:
        return None
    rows = [row for row, pay in zip(able, pays[:, best].tolist(), strict=True) if pay]
    return Offer(member, best + 1, rows, float(promised[best]), float(rate[best]))


def lateness(member: Member, sequence: Sequence, depth: int, costs: CostModel) -> float:
    """Seconds of catching up with a text, shared out over the steps that will profit."""
    backlog = member.drafter.backlog(sequence)
    if backlog <= depth + 1:
        return 0.0
    return costs.catch_up(member.name, backlog) / min(HORIZON, max(1, sequence.limit - sequence.length))


def slope_of(tokens: float, costs: CostModel) -> float:
    """Seconds of one more node beside so many query tokens, about."""
    steps = costs.steps()
    return (_at(steps, tokens + AHEAD) - _at(steps, tokens)) / AHEAD


def _at(steps: Floats, tokens: float) -> float:
    return float(steps[min(int(tokens + 0.5), LARGEST)])
