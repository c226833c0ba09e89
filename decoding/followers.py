"""Which rows the drafters follow: what they run and keep so that they could draft."""

from __future__ import annotations

from decoding.market import Member
from decoding.plan import Plan


class Followers:
    """Drafters that sleep follow no row, but for one: their model neither runs nor keeps anything of the others.

    The one, the scout, is what they can be tried on. It costs what following costs, which is paid from the drafter's
    credit: without any, there is no scout.
    """

    def __init__(self, members: list[Member]) -> None:
        self._members = members
        self._any_slept = False

    def settle(self, plan: Plan) -> None:
        """Say for each row of a step who follows it."""
        sleeping = any(member.sleeps for member in self._members)
        if not sleeping and not self._any_slept:
            return
        self._any_slept = sleeping
        for member in self._members:
            for row in plan.rows:
                unfollowed = row.sequence.unfollowed
                if not member.sleeps:
                    unfollowed.discard(member.name)
                    member.scout = None
                elif member.scout is None and member.name not in unfollowed and member.credit > 0:
                    member.scout = row.sequence.id
                elif member.scout == row.sequence.id and member.credit < 0:
                    member.scout = None
                    unfollowed.add(member.name)
                elif member.scout != row.sequence.id:
                    unfollowed.add(member.name)
