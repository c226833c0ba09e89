"""Trees of guesses that do not know each other: depth d has the same candidates whatever stands above it.

So the heads of Medusa guess (2401.10774), and those of parallel multi-token prediction (2404.19737). A node is a *rank
path*: which of the depth's candidates, best first, stands at each depth. Its probability is the product of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from decoding.plan import UNGUIDED, Guide
from decoding.sampling import Sampling
from models.tree import CERTAIN, IMPOSSIBLE, NO_PARENT, Trees

RankPath = tuple[int, ...]  # the rank of a node's candidate at depth 1, 2, ...; () is the root


@dataclass(frozen=True)
class Candidates:
    """What may stand at each depth of S rows, best first."""

    roots: Tensor  # [S] int64, the rows' last known tokens
    tokens: Tensor  # [S, D, K] int64, different from each other within a depth
    confidence: Tensor  # [S, D, K] float32, falling along K


@dataclass(frozen=True)
class RankPaths:
    """P rank paths, the root first and a parent before its children, as indices for all rows at once."""

    parents: Tensor  # [P] int64; NO_PARENT for the root
    last: Tensor  # [P] int64, where the node stands in the row's flat list: the root, then the candidates by depth
    trail: Tensor  # [P, D] int64, the same for every node of the path; the root's for what a path lacks

    @staticmethod
    def of(paths: Iterable[RankPath], ranks: int, device: torch.device) -> RankPaths:
        """Index a prefix-closed set of paths (the root may be left out) into ``ranks`` candidates a depth."""
        ordered = sorted({(), *paths}, key=lambda path: (len(path), path))
        place = {path: index for index, path in enumerate(ordered)}
        depth = max(1, *(len(path) for path in ordered))
        trails = [[1 + level * ranks + rank for level, rank in enumerate(path)] for path in ordered]
        padded = [trail + [0] * (depth - len(trail)) for trail in trails]
        parents = [place[path[:-1]] if path else NO_PARENT for path in ordered]
        last = [trail[-1] if trail else 0 for trail in trails]
        return RankPaths(*(torch.tensor(each, device=device) for each in (parents, last, padded)))

    def hang(self, candidates: Candidates, source: int) -> Trees:
        """Trees with all P nodes, [S, P]."""
        tokens, confidence = _flat(candidates)
        parents = self.parents.expand(len(tokens), -1)
        return _trees(tokens[:, self.last], parents, confidence[:, self.last], source)

    def best(self, candidates: Candidates, nodes: int, source: int) -> Trees:
        """Trees [S, 1 + N] with the N <= ``nodes`` most probable of the paths; impossible ones become padding."""
        tokens, confidence = _flat(candidates)
        bounded = confidence.clamp(max=CERTAIN)
        bounded[:, 0] = 1.0
        probability = bounded[:, self.trail].prod(dim=2).nan_to_num(0.0)  # [S, P]; NaN: a broken model's
        probability[:, 0] = 2.0  # the root is always there
        # a parent is more probable than its child and stands before it: what is kept is a tree, in tree order
        chosen = probability.topk(min(1 + nodes, len(self.last)), dim=1).indices.sort(dim=1).values
        parents = torch.searchsorted(chosen, self.parents[chosen])
        parents[:, 0] = NO_PARENT
        possible = probability.gather(1, chosen) >= IMPOSSIBLE
        at = self.last[chosen]
        likely = confidence.gather(1, at)
        return _trees(
            torch.where(possible, tokens.gather(1, at), -1),
            torch.where(possible, parents, NO_PARENT),
            torch.where(possible | likely.isnan(), likely, 0.0),
            source,
        )


class TreeShape(Protocol):
    """How trees grow out of candidates."""

    depth: int  # deepest node
    ranks: int  # candidates of a depth that are asked for

    def grow(self, candidates: Candidates, nodes: int, source: int) -> Trees:
        """Trees of S rows out of candidates of at most ``depth`` depths, for drafter bits ``source``.

        Args:
            nodes: of a row; there may be more where the shape is fixed.
        """
        ...


class ProbableTrees:
    """The most probable nodes, be they wide or deep. Keeps the paths that it has made for each depth and size."""

    def __init__(self, depth: int, ranks: int, device: torch.device) -> None:
        self.depth = depth
        self.ranks = ranks
        self._device = device
        self._paths: dict[tuple[int, int], RankPaths] = {}

    def grow(self, candidates: Candidates, nodes: int, source: int) -> Trees:
        depth = candidates.tokens.shape[1]
        if (depth, nodes) not in self._paths:
            eligible = eligible_paths(depth, self.ranks, nodes)
            self._paths[depth, nodes] = RankPaths.of(eligible, self.ranks, self._device)
        return self._paths[depth, nodes].best(candidates, nodes, source)


class FixedTrees:
    """The same rank paths in every step, ``choices``, as far down as there are candidates."""

    def __init__(self, choices: Sequence[RankPath], device: torch.device) -> None:
        self.depth = max(map(len, choices))
        self.ranks = 1 + max(map(max, choices))
        self._paths = {
            depth: RankPaths.of([path for path in choices if len(path) <= depth], self.ranks, device)
            for depth in range(1, self.depth + 1)
        }
        self._least = (IMPOSSIBLE**0.5) ** (1 / self.depth)  # no product of these is impossible: nodes are all kept

    def grow(self, candidates: Candidates, nodes: int, source: int) -> Trees:
        wanted = replace(candidates, confidence=candidates.confidence.clamp(min=self._least))
        return self._paths[candidates.tokens.shape[1]].hang(wanted, source)


def guess_depths(
    logits: Tensor,
    roots: Tensor,
    row: Tensor,
    ranks: int,
    tau: float,
    sampling: Sampling,
    guide: Guide = UNGUIDED,
) -> Candidates:
    """The best ``ranks`` guesses of every depth under the rows' own rules and noise.

    What stands between the root and a guess is not known, so penalties count the tokens up to the root.

    Args:
        logits: [S, D, V] of depths 1 .. D.
        roots: [S] the rows' last tokens.
        row: [S] the rows' numbers in ``sampling``.
        guide: its taus hold here.
    """
    count, depth, _ = logits.shape
    node_row = row.repeat_interleave(depth)
    above = torch.arange(depth, device=row.device).repeat(count)  # the depth of the node that draws the token
    unknown = above.new_full((len(above), 1), -1) if sampling.needs_paths() else None
    x = sampling.process(logits.flatten(0, 1), node_row, above, unknown)
    levels = range(depth) if len(set(guide.taus)) > 1 else [0]  # one call where all depths have the same tau
    step = len(levels)
    parts = []
    for level in levels:
        at_row, depths = node_row[level::step].contiguous(), above[level::step].contiguous()
        parts.append(sampling.guess(x[level::step].contiguous(), at_row, depths, ranks, tau * guide.tau(level)))
    tokens, confidence = (torch.stack(part, dim=1).view(count, depth, -1) for part in zip(*parts, strict=True))
    return Candidates(roots, tokens, confidence)


def eligible_paths(depth: int, ranks: int, nodes: int) -> list[RankPath]:
    """The rank paths that can be among the ``nodes`` most probable ones, whatever the confidences.

    A path is at most as probable as each path of lower or equal ranks, and as all beginnings of those. There are
    sum over j of prod over i <= j of (rank_i + 1) of them, itself included; if these are more than ``nodes``, others
    can always take its place.
    """
    found: list[RankPath] = []
    level: list[tuple[RankPath, int, int]] = [((), 1, 0)]  # path, product, sum so far
    for _ in range(depth):
        grown = []
        for path, product, total in level:
            for rank in range(ranks):
                wider = product * (rank + 1)
                if total + wider > nodes:
                    break
                grown.append(((*path, rank), wider, total + wider))
        found += [path for path, _, _ in grown]
        level = grown
    return found


def _flat(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """(tokens, confidence) [S, 1 + D * K]: the root, then the candidates of each depth."""
    roots = candidates.roots[:, None]
    certain = torch.ones_like(roots, dtype=candidates.confidence.dtype)
    tokens = torch.cat([roots, candidates.tokens.flatten(1)], dim=1)
    return tokens, torch.cat([certain, candidates.confidence.flatten(1)], dim=1)


def _trees(tokens: Tensor, parents: Tensor, confidence: Tensor, source: int) -> Trees:
    return Trees(tokens, parents, confidence, torch.where(parents == NO_PARENT, 0, source))
