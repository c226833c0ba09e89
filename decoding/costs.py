"""What a step costs: seconds by query tokens, rows and context, and of drafting by drafter, rows and depth.

The table is measured when a model is loaded (decoding/probe.py) and kept in a file. While the engine runs, the model of
the costs is corrected by what each step takes: one factor for all (other work on the machine), one for each size of
step, one for each drafter.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EDGES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
LARGEST = 2048  # query tokens whose price is kept, unless steps may have more; larger ones are taken to cost the same
SURPRISE = 0.7  # log ratio beyond which a measurement is taken for a hiccup, and counts no more
FORMAT = 3
REFRESH = 16  # steps between two looks at the prices, which take as long as fifty products
FORGETTING = 0.992  # of what a size of step was found to cost, each time


@dataclass(frozen=True)
class DraftPrice:
    """Seconds of one ``propose`` of a drafter: (first + row * R) + (depth - 1) * (further + further_row * R)."""

    first: float = 0.0
    row: float = 0.0
    further: float = 0.0
    further_row: float = 0.0
    token: float = 0.0  # of one token that it has to catch up with

    def seconds(self, rows: float, depth: float) -> float:
        """Of R rows at least 1, depth at least 1."""
        return self.first + self.row * rows + (depth - 1) * (self.further + self.further_row * rows)


@dataclass(frozen=True)
class CostTable:
    """Measured seconds."""

    tokens: tuple[int, ...]  # query tokens of one row, rising from 1
    seconds: tuple[float, ...]  # of a whole step of so many, drafting left out
    row: float = 0.0  # more for each further row
    context: float = 0.0  # more for each token of context, of all rows together
    drafters: Mapping[str, DraftPrice] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError unless the numbers can be prices."""
        numbers = [
            *self.seconds,
            self.row,
            self.context,
            *(v for d in self.drafters.values() for v in asdict(d).values()),
        ]
        rising = all(a < b for a, b in zip(self.tokens, self.tokens[1:]))
        if not self.tokens or self.tokens[0] != 1 or len(self.tokens) != len(self.seconds) or not rising:
            raise ValueError("a cost table needs one price for each of a rising list of sizes that begins with 1")
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or min(self.seconds) <= 0:
            raise ValueError("prices must be finite, and a step must cost something")

    def save(self, path: Path) -> None:
        """Write the table, at once or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n", encoding="utf-8")
        part.replace(path)

    @staticmethod
    def load(path: Path) -> CostTable | None:
        """The table in a file; None where there is none that can be used."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                return None
            content["drafters"] = {name: DraftPrice(**price) for name, price in content["drafters"].items()}
            table = CostTable(**{**content, "tokens": tuple(content["tokens"]), "seconds": tuple(content["seconds"])})
            table.check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return table


def guessed_table(drafters: tuple[str, ...]) -> CostTable:
    """What is believed before anything is measured: nodes at a fiftieth of a step, a drafting pass at an eighth."""
    price = DraftPrice(first=1.5e-4, further=1.25e-4, token=1e-6)
    seconds = tuple(1e-3 * (1 + 0.02 * (count - 1)) for count in EDGES)
    return CostTable(EDGES, seconds, row=2e-5, context=0.0, drafters=dict.fromkeys(drafters, price))


class CostModel:
    """Prices of now: the table, corrected by what steps take. In plain numbers: it is asked several times a step.

    Args:
        largest: the most query tokens of a step.
    """

    def __init__(self, table: CostTable, largest: int = LARGEST) -> None:
        self._steps_seen = 0
        self._largest = largest
        self.replace(table)

    def replace(self, table: CostTable) -> None:
        """Start again from another table."""
        table.check()
        self.table = table
        self._all = 0.0  # log factor on everything
        self._sizes = [0.0] * len(table.tokens)  # log factor by size of step
        self._seen = [self._steps_seen] * len(table.tokens)  # steps at the last look
        self._drafters = dict.fromkeys(table.drafters, 0.0)  # log factor by drafter
        self._refresh()

    @property
    def moved(self) -> float:
        """Logarithm of how much slower everything is than when it was measured."""
        return self._all

    def steps(self) -> Tensor:
        """[largest + 1] float64 seconds of a step of one row without context, by query tokens; entry 0 repeats 1."""
        return self._dense

    def at(self, tokens: float) -> float:
        """Seconds of a step of one row without context."""
        return self._list[min(int(tokens + 0.5), self._largest)]

    def step(self, tokens: int, rows: int, context: int) -> float:
        """Seconds of a step without drafting."""
        return self.at(tokens) + self.extra(rows, context)

    def extra(self, rows: int, context: int) -> float:
        """Seconds that rows beyond the first and context add to a step."""
        return math.exp(self._all) * (self.table.row * (rows - 1) + self.table.context * context)

    def draft(self, name: str, rows: float, depth: float) -> float:
        """Seconds of a drafter's ``propose`` for so many rows."""
        return self.drafter_factor(name) * self.table.drafters[name].seconds(rows, depth)

    def drafter_factor(self, name: str) -> float:
        return math.exp(self._all + self._drafters[name])

    def catch_up(self, name: str, tokens: int) -> float:
        """Seconds for a drafter to run so many tokens of a text that it has not followed."""
        return self.drafter_factor(name) * self.table.drafters[name].token * tokens

    def learn_step(self, tokens: int, rows: int, context: int, seconds: float) -> None:
        """A step, without its drafting, took so long."""
        error = _clip(math.log(max(seconds, 1e-9) / self.step(tokens, rows, context)))
        edges = self.table.tokens
        self._all += 0.02 * error
        self._steps_seen += 1
        above = min(bisect_left(edges, tokens), len(edges) - 1)
        sides = (above, above - 1) if above and edges[above] > tokens else (above,)
        for side in sides:  # a size that was not seen for long is known least: one look at it counts for more
            gap = self._steps_seen - self._seen[side]
            self._sizes[side] += min(0.02 * gap, 0.4) * error
            self._seen[side] = self._steps_seen
        if self._steps_seen % REFRESH == 0:
            self._refresh()

    def learn_draft(self, name: str, rows: int, depth: int, seconds: float) -> None:
        """A drafter's ``propose`` took so long."""
        expected = self.draft(name, rows, depth)
        if expected > 0:
            self._drafters[name] += 0.03 * _clip(math.log(max(seconds, 1e-9) / expected))

    def _refresh(self) -> None:
        self._sizes = [size * FORGETTING for size in self._sizes]  # what was not seen for long is believed less
        edges = np.array(self.table.tokens, dtype=float)
        seconds = np.array(self.table.seconds) * np.exp(self._all + np.array(self._sizes))
        sizes = np.arange(self._largest + 1, dtype=float)
        dense = np.interp(sizes, edges, seconds)
        if len(seconds) > 1:
            slope = max(0.0, (seconds[-1] - seconds[-2]) / (edges[-1] - edges[-2]))
            dense = np.where(sizes > edges[-1], seconds[-1] + slope * (sizes - edges[-1]), dense)
        dense = np.maximum.accumulate(dense)  # noise must not make more tokens cheaper than fewer
        self._list: list[float] = dense.tolist()
        self._dense = torch.from_numpy(dense)


def _clip(error: float) -> float:
    return min(max(error, -SURPRISE), SURPRISE)
