"""The exact rule: follow the tokens that the target draws.

At every node the target's token is a pure function of its logits and the request's noise, whatever was drafted; so the
text is that of plain decoding for any tree. Acceptance = the path that these tokens take through the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from decoding.batcher import Nodes
from decoding.sampling import Sampling
from decoding.verify import Verdict
from models.tree import Trees
from models.tree_ops import TreeOps


@dataclass(frozen=True)
class ExactRule:
    """Draw at every node, and follow what was drawn."""

    ops: TreeOps

    def __call__(self, trees: Trees, nodes: Nodes, x: Tensor, sampling: Sampling, deepest: int) -> Verdict:
        """See ``Rule``."""
        return follow(self.ops, trees, nodes, sampling.draw(x, nodes.row, nodes.depth), deepest)


def follow(ops: TreeOps, trees: Trees, nodes: Nodes, drawn: Tensor, deepest: int) -> Verdict:
    """Descend while a child carries the token drawn at its parent; the first token that no child carries is the bonus.

    Args:
        drawn: [W] token drawn at each node.
        deepest: D, at least the depth of the deepest node (host).
    """
    if trees.width == 1:  # plain decoding: every token is a bonus
        return Verdict.plain(drawn)
    return Verdict(*ops.walk(trees, nodes.masks, drawn, nodes.first, deepest), drawn)
