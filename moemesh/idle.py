"""How a rank with nothing to do waits: never in the way of the ranks that have something to do.

    look again and again, giving the processor away in between  --(SPIN_SECONDS, where every thread has a core)-->
    lie down (see transport/doorbell.py), look once more        --(nothing there)-->
    sleep on the bell and on the control socket

Ranks of another host cannot ring; where there are such, a rank that has looked in vain for a while naps instead.
"""

import os
import time
from collections.abc import Callable
from typing import Protocol

from transport.doorbell import Doorbell

SPIN_SECONDS = 0.001
SPIN_BEFORE_NAPS_SECONDS = 0.02
NAP_SECONDS = 0.001
LONG_NAP_SECONDS = 0.005
LONG_NAP_AFTER = 1.0
LONG_BELL_NAP_SECONDS = 0.02
"""A bell wakes: this only bounds what a ring that was missed costs."""


class Sleeper(Protocol):
    """Sleeps until something comes on the control socket or a file is readable, or the time is over."""

    def wait(self, timeout_s: float, also: int | None = None) -> bool: ...


class IdleWait:
    """Decides how long to wait. `alone`: there is no peer whose frames could come, so the control socket is all.

    `crowded`: the ranks of this host have more threads than it has cores.
    """

    def __init__(
        self,
        control: Sleeper,
        *,
        bell: Doorbell | None,
        alone: bool,
        crowded: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control = control
        self._clock = clock
        self._bell = bell
        self._alone = alone
        self.crowded = crowded
        self._spin_seconds = SPIN_BEFORE_NAPS_SECONDS if bell is None else 0.0 if crowded else SPIN_SECONDS
        self._long_nap = LONG_NAP_SECONDS if bell is None else LONG_BELL_NAP_SECONDS
        self._idle_since: float | None = None
        self._lying = False

    def worked(self) -> None:
        """Something was done in this turn of the loop."""
        self._idle_since = None
        if self._lying:
            self._get_up()

    def wait(self, longest: float, *, arriving: bool) -> None:
        """Nothing was done: wait a moment, at most `longest` seconds; none at all while a frame is `arriving` that we
        have to fetch."""
        if self._alone:
            self._control.wait(longest)
            return
        now = self._clock()
        if self._idle_since is None:
            self._idle_since = now
        idle = now - self._idle_since
        longest = min(longest, self._long_nap if idle > LONG_NAP_AFTER else NAP_SECONDS)
        if arriving or idle < self._spin_seconds:
            os.sched_yield()
        elif self._bell is None:
            self._control.wait(longest)
        elif not self._lying:
            self._bell.lie_down()
            self._lying = True
        else:
            self._control.wait(longest, self._bell.fileno())
            self._get_up()

    def _get_up(self) -> None:
        assert self._bell is not None
        self._bell.get_up()
        self._lying = False
