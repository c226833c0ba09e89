"""What the planner does to proposals, behind one protocol so that a device can fuse it.

A confidence's place on a calibration curve is its log-odds: a curve has ``KNOTS`` knots, from -6 to 6 in steps of one,
and is a line between them. Curves are [M, D, B] float64: modes, depths (the last one goes on), knots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models import kernels
from models.tree import IMPOSSIBLE, NO_PARENT, Trees, depths

FIRST_KNOT = -6.0
KNOTS = 13
LEAST = 1e-3  # the least probability that is told apart where tau is learned


@dataclass(frozen=True)
class Tally:
    """What ``score`` adds to: how often a confidence was asked for and right, and what decides tau."""

    hits: Tensor  # [M, D, B] float64
    trials: Tensor  # [M, D, B] float64
    surprise: Tensor  # [M, D, 2] float64: log probability of what came less its expectation, summed; how often


@dataclass(frozen=True)
class Scores:
    """How R proposals fared."""

    reach: Tensor  # [R] int64, depth up to which the tree holds the text, among its nodes above the floor
    extent: Tensor  # [R] int64, depth of the tree
    widths: Tensor  # [R, D] int64, nodes above the floor at depth 1 .. D


class ProposalOps(Protocol):
    """Rows have a mode [R] int64: which of the M curves hold for them."""

    def recalibrate(self, trees: Trees, mode: Tensor, curves: Tensor) -> Tensor:
        """[R, N] the confidences as the curves see them; impossible nodes stay impossible."""
        ...

    def score(self, trees: Trees, calibrated: Tensor, text: Tensor, mode: Tensor, floor: float, tally: Tally) -> Scores:
        """Hold proposals against the text, on the host; ``tally`` is added to.

        Every node whose parent is on the text counts as a trial of its confidence, at its depth. The candidates of one
        parent and "none of them" are a distribution, which tells how far tau is off.

        Args:
            trees: [R, N] as they were proposed.
            calibrated: [R, N] their confidences as the planner saw them.
            text: [R, D] int64 tokens after the roots, -1 where the text ended.
            floor: nodes whose path was less probable count as not proposed in the result, not in the tally.
        """
        ...

    def coverage(self, trees: Trees, floor: float, depth: int) -> tuple[Tensor, Tensor]:
        """How much of the text calibrated trees hold: by depth 1 .. D [R, D] float64, and in how many nodes [R] int64.

        Counted are nodes whose path is at least ``floor`` probable.
        """
        ...

    def learn_coverage(self, table: CoverageTable, bit: int, rows: Judged, row_rate: float, all_rate: float) -> None:
        """Move a drafter's chances towards how its trees fared, row by row, on the host.

        A depth counts where it could be judged and everything above it was covered.
        """
        ...


@dataclass(frozen=True)
class CoverageTable:
    """What ``learn_coverage`` changes, all float64."""

    chances: Tensor  # [slots, drafters, D] from depth to depth, of each sequence
    common: Tensor  # [M, drafters, D] of all
    widths: Tensor  # [drafters, D] nodes by depth


@dataclass(frozen=True)
class Judged:
    """Rows whose trees were scored, all int64."""

    slots: Tensor  # [S], -1 for sequences that have ended
    modes: Tensor  # [S]
    asked: Tensor  # [S] depth that could be judged: of the tree, and of the text that is known
    reach: Tensor  # [S]
    widths: Tensor  # [S, >= D]


class TorchProposalOps:
    """In plain PyTorch and, for ``score``, plain Python: what the others must do."""

    def recalibrate(self, trees: Trees, mode: Tensor, curves: Tensor) -> Tensor:
        depth = (depths(trees.parents) - 1).clamp(0, curves.shape[1] - 1)
        confidence = trees.confidence.double().clamp(1e-9, 1 - 1e-7)
        at = ((confidence / (1 - confidence)).log() - FIRST_KNOT).clamp(0, curves.shape[2] - 1)
        below = at.long().clamp(max=curves.shape[2] - 2)
        low, high = (curves[mode[:, None], depth, knot] for knot in (below, below + 1))
        mapped = (low + (at - below) * (high - low)).float()
        drafted = (trees.parents != NO_PARENT) & (trees.confidence >= IMPOSSIBLE)
        return torch.where(drafted, mapped, trees.confidence)

    def score(self, trees: Trees, calibrated: Tensor, text: Tensor, mode: Tensor, floor: float, tally: Tally) -> Scores:
        rows, longest = text.shape
        reach, extent = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        widths = torch.zeros(rows, longest, dtype=torch.int64)
        for row in range(rows):
            tree = _HostTree.of(trees, calibrated, row)
            for node in tree.children:
                level = tree.depth[node] - 1
                if tree.path[node] >= floor and level < longest:
                    widths[row, level] += 1
            extent[row] = max(tree.depth)
            node = 0
            for level, token in enumerate(text[row].tolist()):
                if token < 0:
                    break
                at = (int(mode[row]), min(level, tally.hits.shape[1] - 1))
                found = _judge(tree, node, token, at, tally)
                if found is None:
                    break
                node = found
                if tree.path[node] >= floor and int(reach[row]) == level:
                    reach[row] = level + 1
        return Scores(reach, extent, widths)

    def coverage(self, trees: Trees, floor: float, depth: int) -> tuple[Tensor, Tensor]:
        path, level = _paths(trees), depths(trees.parents)
        counted = (trees.parents != NO_PARENT) & (path >= floor) & (level <= depth)
        held = torch.zeros(trees.num_rows, depth + 1, dtype=torch.float64, device=path.device)
        held.scatter_add_(1, torch.where(counted, level, 0), torch.where(counted, path, 0.0))
        return held[:, 1:].clamp(max=1.0), counted.sum(dim=1)

    def learn_coverage(self, table: CoverageTable, bit: int, rows: Judged, row_rate: float, all_rate: float) -> None:
        limit = table.widths.shape[1]
        whole = zip(rows.slots.tolist(), rows.modes.tolist(), rows.asked.tolist(), rows.reach.tolist(), strict=True)
        for row, (slot, mode, asked, reach) in enumerate(whole):
            for level in range(min(asked, limit)):
                right = float(level < reach)
                if slot >= 0:
                    table.chances[slot, bit, level] += row_rate * (right - table.chances[slot, bit, level])
                table.common[mode, bit, level] += all_rate * (right - table.common[mode, bit, level])
                width = float(rows.widths[row, level])
                table.widths[bit, level] += all_rate * (width - table.widths[bit, level])
                if not right:
                    break


def _paths(trees: Trees) -> Tensor:
    """[R, N] float64 product of the confidences along each path, without sharing out among siblings."""
    path = torch.where(trees.parents == NO_PARENT, 1.0, trees.confidence.double())
    pointer = trees.parents.clamp(min=0)
    for _ in range(max(1, (trees.width - 1).bit_length())):
        path = path * path.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return path


@dataclass(frozen=True)
class _HostTree:
    tokens: list[int]
    confidence: list[float]
    depth: list[int]
    path: list[float]
    children: dict[int, int]  # node -> its parent, for drafted nodes

    @staticmethod
    def of(trees: Trees, calibrated: Tensor, row: int) -> _HostTree:
        parents, worth = trees.parents[row].tolist(), calibrated[row].tolist()
        depth, path = [0] * len(parents), [1.0] * len(parents)
        children = {node: parent for node, parent in enumerate(parents) if parent != NO_PARENT}
        for node, parent in children.items():
            depth[node], path[node] = depth[parent] + 1, path[parent] * worth[node]
        return _HostTree(trees.tokens[row].tolist(), trees.confidence[row].tolist(), depth, path, children)


def _judge(tree: _HostTree, parent: int, token: int, at: tuple[int, int], tally: Tally) -> int | None:
    """Add the candidates of one parent to the tally; the one that came, if it was among them."""
    offered = [i for i, above in tree.children.items() if above == parent and tree.confidence[i] >= IMPOSSIBLE]
    if not offered:
        return None
    right = next((i for i in offered if tree.tokens[i] == token), None)
    mass, expected = 0.0, 0.0
    for node in offered:
        given = tree.confidence[node]
        clipped = min(max(given, 1e-9), 1 - 1e-7)
        place = min(max(math.log(clipped / (1 - clipped)) - FIRST_KNOT, 0.0), KNOTS - 1.0)
        below = min(int(place), KNOTS - 2)
        for knot, share in ((below, 1 - (place - below)), (below + 1, place - below)):
            tally.trials[at][knot] += share
            tally.hits[at][knot] += share * (node == right)
        mass += given
        expected += given * math.log(max(given, LEAST))
    rest = max(1 - mass, LEAST)
    expected += rest * math.log(rest)
    seen = math.log(max(tree.confidence[right], LEAST)) if right is not None else math.log(rest)
    tally.surprise[at][0] += seen - expected / (mass + rest)
    tally.surprise[at][1] += 1
    return right


class CpuProposalOps:
    """Plain loops on the host, see models/kernels/calibration.cpp.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self) -> None:
        ops = kernels.required()
        self._recalibrate = ops.recalibrate.default
        self._score = ops.score_proposals.default
        self._coverage = ops.proposal_coverage.default
        self._learn = ops.learn_coverage.default

    def recalibrate(self, trees: Trees, mode: Tensor, curves: Tensor) -> Tensor:
        return self._recalibrate(trees.parents, trees.confidence, mode, curves)  # type: ignore[no-any-return]

    def score(self, trees: Trees, calibrated: Tensor, text: Tensor, mode: Tensor, floor: float, tally: Tally) -> Scores:
        given = (trees.tokens, trees.parents, trees.confidence, calibrated, text, mode, floor)
        return Scores(*self._score(*given, tally.hits, tally.trials, tally.surprise))

    def coverage(self, trees: Trees, floor: float, depth: int) -> tuple[Tensor, Tensor]:
        return self._coverage(trees.parents, trees.confidence, floor, depth)  # type: ignore[no-any-return]

    def learn_coverage(self, table: CoverageTable, bit: int, rows: Judged, row_rate: float, all_rate: float) -> None:
        judged = (rows.slots, rows.modes, rows.asked, rows.reach, rows.widths)
        self._learn(table.chances, table.common, table.widths, bit, *judged, row_rate, all_rate)


class DeviceProposalOps(TorchProposalOps):
    """Models' proposals lie on a device; what lies on the host is the kernels', if there are any."""

    def __init__(self) -> None:
        self._host: ProposalOps = CpuProposalOps() if kernels.load() else TorchProposalOps()

    def recalibrate(self, trees: Trees, mode: Tensor, curves: Tensor) -> Tensor:
        if trees.tokens.device.type == "cpu":
            return self._host.recalibrate(trees, mode, curves)
        return super().recalibrate(trees, mode, curves)

    def coverage(self, trees: Trees, floor: float, depth: int) -> tuple[Tensor, Tensor]:
        return self._host.coverage(trees, floor, depth)

    def score(self, trees: Trees, calibrated: Tensor, text: Tensor, mode: Tensor, floor: float, tally: Tally) -> Scores:
        return self._host.score(trees, calibrated, text, mode, floor, tally)

    def learn_coverage(self, table: CoverageTable, bit: int, rows: Judged, row_rate: float, all_rate: float) -> None:
        self._host.learn_coverage(table, bit, rows, row_rate, all_rate)


PROPOSAL_OPS: dict[str, Callable[[], ProposalOps]] = {
    "torch": TorchProposalOps,
    "cpu": CpuProposalOps,
    "device": DeviceProposalOps,
}


def load_proposal_ops(device: torch.device, name: str = "auto") -> ProposalOps:
    """The operations called ``name``; "auto" takes the best that work on this device.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: the operations were named and do not work here.
    """
    plain = "torch" if device.type == "cpu" else "device"
    return kernels.pick("proposal operations", PROPOSAL_OPS, name, plain, kernels.serves(device, torch.float32))
