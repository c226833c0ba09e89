"""Acceptance rules. A rule is one file and one line in ``RULES``: a pure function from drawn tokens to a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from decoding.batcher import Nodes
from decoding.sampling import Sampling
from models.tree import Trees, path_columns
from models.tree_ops import TreeOps


@dataclass(frozen=True)
class Verdict:
    """What S rows commit: the accepted path below the root, then the bonus token."""

    accepted: Tensor  # [S] int64, number m of drafted nodes on the accepted path
    path: Tensor  # [S, D] int64, columns of those nodes in the tree, top down, padded with -1
    bonus: Tensor  # [S] int64, token drawn at the last accepted node
    tokens: Tensor  # [S, D + 1] int64, the accepted tokens and the bonus, padded with -1


Rule = Callable[[Trees, Nodes, Tensor, int], Verdict]
"""(trees [S, N], their nodes, token drawn at each node [W], D: no node is deeper) -> verdict."""


def _exact(ops: TreeOps) -> Rule:
    from decoding.verify.exact import ExactRule

    return ExactRule(ops)


RULES: dict[str, Callable[[TreeOps], Rule]] = {
    "exact": _exact,
}


def verify(rule: Rule, trees: Trees, nodes: Nodes, logits: Tensor, sampling: Sampling, deepest: int) -> Verdict:
    """Draw the target's token at every node, each under its own path's penalties and noise, and apply the rule.

    Args:
        logits: [W, V'] raw logits of the nodes; not changed.
        deepest: depth of the deepest tree (host).
    """
    paths = node_paths(trees, nodes, deepest) if sampling.needs_paths() else None
    processed = sampling.process(logits, nodes.row, nodes.depth, paths)
    drawn = sampling.draw(processed, nodes.row, nodes.depth)
    return rule(trees, nodes, drawn, deepest)


def node_paths(trees: Trees, nodes: Nodes, deepest: int) -> Tensor:
    """[W, D] tokens from below the root down to each node, padded with -1."""
    columns = path_columns(nodes.masks[nodes.row, nodes.column], deepest + 1)[:, 1:]
    return trees.tokens[nodes.row].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)
