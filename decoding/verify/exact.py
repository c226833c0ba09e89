"""The exact rule: follow the tokens that the target draws.

At every node the target's token is a pure function of its logits and the request's noise, whatever was drafted; so the
text is that of plain decoding for any tree. Acceptance = the path that these tokens take through the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.verify import Verdict
from models.tree import Trees
from models.tree_ops import TreeOps


@dataclass(frozen=True)
class ExactRule:
    """Descend while a child carries the drawn token; the first token that no child carries is the bonus."""

    ops: TreeOps

    def __call__(self, trees: Trees, nodes: Nodes, drawn: Tensor, deepest: int) -> Verdict:
        """See ``Rule``."""
        if trees.width == 1:  # plain decoding: every token is a bonus
            column = drawn[:, None]
            return Verdict(torch.zeros_like(drawn), column[:, :0], drawn, column)
        return Verdict(*self.ops.walk(trees, nodes.masks, drawn, nodes.first, deepest))
