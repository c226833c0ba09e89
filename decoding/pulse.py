"""Whether weighing drafts is itself worth its time: steps with and without it take turns, and the clock decides.

All else that the planner believes is a model. This is the guard behind it: tokens a second of the steps that it shaped
against those of plain steps, as they were, thinking included. Where shaping loses, the engine decodes plainly and looks
again now and then; where it wins, a plain step now and then tells what plain decoding would be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

REST = (48, 1536)  # plain steps before a burst of weighed ones, while those lose: at first, at most
BURST = 4
SAMPLE, RARE_SAMPLE = 96, 512  # weighed steps between two plain ones, while those win: narrowly, clearly
FIRST_SAMPLE = 6  # until there are enough of them
CLEARLY = 1.25
MARGIN = 1.01  # by which weighed steps must win to begin again
FADING = (0.98, 0.9)  # of what weighed and plain steps made, a step
ENOUGH = (12, 3)  # weighed and plain steps before anything is concluded


@dataclass
class Account:
    """What steps of one kind made, fading."""

    fading: float
    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        """One more step."""
        self.tokens = self.fading * self.tokens + tokens
        self.seconds = self.fading * self.seconds + seconds
        self.steps += 1

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Beat:
    """The turns of steps with about so many rows."""

    weighed: Account = field(default_factory=lambda: Account(FADING[0]))
    plain: Account = field(default_factory=lambda: Account(FADING[1]))
    resting: bool = False
    count: int = 0  # steps since the last change of turns
    rest: int = REST[0]

    def next(self) -> bool:
        """Whether the next step is to be weighed."""
        self.count += 1
        if self.resting:
            if self.count > self.rest + BURST:  # the burst has not won
                self.count, self.rest = 1, min(2 * self.rest, REST[1])
            return self.count > self.rest
        clear = self.weighed.rate > CLEARLY * self.plain.rate
        turn = FIRST_SAMPLE if self.plain.steps < ENOUGH[1] else RARE_SAMPLE if clear else SAMPLE
        if self.count > turn:
            self.count = 0
            return False
        return True

    def conclude(self) -> None:
        """Rest where weighing loses; begin again where it wins."""
        if self.weighed.steps < ENOUGH[0] or self.plain.steps < ENOUGH[1]:
            return
        if self.resting:
            if self.weighed.rate > MARGIN * self.plain.rate:
                self.resting, self.count, self.rest = False, 0, REST[0]
        elif self.weighed.rate < self.plain.rate:
            self.resting, self.count = True, 0


class Pulse:
    """Beats by the number of rows, in powers of two, and by whether the first of them is greedy."""

    def __init__(self) -> None:
        self._beats: dict[tuple[int, bool], Beat] = {}

    def saw(self, beat: Beat, weighed: bool, tokens: int, seconds: float) -> None:
        """A step, without chunks of prompts, made so many tokens in so many seconds."""
        (beat.weighed if weighed else beat.plain).add(tokens, seconds)
        beat.conclude()

    def beat(self, rows: int, greedy: bool) -> Beat:
        """That of a step of so many rows."""
        size = (rows.bit_length(), greedy)
        beat = self._beats.get(size)
        if beat is None:
            beat = self._beats[size] = Beat()
        return beat
