"""Which rank is many times slower than its peers, and whether to replace it. Pure: events and times in, a verdict out.

Everybody waits for a slow rank, so its peers' steps, answers and deadlines grow with its own and tell nothing. What
tells them apart: of the time in which a rank was awake (it did not wait for anybody), for how much did its engine's
thread have a processor? Where many ranks share few cores all of them have little; where one has a long prompt, hot
experts or a share to load, it has a processor all the time, and others wait for it with good reason. A rank that is
awake for long and has a tenth, at most, of what its peers have is starved by itself: by a quota, by signals, by pages
that are not in memory, by what else runs on its cores.

    nobody --slow in one period--> watched --in PERIODS of them--> replaced --slow again--> watched, until the back-off
      ^                               |                                                     is over; then replaced
      +------another, or nobody-------+                              after MOST_REPLACED times: kept, and said so
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

PERIOD_SECONDS = 0.75
PERIODS = 4
"""In a row, but for those that tell nothing of it."""
FACTOR = 10.0
AWAKE_SHARE = 0.2
"""Of a period. Who was awake for less had little to do, or is in a turn that takes long: that tells nothing."""
COMPARABLE_SHARE = 0.005
"""Who is awake for less is no measure for others."""
BACKOFF_SECONDS = 30.0
"""After the first time that a rank was replaced; doubled each time."""
MOST_REPLACED = 3
FORGIVEN_SECONDS = 600.0
"""Who was not slow for so long begins anew."""


class Effort(NamedTuple):
    """Seconds since a rank's process began: `awake`, in which its engine waited for nobody, and `processor`, for which
    its thread had one."""

    awake: float
    processor: float

    def since(self, before: Effort) -> Effort:
        """What was added."""
        return Effort(self.awake - before.awake, self.processor - before.processor)

    @property
    def share(self) -> float:
        """0..1. Waiting costs a little processor time too: that is more than was awake, at times."""
        return min(1.0, self.processor / self.awake)


NO_EFFORT = Effort(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank is slow. `action`: what to do about it now."""

    rank: int
    reason: str
    action: Literal["watch", "replace", "keep"]


class Slowness:
    """The efforts of all ranks; at most one of them is slow at a time."""

    def __init__(self) -> None:
        self._latest: dict[int, Effort] = {}
        self._before: dict[int, Effort] = {}
        self._period_began: float | None = None
        self._slow: Slow | None = None
        self._periods = 0
        self._slow_at: dict[int, float] = {}
        self._replaced: dict[int, list[float]] = {}

    def note(self, rank: int, effort: Effort) -> None:
        """A heart said so."""
        self._latest[rank] = effort

    def begin_anew(self) -> None:
        """What was noted cannot be compared: somebody has come or gone, or loads. What was replaced stays known."""
        self._latest.clear()
        self._before.clear()
        self._period_began = self._slow = None
        self._periods = 0

    def pass_over(self) -> None:
        """What was heard in this period may have been said before: it does not count."""
        self._period_began = None

    def look(self, now: float) -> Slow | None:
        """Who is slow now."""
        if self._period_began is None:
            self._period_began, self._before = now, dict(self._latest)
        elif now - self._period_began >= PERIOD_SECONDS:
            seconds = now - self._period_began
            added = {rank: self._latest[rank].since(before) for rank, before in self._before.items()}
            self._judge(added, seconds, now)
            self._period_began, self._before = now, dict(self._latest)
        return self._slow

    def replaced(self, rank: int, now: float) -> None:
        """It was given up for its slowness."""
        self._replaced.setdefault(rank, []).append(now)

    def _judge(self, added: Mapping[int, Effort], seconds: float, now: float) -> None:
        found = slowest(added, seconds)
        if found is None:
            if self._slow is not None and not self._is_unknown(self._slow.rank, added, seconds, now):
                self._slow, self._periods = None, 0
            return
        rank, reason = found
        again = self._slow is not None and self._slow.rank == rank
        self._periods = self._periods + 1 if again else 1
        if now - self._slow_at.get(rank, now) > FORGIVEN_SECONDS:
            self._replaced.pop(rank, None)
        self._slow_at[rank] = now
        action = self._action(rank, now)
        if not again or self._slow is None or self._slow.action != action:
            self._slow = Slow(rank, reason + self._explain(rank, action), action)

    def _action(self, rank: int, now: float) -> Literal["watch", "replace", "keep"]:
        times = self._replaced.get(rank, [])
        if self._periods < PERIODS:
            return "watch"
        if len(times) >= MOST_REPLACED:
            return "keep"
        over = not times or now - times[-1] >= BACKOFF_SECONDS * 2.0 ** (len(times) - 1)
        return "replace" if over else "watch"

    def _explain(self, rank: int, action: str) -> str:
        return f"; kept: replacing it {len(self._replaced[rank])} times has not helped" if action == "keep" else ""

    def _is_unknown(self, rank: int, added: Mapping[int, Effort], seconds: float, now: float) -> bool:
        """The period tells nothing of a rank that was slow not long ago."""
        little = rank not in added or added[rank].awake < AWAKE_SHARE * seconds
        return little and now - self._slow_at[rank] <= PERIODS * PERIOD_SECONDS


def slowest(added: Mapping[int, Effort], seconds: float) -> tuple[int, str] | None:
    """The rank that was starved in a period, by what was added to each one's effort, and why; None for nobody.

    It is compared with those of its peers that had little too (the lower quartile): where several have, their host is
    busy.
    """
    awake = {rank: effort for rank, effort in added.items() if effort.awake >= COMPARABLE_SHARE * seconds}
    if len(awake) < 2:
        return None
    by_share = sorted(awake, key=lambda rank: awake[rank].share)
    rank, others = by_share[0], by_share[1:]
    own, theirs = awake[rank], awake[others[len(others) // 4]].share
    if own.awake < AWAKE_SHARE * seconds or own.share * FACTOR > theirs:
        return None
    share = f"{own.share:.1%} of the time that it needed one, its peers for {theirs:.0%}"
    return rank, f"slow: it had a processor for {share}"
