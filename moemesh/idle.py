"""How a rank with nothing to do waits: never in the way of the ranks that have something to do.

Frames raise no signal: somebody has to look for them. Shortly after work a rank looks again and again, giving the
processor away between two looks, for the next layer's frame is microseconds off; later it sleeps, longer and longer, on
the control socket, where new requests arrive at once.
"""

import os
import time
from typing import Protocol

SPIN_SECONDS = 0.02
NAP_SECONDS = 0.001
LONG_NAP_SECONDS = 0.005
LONG_NAP_AFTER = 1.0


class Sleeper(Protocol):
    """Sleeps until something comes on the control socket, or the time is over."""

    def wait(self, timeout_s: float) -> bool: ...


class IdleWait:
    """Decides how long to wait. `alone`: there is no peer whose frames could come, so the control socket is all."""

    def __init__(self, control: Sleeper, *, alone: bool) -> None:
        self._control = control
        self._alone = alone
        self._idle_since: float | None = None

    def worked(self) -> None:
        """Something was done in this turn of the loop."""
        self._idle_since = None

    def wait(self, longest: float) -> None:
        """Nothing was done: wait a moment, at most `longest` seconds."""
        if self._alone:
            self._control.wait(longest)
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        idle = now - self._idle_since
        if idle < SPIN_SECONDS:
            os.sched_yield()
        else:
            self._control.wait(min(longest, LONG_NAP_SECONDS if idle > LONG_NAP_AFTER else NAP_SECONDS))
