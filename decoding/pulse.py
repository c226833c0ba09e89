"""Whether thinking about drafts is itself worth its time: the clock decides between three gears.

All else that the planner believes is a model. This is the guard behind it: tokens a second as they were, thinking and
everything else included, of steps in each gear. The engine runs in the best one, and tries the others now and then:
the more a try costs, the more rarely, so that a known share of the time goes into it.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN, LIGHT, FULL = 0, 1, 2  # nothing drafted; guesses without a model alone; everything weighed
NAMES = ("plain", "light", "full")
TRIAL = (2, 8, 8)  # steps of a try, by gear, with one row; with many rows each step tells more
ENOUGH = (6, 48, 48)  # the same: steps before anything is concluded
LEAST = 2, 6  # of both, with however many rows
PATIENCE = 4  # times a try's steps: it ends then, however many of them had chunks of prompts and told nothing
FIRST = 12  # steps before the first try, and between two of them until enough is known
REST = (48, 2048)  # and later: at least, at most
SHARE = 0.003  # of the time that tries of one gear cost
MARGIN = 1.02  # by which another gear must win
FADING = 0.995  # of what the steps of a gear made, a step
FALLEN = 0.5  # of what the gear has made for long: the text may have changed, others are tried soon
SLOW = 0.01  # how fast "for long" follows


@dataclass
class Account:
    """What the steps of one gear made, fading."""

    tokens: float = 0.0
    seconds: float = 0.0
    weight: float = 0.0
    steps: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        """One more step."""
        self.tokens = FADING * self.tokens + tokens
        self.seconds = FADING * self.seconds + seconds
        self.weight = FADING * self.weight + 1
        self.steps += 1

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return self.seconds / self.weight if self.weight else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Beat:
    """The gears of steps with about so many rows.

    Args:
        gears: those that there are, the highest last; it begins with that one.
        rows: how many, about.
        least: steps that a try of a gear that drafts takes at least.
    """

    def __init__(self, gears: tuple[int, ...], rows: int = 1, least: int = 0) -> None:
        shortest = {gear: LEAST[0] if gear == PLAIN else max(LEAST[0], least) for gear in gears}
        self._trial_steps = {gear: max(shortest[gear], TRIAL[gear] // rows) for gear in gears}
        self._enough = {gear: max(LEAST[1], ENOUGH[gear] // rows) for gear in gears}
        self.current = gears[-1]
        self.accounts = {gear: Account() for gear in gears}
        self._wait = dict.fromkeys(gears, FIRST)  # steps to the next try
        self._trial: int | None = None
        self._left = 0  # steps of the try that teach something,
        self._patience = 0  # and steps of any kind
        self._mark = 0.0  # rate of the current gear, for long

    def next(self) -> int:
        """The gear of the next step."""
        if self._trial is not None:
            if self._left > 0 and self._patience > 0:
                self._patience -= 1
                return self._trial
            self._conclude(self._trial)
        for gear in self._wait:
            if gear == self.current:
                continue
            self._wait[gear] -= 1
            if self._wait[gear] <= 0 and self._trial is None:
                self._begin(gear)
        return self.current if self._trial is None else self._trial

    def _begin(self, gear: int) -> None:
        """Try a gear; one that is hardly known for long enough to judge it."""
        self._trial = gear
        self._left = max(self._trial_steps[gear], self._enough[gear] - self.accounts[gear].steps)
        self._patience = PATIENCE * self._left - 1

    def saw(self, gear: int, tokens: int, seconds: float) -> None:
        """A step, without chunks of prompts, made so many tokens in so many seconds."""
        account = self.accounts[gear]
        account.add(tokens, seconds)
        if gear == self._trial:
            self._left -= 1
        if gear == self.current and gear != PLAIN:
            self._mark += SLOW * (account.rate - self._mark)
            if account.rate < FALLEN * self._mark:
                self._mark = account.rate
                self._wait = {other: min(wait, REST[0]) for other, wait in self._wait.items()}

    def charge(self, seconds: float) -> None:
        """So much was spent between two steps on what drafts need; who does not draft is not charged."""
        if self.current == FULL:
            self.accounts[FULL].seconds += seconds

    def _conclude(self, gear: int) -> None:
        """A try is over: change gears, or wait for the next one until it has paid for itself."""
        self._trial = None
        ours, theirs = self.accounts[self.current], self.accounts[gear]
        if ours.steps < self._enough[self.current] or theirs.steps < self._enough[gear]:
            self._wait[gear] = FIRST
        elif theirs.rate > MARGIN * ours.rate:
            self.current = gear
            self._wait = dict.fromkeys(self._wait, REST[0])
            self._mark = theirs.rate
        else:
            lost = self._trial_steps[gear] * theirs.step_seconds * (1 - theirs.rate / ours.rate)
            self._wait[gear] = min(max(REST[0], int(lost / (SHARE * ours.step_seconds))), REST[1])


class Pulse:
    """Beats by the number of rows, in powers of two, and by the kind of the first of them: see ``Sequence.kind``."""

    def __init__(self, gears: tuple[int, ...], least: int = 0) -> None:
        self._gears = gears
        self._least = least
        self._beats: dict[tuple[int, tuple[bool, bool]], Beat] = {}

    def beat(self, rows: int, kind: tuple[bool, bool]) -> Beat:
        """That of a step of so many rows."""
        size = (rows.bit_length(), kind)
        beat = self._beats.get(size)
        if beat is None:
            beat = self._beats[size] = Beat(self._gears, rows, self._least)
        return beat
