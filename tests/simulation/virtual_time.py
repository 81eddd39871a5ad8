"""Time that passes only when nothing is left to do now: a list of events, and an asyncio loop that lives on it."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from math import inf

Action = Callable[[], object]


class VirtualTime:
    """Events by the time at which they are due; those of one moment in the order in which they were entered."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._numbers = count()

    def clock(self) -> float:
        """What production code takes for its clock."""
        return self.now

    def at(self, due: float, action: Action) -> None:
        heapq.heappush(self._events, (max(due, self.now), next(self._numbers), action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    @property
    def next_due(self) -> float:
        return self._events[0][0] if self._events else inf

    def step(self) -> None:
        """The next event happens."""
        self.now, _, action = heapq.heappop(self._events)
        action()


class VirtualLoop(asyncio.BaseEventLoop):
    """The frontend's event loop. Wherever a real one would sleep the world goes on, until something concerns it.

    What reaches the frontend from outside comes by `hear`. While it is frozen it hears nothing and does nothing.
    """

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time
        self._selector = self  # BaseEventLoop asks it to `select`
        self._heard: list[Action] = []
        self._frozen_until = 0.0

    def time(self) -> float:
        return self._time.now

    def hear(self, action: Action) -> None:
        """Something comes in: `action` is called by the loop."""
        self._heard.append(action)

    def freeze(self, seconds: float) -> None:
        """The process gets no processor for so long."""
        self._frozen_until = max(self._frozen_until, self._time.now + seconds)

    def select(self, timeout: float | None) -> list[Action]:
        """Let the world go on for at most `timeout`; what has come in."""
        deadline = inf if timeout is None else self._time.now + timeout
        while not self._heard or self._time.now < self._frozen_until:
            horizon = max(deadline, self._frozen_until)
            if self._time.next_due > horizon:
                assert horizon < inf, "nothing will ever happen again"
                self._time.now = horizon
                break
            self._time.step()
        heard, self._heard = self._heard, []
        return heard

    def _process_events(self, event_list: list[Action]) -> None:
        for action in event_list:
            self.call_soon(action)

    def _write_to_self(self) -> None:
        """There is one thread: nobody else wakes it."""
