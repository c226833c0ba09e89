"""Which rows a drafter drafts for, and its trees among all rows of a step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from decoding.plan import Plan
from decoding.sequence import Sequence
from models.transfer import upload
from models.tree import NO_PARENT, Trees


def may_draft(name: str, sequence: Sequence) -> bool:
    """Whether the drafter called ``name`` may be asked to draft for this sequence: by its request, by the planner."""
    if name in sequence.unfollowed:
        return False
    wish = sequence.speculation
    allowed = wish.enabled and wish.max_nodes != 0 and wish.max_depth != 0
    return allowed and (wish.drafters is None or name in wish.drafters)


def spread(drafted: Trees, row: Tensor, plan: Plan) -> Trees:
    """Trees of all deciding rows from those of the rows ``row`` [S]; the others' are bare roots."""
    if row.shape[0] == len(plan.deciding):
        return drafted
    [roots] = upload(row.device, np.array(last_tokens(plan), dtype=np.int64))
    size = (len(plan.deciding), drafted.width)
    tokens = drafted.tokens.new_full(size, -1)
    tokens[:, 0] = roots
    tokens[row] = drafted.tokens
    parents = drafted.parents.new_full(size, NO_PARENT)
    parents[row] = drafted.parents
    confidence = drafted.confidence.new_zeros(size)
    confidence[:, 0] = 1.0
    confidence[row] = drafted.confidence
    source = drafted.source.new_zeros(size)
    source[row] = drafted.source
    return Trees(tokens, parents, confidence, source)


def last_tokens(plan: Plan) -> list[int]:
    """[R] of the deciding rows: the roots of their trees."""
    return [int(row.sequence.tokens[-1]) for row in plan.deciding]
