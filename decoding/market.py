"""Which drafter is to draft, how deep and for which rows: the offers of all drafters, compared in tokens a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from decoding.costs import CostModel
from decoding.drafters.base import Drafter
from decoding.proposal_ops import CoverageTable, TorchProposalOps
from decoding.sequence import Sequence, SequenceId
from models import kernels
from models.tree import Trees

Floats = NDArray[np.float64]

DORMANT = 128  # steps after which a drafter that is not used stops following the rows
HORIZON = 64  # steps over which catching up with a text must pay
FADING = 0.98  # of what was promised and kept, a step
AHEAD = 8  # nodes over which the price of one is averaged: steps cost the same up to an edge
TRUST = (0.3, 1.5)  # how far promises are corrected
UNABLE = -1.0  # in place of a row's lateness: the drafter cannot draft for it


@dataclass
class Member:
    """A drafter that runs a model, as the planner sees it."""

    bit: int
    drafter: Drafter
    used_at: int = 0  # step that used it last
    unused: int = 0  # steps since then
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

    def judge(self, promised: float, kept: float, step: int) -> None:
        """The step, which used it, was to have so many tokens accepted, and had so many."""
        self.unused, self.used_at = 0, step
        self.promised = FADING * self.promised + (1 - FADING) * promised
        self.kept = FADING * self.kept + (1 - FADING) * kept


@dataclass(frozen=True)
class Terms:
    """At what a drafter would draft in this step. Seconds as in ``DraftPrice``, at today's factor."""

    bit: int
    first: float
    row: float
    further: float
    further_row: float
    trust: float
    deepest: int  # depth of its trees at most
    late: list[float]  # [R] seconds for catching up with each row's text; UNABLE

    def numbers(self) -> list[float]:
        """What the kernel takes, without ``late``."""
        return [self.bit, self.first, self.row, self.further, self.further_row, self.trust, self.deepest]


@dataclass(frozen=True)
class Scene:
    """A step before any model has drafted."""

    guesses: list[Trees]  # calibrated
    floor: float  # nodes whose path is less probable are not counted
    slots: Tensor  # [R] where the rows' chances are
    table: CoverageTable
    steps: Tensor  # [largest + 1] float64 seconds of a step by query tokens; more cost the same
    tokens: int  # query tokens without drafts
    extra: float  # seconds of the step beside its query tokens: rows, context


@dataclass(frozen=True)
class Deal:
    """What the market says."""

    parts: list[float]  # for each guess: expected tokens, nodes
    guessed: list[float]  # [R] nodes of all guesses
    held: float  # tokens that the guesses hold, expected
    member: int  # index into the terms; -1: no model should draft
    depth: int
    rows: list[int]
    gain: float  # accepted tokens that it promises beside the guesses'
    rate: float  # tokens a second of the whole step


Market = Callable[[Scene, list[Terms]], Deal]
"""The best that can be done: one of the drafters, at some depth, for the rows where it pays; or none of them."""


def weigh_anywhere(scene: Scene, terms: list[Terms]) -> Deal:
    """The market in NumPy: what it means."""
    rows, depth = len(scene.slots), scene.table.widths.shape[1]
    held, guessed, parts = np.zeros((rows, depth)), np.zeros(rows), []
    for trees in scene.guesses:
        part, nodes = TorchProposalOps().coverage(trees, scene.floor, depth)
        held = np.maximum(held, part.numpy())
        guessed += nodes.numpy()
        parts += [float(part.sum()), float(nodes.sum())]
    steps: Floats = scene.steps.numpy()
    base = scene.tokens + float(guessed.sum())
    sure = rows + float(held.sum())
    rate = max(sure / (_at(steps, base) + scene.extra), rows / (_at(steps, scene.tokens) + scene.extra))
    pace, node = 1 / rate, (_at(steps, base + AHEAD) - _at(steps, base)) / AHEAD
    covered: Floats = scene.table.chances[scene.slots].cumprod(dim=2).numpy()
    best = Deal(parts, guessed.tolist(), float(held.sum()), -1, 0, [], 0.0, rate)
    for number, term in enumerate(terms):
        level = slice(0, term.deepest)
        gain = np.cumsum(covered[:, term.bit, level] * (1.0 - held[:, level]), axis=1) * term.trust  # [R, D] tokens
        nodes_by_depth = np.cumsum(scene.table.widths.numpy()[term.bit, level])
        passes, late = np.arange(term.deepest), np.array(term.late)
        own = term.row + passes * term.further_row + node * nodes_by_depth  # [D] seconds of a row
        pays = (late[:, None] >= 0) & (gain * pace > own + late[:, None])  # [R, D]
        count, promised = pays.sum(axis=0), (gain * pays).sum(axis=0)
        size = np.minimum(base + count * nodes_by_depth + 0.5, len(steps) - 1).astype(np.int64)
        drafting = term.first + term.row * count + passes * (term.further + term.further_row * count)
        seconds = steps[size] + scene.extra + drafting + np.maximum(late, 0.0) @ pays
        rates = np.where(count > 0, (sure + promised) / seconds, 0.0)
        at = int(rates.argmax()) if term.deepest else 0
        if term.deepest and rates[at] > best.rate:
            chosen = np.flatnonzero(pays[:, at]).tolist()
            deal = (number, at + 1, chosen, float(promised[at]), float(rates[at]))
            best = Deal(best.parts, best.guessed, best.held, *deal)
    return best


class CpuMarket:
    """The market in one call, see models/kernels/planning.cpp.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self) -> None:
        self._weigh = kernels.required().weigh_drafting.default

    def __call__(self, scene: Scene, terms: list[Terms]) -> Deal:
        """See ``Market``."""
        parts, guessed, held, promise, offer = self._weigh(
            [trees.parents for trees in scene.guesses],
            [trees.confidence for trees in scene.guesses],
            scene.floor,
            scene.table.chances,
            scene.slots,
            scene.table.widths,
            scene.steps,
            scene.tokens,
            scene.extra,
            [number for term in terms for number in term.numbers()],
            [seconds for term in terms for seconds in term.late],
        )
        return Deal(parts, guessed, held, offer[0], offer[1], offer[2:], *promise)


def load_market() -> Market:
    """The fastest market that there is: it is the host's, whatever the device."""
    return CpuMarket() if kernels.load() else weigh_anywhere


def catching_up(member: Member, sequence: Sequence, depth: int, costs: CostModel) -> float:
    """Seconds that a drafter must spend on a text that it has not followed before it can draft for it."""
    backlog = member.drafter.backlog(sequence)
    return 0.0 if backlog <= depth + 1 else costs.catch_up(member.name, backlog)


def lateness(member: Member, sequence: Sequence, depth: int, costs: CostModel) -> float:
    """Seconds of catching up with a text, shared out over the steps that will profit."""
    return catching_up(member, sequence, depth, costs) / min(HORIZON, max(1, sequence.limit - sequence.length))


def slope_of(tokens: float, costs: CostModel) -> float:
    """Seconds of one more node beside so many query tokens, about."""
    return (costs.at(tokens + AHEAD) - costs.at(tokens)) / AHEAD


def _at(steps: Floats, tokens: float) -> float:
    return float(steps[min(int(tokens + 0.5), len(steps) - 1)])
