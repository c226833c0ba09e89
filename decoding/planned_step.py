"""What the planner that weighs drafts knows of the step that is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from decoding.market import Deal, Member
from decoding.plan import Plan
from decoding.sequence import SequenceId
from models.tree import Trees


@dataclass
class Crowd:
    """What is the same as long as the same rows decide."""

    key: tuple[SequenceId, ...]
    modes: Tensor  # [R]
    slots: Tensor | None = None  # [R] of the forecast; None: nobody asked


@dataclass
class PlannedStep:
    """What is known and decided of the step that is under way."""

    plan: Plan
    crowd: Crowd
    extra: float  # seconds beside its query tokens, see ``first_tokens.beside_tokens``
    guesses: dict[int, Trees] = field(default_factory=dict)  # calibrated, by bit
    drafting: dict[str, tuple[int, int]] = field(default_factory=dict)  # drafter -> (rows, depth)
    catching_up: set[str] = field(default_factory=set)  # of these, those whose time is not that of drafting alone
    seconds: float = 0.0  # of that drafting
    pinned: list[int] = field(default_factory=list)  # [R] nodes that must be bought
    deal: Deal | None = None
    member: Member | None = None  # whom the deal is with
