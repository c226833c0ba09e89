"""First tokens: what a step that makes some leaves undone, so that whoever waits for one does not wait for drafts.

A step with drafts takes longer than a plain one. Rows whose text is under way get more tokens for it; a row that is
still without any only waits.
"""

from __future__ import annotations

from decoding.costs import CostModel
from decoding.plan import Plan, PlannedRow
from decoding.pulse import PLAIN, Beat

SHARE = 0.02  # of the time, which may be lost to first tokens
SAVED = 4  # steps whose time may be saved up for it


def is_first(row: PlannedRow) -> bool:
    """The row has no token yet."""
    return row.sequence.generated == 0


def is_left_alone(row: PlannedRow) -> bool:
    """Models do not draft for the row in this step: they would have to read its prompt before its first token.

    Choices that wait for the first one to be through with their prompt are to find the drafters' K/V of it, too.
    """
    return is_first(row) and row.sequence.params.n == 1


def beside_tokens(plan: Plan, costs: CostModel) -> float:
    """Seconds of a step beside its drafts and one query token a row: what rows and context add, less its prompts.

    Prompts are run whatever is drafted. Were they part of what a step's tokens cost, tokens would seem dear in it, and
    nodes a bargain that no later step confirms. Added to what all query tokens cost, this leaves them out.
    """
    rows = len(plan.deciding)
    context = sum([row.end for row in plan.deciding])
    return costs.extra(rows, context) + costs.at(rows) - costs.at(plan.chain_tokens)


class FirstTokens:
    """Whether a step that makes some is to go without any drafts.

    It is, while all that is lost in this way stays a small share of the time: where first tokens come in every step,
    drafts are not given up for them. Whoever tells what to expect is drafted for from the first token on, unless more
    time is saved than lost.
    """

    def __init__(self) -> None:
        self._credit = 0.0  # seconds that may be lost

    def save(self, seconds: float) -> None:
        """A step took so long."""
        self._credit = min(self._credit + SHARE * seconds, SAVED * seconds)

    def go_alone(self, plan: Plan, beat: Beat) -> bool:
        """Whether the step is to be a plain one; what is lost by that is written off.

        Args:
            beat: what steps of about so many rows have made, by gear.
        """
        firsts = [row for row in plan.rows if is_first(row)]
        if not firsts or beat.current == PLAIN or not all(is_left_alone(row) for row in firsts):
            return False
        plain, current = beat.accounts[PLAIN], beat.accounts[beat.current]
        gain = 1 - plain.rate / current.rate if plain.rate and current.rate else 0.0
        lost = max(0.0, plain.step_seconds * gain)
        saved = len(firsts) * (current.step_seconds - plain.step_seconds)
        if lost > self._credit or (lost > saved and any(row.sequence.request.prediction_ids for row in firsts)):
            return False
        self._credit -= lost
        return True
