"""The rule that a server runs: each row is judged by the rule that its request asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.batcher import Nodes
from decoding.sampling import Sampling
from decoding.verify import Rule, Verdict
from models.tree import Trees


@dataclass(frozen=True)
class ByRequest:
    """Rows of one rule cost what that rule costs; in a mixed batch every rule in use judges all rows."""

    rules: dict[str, Rule]

    def __call__(self, trees: Trees, nodes: Nodes, x: Tensor, sampling: Sampling, deepest: int) -> Verdict:
        """See ``Rule``."""
        table = sampling.table.rules
        verdicts = [self.rules[name](trees, nodes, x, sampling, deepest) for name in table.names]
        result = verdicts[0]
        for number, verdict in enumerate(verdicts[1:], start=1):
            result = _where(table.rule == number, verdict, result)
        return result


def _where(rows: Tensor, verdict: Verdict, other: Verdict) -> Verdict:
    """``verdict`` in these rows [S], ``other`` in the rest."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows if a.dim() == 1 else rows[:, None], a, b)

    return Verdict(
        accepted=pick(verdict.accepted, other.accepted),
        path=pick(verdict.path, other.path),
        bonus=pick(verdict.bonus, other.bonus),
        tokens=pick(verdict.tokens, other.tokens),
        drawn=other.drawn if verdict.drawn is None else verdict.drawn,  # a draw knows no rule
    )
