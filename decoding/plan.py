"""What one step is going to do: which rows with how many chain tokens, and how much each may speculate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from decoding.sequence import Sequence


@dataclass(frozen=True)
class PlannedRow:
    """One sequence's part of a step: chain tokens start .. start + length - 1; earlier K/V is in the cache."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        """Logical index after the chain; the tree's root stands just before it."""
        return self.start + self.length

    @property
    def decides(self) -> bool:
        """The chain reaches the last known token: the step draws what follows, and a tree may hang on it."""
        return self.end == self.sequence.length


@dataclass(frozen=True)
class Plan:
    """The rows of a step, those that decide first."""

    rows: tuple[PlannedRow, ...]
    deciding: tuple[PlannedRow, ...]

    @cached_property
    def chain_tokens(self) -> int:
        return sum([row.length for row in self.rows])


@dataclass(frozen=True)
class RowQuota:
    """Limits of one deciding row, fixed before anything is drafted."""

    nodes: int = 0  # drafted nodes to verify, without the root
    depth: int = 0
    drafters: frozenset[str] = frozenset()


NOTHING = RowQuota()


@dataclass(frozen=True)
class Guide:
    """What the planner tells one drafter about drafting in this step."""

    depth: int | None = None  # of its trees, at most
    taus: tuple[float, ...] = ()  # factors on the drafter's tau at depth 1, 2, ...; the last one goes on
    least_gain: float | None = (
        None  # tokens, over all rows, that another pass must promise; None: the drafter's own rule
    )

    def tau(self, level: int) -> float:
        """The factor for the children of nodes at depth ``level``."""
        return self.taus[min(level, len(self.taus) - 1)] if self.taus else 1.0


UNGUIDED = Guide()


@dataclass(frozen=True)
class Quota:
    """Limits of a step: one RowQuota per deciding row, and a word to each drafter."""

    rows: tuple[RowQuota, ...]
    guides: Mapping[str, Guide] = field(default_factory=dict)

    def guide(self, drafter: str) -> Guide:
        return self.guides.get(drafter, UNGUIDED)

    @cached_property
    def nodes(self) -> int:
        return max([row.nodes for row in self.rows], default=0)

    @cached_property
    def depth(self) -> int:
        return max([row.depth for row in self.rows], default=0)
