"""Groups that stand still because a frame was lost: nobody asks again for what members of a group send each other.

A member that can do nothing without its peers says so with its heartbeat, and for whom it waits. One that computes,
loads, or waits for experts or for the frontend says nothing. So where all members of a group wait for each other, have
moved nothing and have looked for frames again and again for a while, some frame will never come, however slow they are.
The group then begins a new generation, which runs the step again. No I/O, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moemesh.membership_records import GroupView
from transport.messages import GroupPulse

PATIENCE_SECONDS = 1.0
"""For so long a frame may travel. Twice as long after each generation in a row that has finished no step."""
MOST_TRIES = 3
"""After so many of those it is no accident: a link is broken."""
LEAST_TURNS = 3
"""How often a member must have looked for frames meanwhile."""


class Standing(NamedTuple):
    """A group stands still. `broken`: the member for which the others wait in vain, again and again."""

    group: int
    reason: str
    broken: int | None


@dataclass(slots=True)
class _Stand:
    """What a member has said all the time from `since` to `until`, and how many turns its engine had made then."""

    pulse: GroupPulse
    since: float
    until: float
    first_turn: int
    last_turn: int

    @property
    def has_looked(self) -> bool:
        return self.last_turn - self.first_turn >= LEAST_TURNS


class Standstill:
    """Of the groups of a mesh."""

    def __init__(self, num_groups: int) -> None:
        self._stands: dict[int, _Stand] = {}
        self._tries = [0] * num_groups

    def beat(self, rank: int, turns: int, pulse: GroupPulse | None, now: float) -> None:
        """A rank's heart was heard. An engine that makes no turn says nothing new: it may be computing again."""
        known = self._stands.get(rank)
        if pulse is None or not pulse.awaited:
            self._stands.pop(rank, None)
        elif known is None or known.pulse != pulse:
            self._stands[rank] = _Stand(pulse, now, now, turns, turns)
        elif turns > known.last_turn:
            known.until, known.last_turn = now, turns

    def forget(self) -> None:
        """Who listens was away, and does not know for how long it was so."""
        self._stands.clear()

    def found(self, groups: Sequence[GroupView]) -> list[Standing]:
        """The groups that stand still, each of which is to begin a new generation: they are not named again before
        that has been standing still."""
        standing = (self._look_at(number, group) for number, group in enumerate(groups))
        return [each for each in standing if each is not None]

    def _look_at(self, number: int, group: GroupView) -> Standing | None:
        stands = [self._stands[rank] for rank in group.members if rank in self._stands]
        if len(stands) < max(2, len(group.members)):
            return None
        if any(stand.pulse.generation != group.generation or not stand.has_looked for stand in stands):
            return None
        tries = 0 if stands[0].pulse.steps else self._tries[number]
        still = min(stand.until for stand in stands) - max(stand.since for stand in stands)
        if still < PATIENCE_SECONDS * 2.0**tries:
            return None
        for rank in group.members:
            del self._stands[rank]
        broken = _most_awaited(group, stands) if tries >= MOST_TRIES else None
        self._tries[number] = 0 if broken is not None else tries + 1
        reason = f"its members have waited for each other for {still:.1f} s: a frame was lost between them"
        return Standing(number, reason, broken)


def _most_awaited(group: GroupView, stands: Sequence[_Stand]) -> int:
    """Rather another one than the leader."""
    awaited = Counter(rank for stand in stands for rank in stand.pulse.awaited)
    return max(reversed(group.members), key=lambda rank: awaited[rank])
