"""How long a queue takes, from how fast it has moved lately. Times are arguments, in seconds."""

from __future__ import annotations

from collections import deque

SAMPLES = 64
"""Requests that left last, of which the pace is made."""
SHORTEST, LONGEST = 1.0, 60.0


class QueuePace:
    """Seconds between requests that leave the queue while it is not empty; before the first of them left, those of
    before."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=SAMPLES + 1)
        self._before = 0.0

    def begin(self, now: float) -> None:
        """The queue was empty, and is not any more."""
        if len(self._times) > 1:  # those that found the queue empty and left it at once say nothing
            self._before = self._pace(self._times[-1]) or self._before
        self._times.clear()
        self._times.append(now)

    def left(self, now: float) -> None:
        """A request has got its turn."""
        self._times.append(now)

    def seconds(self, num_waiting: int, now: float) -> float:
        """Until so many have left, from SHORTEST to LONGEST."""
        return min(LONGEST, max(SHORTEST, num_waiting * self._pace(now)))

    def _pace(self, now: float) -> float:
        if not self._times:
            return 0.0
        moved, passed = len(self._times) - 1, now - self._times[0]
        return passed / moved if moved else max(self._before, passed)
