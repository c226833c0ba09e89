"""What a step does to its trees, behind one protocol so that a device can fuse it.

``TorchTreeOps`` composes the functions of models/tree.py, runs anywhere and defines what is correct. It is some 150
tiny operations, about a millisecond on a CPU; ``CpuTreeOps`` takes microseconds. ``DeviceTreeOps`` does not wait for
the sizes that trees have: it gives bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from models import kernels
from models.transfer import upload
from models.tree import (
    NO_PARENT,
    Trees,
    ancestor_masks,
    best_nodes,
    is_node,
    mask_depths,
    merge,
    root_masks,
    roots_only,
    walk,
)


@dataclass(frozen=True)
class ChosenTrees:
    """What is verified: trees with their padding on the right, and their sizes on the host.

    Counts may be larger than the trees. What is verified besides is padding: it sees itself and the root, and no walk
    leads there. Such padding carries the root's token, as a token that can be looked up.
    """

    trees: Trees  # [R, N], N the largest count
    masks: Tensor  # [R, N] int64, ancestor masks
    counts: list[int]  # nodes per row at the most, root included
    deepest: int  # at least the depth of the deepest node (host)

    @staticmethod
    def roots(tokens: Tensor) -> ChosenTrees:
        """Nothing but the roots, from their tokens [R]."""
        trees, count = roots_only(tokens), tokens.shape[0]
        return ChosenTrees(trees, root_masks(count, tokens.device), [1] * count, 0)

    def with_roots(self, tokens: Tensor) -> ChosenTrees:
        """The same, and behind them rows with nothing but a root, from their tokens [M]."""
        roots, masks = roots_only(tokens), root_masks(tokens.shape[0], tokens.device)
        more = (0, self.trees.width - 1)
        trees = Trees(
            tokens=torch.cat([self.trees.tokens, pad(roots.tokens, more, value=-1)]),
            parents=torch.cat([self.trees.parents, pad(roots.parents, more, value=NO_PARENT)]),
            confidence=torch.cat([self.trees.confidence, pad(roots.confidence, more)]),
            source=torch.cat([self.trees.source, pad(roots.source, more)]),
        )
        counts = [*self.counts, *[1] * tokens.shape[0]]
        return ChosenTrees(trees, torch.cat([self.masks, pad(masks, more)]), counts, self.deepest)


class TreeOps(Protocol):
    """Siblings within one proposal, and in ``walk``, differ in their tokens."""

    def choose(
        self,
        proposals: list[Trees],
        max_nodes: list[int],
        max_depth: list[int],
        min_probability: float,
        spared: int = 0,
        price: Tensor | None = None,
    ) -> ChosenTrees:
        """Merge R >= 1 rows of proposals and keep each row's best nodes: ``merge``, ``best_nodes``, ``worthwhile``.

        Args:
            proposals: at least one, all with the same roots.
            max_nodes: [R] most nodes of each row, root excluded, at most 63; pinned ones first, see ``best_nodes``.
            max_depth: [R].
            min_probability: nodes whose path is less probable are left out.
            spared: sources (bits) whose nodes are not; of these, impossible ones alone are.
            price: [K + 1] float64, seconds of the whole step with k nodes in all rows together, k = 0 .. K, K at least
                the sum of ``max_nodes``; beside the pinned nodes, those are kept of the others that make the most
                expected tokens a second, see ``worthwhile``.

        Raises:
            ValueError: more than 63 nodes are asked for.
        """
        ...

    def walk(
        self, trees: Trees, masks: Tensor, drawn: Tensor, first: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``walk`` by tokens drawn at packed nodes: (accepted [S], path [S, D], bonus [S], tokens [S, D + 1]).

        Args:
            trees: [S, N], padding on the right.
            masks: [S, N] ancestor masks.
            drawn: [W] token drawn at each node, row after row, without padding.
            first: [S] index of each root in ``drawn``.
            deepest: D, at least the depth of the deepest node.
        """
        ...


class TorchTreeOps:
    """In plain PyTorch, on any device. ``choose`` synchronises once."""

    def choose(
        self,
        proposals: list[Trees],
        max_nodes: list[int],
        max_depth: list[int],
        min_probability: float,
        spared: int = 0,
        price: Tensor | None = None,
    ) -> ChosenTrees:
        device = proposals[0].tokens.device
        limits = torch.tensor([max_nodes, max_depth], device=device)
        width = 1 + max(max_nodes)
        trees = best_nodes(merge(proposals), limits[0], limits[1], width, min_probability, spared, price)
        masks = ancestor_masks(trees.parents)
        nodes = is_node(trees)
        deepest = (mask_depths(masks) * nodes).amax()
        *counts, depth = torch.cat([1 + nodes.sum(dim=1), deepest[None]]).tolist()
        width = max(counts)
        return ChosenTrees(trees.narrow(width), masks[:, :width], counts, depth)

    def walk(
        self, trees: Trees, masks: Tensor, drawn: Tensor, first: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns = torch.arange(trees.width, device=drawn.device)
        unpacked = drawn[(first[:, None] + columns).clamp_(max=drawn.shape[0] - 1)]  # other nodes' tokens at padding
        return walk(trees, masks, unpacked, deepest)


class DeviceTreeOps(TorchTreeOps):
    """In plain PyTorch, for devices that the host had better not wait for: counts are what was asked for."""

    def choose(
        self,
        proposals: list[Trees],
        max_nodes: list[int],
        max_depth: list[int],
        min_probability: float,
        spared: int = 0,
        price: Tensor | None = None,
    ) -> ChosenTrees:
        candidates = sum(trees.width - 1 for trees in proposals)
        counts = [1 + min(most, candidates) for most in max_nodes]
        limits = upload(proposals[0].tokens.device, np.array([max_nodes, max_depth]))[0]
        trees = best_nodes(merge(proposals), limits[0], limits[1], max(counts), min_probability, spared, price)
        tokens = torch.where(trees.tokens < 0, trees.tokens[:, :1], trees.tokens)
        deepest = min(max(max_depth), max(counts) - 1)
        return ChosenTrees(replace(trees, tokens=tokens), ancestor_masks(trees.parents), counts, deepest)


class CpuTreeOps:
    """Plain loops on the host, see models/kernels/tree.cpp.

    Raises:
        RuntimeError: the kernels are not available; the log says why.
    """

    def __init__(self) -> None:
        ops = kernels.required()
        self._choose = ops.choose_nodes.default
        self._walk = ops.walk_trees.default

    def choose(
        self,
        proposals: list[Trees],
        max_nodes: list[int],
        max_depth: list[int],
        min_probability: float,
        spared: int = 0,
        price: Tensor | None = None,
    ) -> ChosenTrees:
        *arrays, masks, counts, deepest = self._choose(
            [trees.tokens for trees in proposals],
            [trees.parents for trees in proposals],
            [trees.confidence for trees in proposals],
            [trees.source for trees in proposals],
            max_nodes,
            max_depth,
            min_probability,
            spared,
            price,
        )
        return ChosenTrees(Trees(*arrays), masks, counts, deepest)

    def walk(
        self, trees: Trees, masks: Tensor, drawn: Tensor, first: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._walk(trees.tokens, trees.parents, drawn, first, deepest)  # type: ignore[no-any-return]


TREE_OPS: dict[str, Callable[[], TreeOps]] = {
    "torch": TorchTreeOps,
    "cpu": CpuTreeOps,
    "device": DeviceTreeOps,
}


def load_tree_ops(device: torch.device, name: str = "auto") -> TreeOps:
    """The operations called ``name``; "auto" takes the best that work on this device.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: the operations were named and do not work here.
    """
    plain = "torch" if device.type == "cpu" else "device"
    return kernels.pick("tree operations", TREE_OPS, name, plain, kernels.serves(device, torch.float32))
