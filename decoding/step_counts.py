"""What an engine counts of its steps: a few additions to lists each, since a step of a small model takes 0.3 ms."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_TOKENS = 64  # that a row makes in a step: the deepest path of 63 nodes, and the bonus
SIZES = 16  # classes of steps by their nodes or tokens, the last one open: 0, 1, 2 to 3, 4 to 7, ...
PARTS = ("schedule", "planner", "prepare", "drafters", "forward", "verify", "commit")
QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Laps:
    """Where the time of steps goes: whoever has done a part of one says so, and gets the time since the last."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0

    def start(self) -> float:
        """A step begins; the time of ``time.perf_counter``."""
        self._last = time.perf_counter()
        return self._last

    def end(self, part: str) -> None:
        """What came since the last call was of this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


@dataclass
class StepCounts:
    """Counters over the life of an engine.

    Attributes:
        row_tokens: [MOST_TOKENS + 1] deciding rows by the tokens that a step gave them.
        paths: [MOST_TOKENS] of them, those with drafted nodes, by the nodes that were accepted.
        accepted: [MOST_TOKENS] accepted nodes by depth less 1, by the bits of the drafters that proposed them.
        sizes: [SIZES] steps by the drafted nodes that they verified: see ``SIZES``.
        nodes: drafted nodes of all steps.
        work: [SIZES] steps by their query tokens, in the same classes.
        tokens: query tokens of all steps.
        gears: steps by what their planner did.
        queued: [len(QUEUE_SECONDS) + 1] choices by the time that they waited for a place in the batch.
        queued_seconds: of all of them.
    """

    row_tokens: list[int] = field(default_factory=lambda: [0] * (MOST_TOKENS + 1))
    paths: list[int] = field(default_factory=lambda: [0] * MOST_TOKENS)
    accepted: dict[int, list[int]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [0] * SIZES)
    nodes: int = 0
    work: list[int] = field(default_factory=lambda: [0] * SIZES)
    tokens: int = 0
    gears: dict[str, int] = field(default_factory=dict)
    queued: list[int] = field(default_factory=lambda: [0] * (len(QUEUE_SECONDS) + 1))
    queued_seconds: float = 0.0

    def step(self, chains: int, nodes: int, gear: str) -> None:
        """A step had so many tokens in its rows' chains, and verified so many drafted nodes."""
        self.sizes[min(nodes.bit_length(), SIZES - 1)] += 1
        self.nodes += nodes
        self.work[min((chains + nodes).bit_length(), SIZES - 1)] += 1
        self.tokens += chains + nodes
        self.gears[gear] = self.gears.get(gear, 0) + 1

    def accept(self, depth: int, drafters: int) -> None:
        """A node was accepted.

        Args:
            depth: its own, less 1.
            drafters: a bit for each that had proposed it.
        """
        found = self.accepted.get(drafters)
        if found is None:
            found = self.accepted[drafters] = [0] * MOST_TOKENS
        found[depth] += 1

    def left_queue(self, seconds: float) -> None:
        """A choice got its first place in the batch after that time."""
        self.queued[bisect_left(QUEUE_SECONDS, seconds)] += 1
        self.queued_seconds += seconds

    @property
    def accepted_at(self) -> list[int]:
        """Accepted nodes by depth, from depth 1 to the deepest there was."""
        found, reached = [], 0
        for count in reversed(self.paths[1:]):
            reached += count
            found.append(reached)
        found.reverse()
        while found and not found[-1]:
            found.pop()
        return found

    def accepted_by(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Accepted nodes of each drafter by depth, from 1 to its deepest; one of several drafters counts for each.

        Args:
            names: of the drafters, by their bits.
        """
        found = {}
        for bit, name in enumerate(names):
            own = [counts for drafters, counts in self.accepted.items() if drafters >> bit & 1]
            if own:
                sums = [sum(at) for at in zip(*own, strict=True)]
                found[name] = tuple(sums[: max(depth for depth, count in enumerate(sums, start=1) if count)])
        return found


def size_bounds() -> list[int]:
    """The most nodes that each class of ``StepCounts.sizes`` has, the last one (any number) left out."""
    return [2**bits - 1 for bits in range(SIZES - 1)]
