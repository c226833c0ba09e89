"""The exact rule: follow the tokens that the target draws.

At every node the target's token is a pure function of its logits and the request's noise, whatever was drafted; so the
text is that of plain decoding for any tree. Acceptance = the path that these tokens take through the tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoding.verify import Verdict
from models.tree import Trees, is_node, path_columns


def walk(trees: Trees, masks: Tensor, drawn: Tensor, deepest: int) -> Verdict:
    """Descend from the root while a child carries the drawn token; the first token that no child carries is the bonus.

    Args:
        masks: [S, N] ancestor masks of the trees.
        drawn: [S, N] token drawn at each node (anything at padding).
        deepest: depth of the deepest tree (host).
    """
    columns = torch.arange(trees.width, device=drawn.device)
    follows = trees.tokens == drawn.gather(1, trees.parents.clamp(min=0))  # the parent's draw is this node
    follows = (follows & is_node(trees)) | (columns == 0)
    stopped = ((~follows).long() << columns).sum(dim=1, keepdim=True)  # bit i: column i is not followed to
    reached = follows & (masks & stopped == 0)
    # siblings differ in their tokens, so the reached nodes are one path, and its end stands in the last such column
    last = (reached.long() * columns).argmax(dim=1, keepdim=True)
    end_mask = masks.gather(1, last).squeeze(1)
    path = path_columns(end_mask, deepest + 1)[:, 1:]  # [S, D]
    bonus = drawn.gather(1, last).squeeze(1)
    accepted = (path >= 0).sum(dim=1)
    tokens = torch.full((drawn.shape[0], deepest + 1), -1, dtype=torch.int64, device=drawn.device)
    tokens[:, :deepest] = torch.where(path >= 0, trees.tokens.gather(1, path.clamp(min=0)), -1)
    tokens.scatter_(1, accepted[:, None], bonus[:, None])
    return Verdict(accepted, path, bonus, tokens)
