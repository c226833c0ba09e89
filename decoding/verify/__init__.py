"""Acceptance rules. A rule is one file and one line in ``RULES``: a pure function from logits to a verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.sampling import Sampling
from models.transfer import fetch
from models.tree import Trees, path_columns
from models.tree_ops import TreeOps


@dataclass(frozen=True)
class Verdict:
    """What S rows commit: the accepted path below the root, then the bonus token."""

    accepted: Tensor  # [S] int64, number m of drafted nodes on the accepted path
    path: Tensor  # [S, D] int64, columns of those nodes in the tree, top down, padded with -1
    bonus: Tensor  # [S] int64, token drawn at the last accepted node; NOT_A_TOKEN where its logits are no numbers
    tokens: Tensor  # [S, D + 1] int64, the accepted tokens and the bonus, padded with -1
    drawn: Tensor | None = None  # [W] int64, token drawn at each node, at least where ``verify`` is asked for it

    @staticmethod
    def plain(bonus: Tensor) -> Verdict:
        """Of trees without drafted nodes (D = 0): nothing but the bonus tokens [S]."""
        return Verdict(*_nothing_accepted(bonus.shape[0], bonus.device), bonus, bonus.unsqueeze(1))


@functools.lru_cache(maxsize=64)  # plain decoding asks for the same ones in every step
def _nothing_accepted(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Accepted [S] and path [S, 0] of trees without drafted nodes; never written to."""
    return (
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, 0, dtype=torch.int64, device=device),
    )


Rule = Callable[[Trees, Nodes, Tensor, Sampling, int], Verdict]
"""(trees [S, N], their nodes, processed logits at each node [W, V], sampling, D: no node is deeper) -> verdict.

The logits are those of ``Sampling.process``; whatever is drawn from them, the rule draws by ``Sampling.draw``.
"""


def _exact(ops: TreeOps) -> Rule:
    from decoding.verify.exact import ExactRule

    return ExactRule(ops)


def _typical(ops: TreeOps) -> Rule:
    from decoding.verify.typical import typical

    return typical


RULES: dict[str, Callable[[TreeOps], Rule]] = {
    "exact": _exact,
    "typical": _typical,
}


def rule_by_request(ops: TreeOps) -> Rule:
    """Judges each row by the rule that its request asks for."""
    from decoding.verify.by_request import ByRequest

    return ByRequest({name: make(ops) for name, make in RULES.items()})


Masks = Callable[[], Tensor]
"""Fills what grammars allow at a step's nodes: see ``GrammarMasks.fill``."""


def masks_ahead(trees: Trees, nodes: Nodes, sampling: Sampling, deepest: int) -> Masks | None:
    """What ``verify`` asks for; None where no sequence has a grammar.

    Called before the target's pass, so that the trees are on their way to the host before a device is busy with it: the
    host fills the masks while the pass runs.
    """
    grammars = sampling.table.grammars
    if grammars is None:
        return None
    arrived = fetch(nodes.row, nodes.depth, node_paths(trees, nodes, deepest))
    return lambda: grammars.fill(*arrived())


def verify(
    rule: Rule,
    trees: Trees,
    nodes: Nodes,
    logits: Tensor,
    sampling: Sampling,
    deepest: int,
    masks: Masks | None = None,
    *,
    draws: bool = False,
) -> Verdict:
    """Process the logits at every node, each under its own path's penalties and grammar, and apply the rule.

    Args:
        logits: [W, V'] raw logits of the nodes; not changed.
        deepest: depth of the deepest tree (host).
        masks: what ``masks_ahead`` gave; None: they are filled when the logits are there.
        draws: ``Verdict.drawn`` is wanted whatever the rule, but not in a plain step.
    """
    paths = node_paths(trees, nodes, deepest) if sampling.needs_paths(masked=masks is not None) else None
    x = sampling.process(logits, nodes.row, nodes.depth, paths, masks=None if masks is None else masks())
    verdict = rule(trees, nodes, x, sampling, deepest)
    if not draws or trees.width == 1 or verdict.drawn is not None:
        return verdict
    return replace(verdict, drawn=sampling.draw(x, nodes.row, nodes.depth))


def node_paths(trees: Trees, nodes: Nodes, deepest: int) -> Tensor:
    """[W, D] tokens from below the root down to each node, padded with -1."""
    columns = path_columns(nodes.masks[nodes.row, nodes.column], deepest + 1)[:, 1:]
    return trees.tokens[nodes.row].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)
