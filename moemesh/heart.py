"""A rank's heart: a thread that tells the frontend a few times a second that the process runs and how its work goes.

The engine thread may be busy, waiting or stuck; the heart beats all the same. What the frontend answers is the rank's
lease: who has not been heard for a while may have been given up, and begins nothing new. A rank that has been given up
for good is told so through its heart, if the frontend cannot kill it itself; one that has not heard the frontend for
`abandoned_s`, or finds that it is gone, ends too.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moemesh.membership_records import BEAT_SECONDS
from moemesh.slowness import NO_EFFORT, Effort
from transport.control import ControlClient
from transport.errors import Overloaded
from transport.life import Life
from transport.messages import GroupPulse, Heard, Heartbeat, Message, Stop

LEASE_SECONDS = 2.0


EFFORT_SECONDS = 0.05
"""The thread's processor time is looked up so often: a system call."""


@dataclass
class Pulse:
    """What the heart tells of the engine; written by the engine's thread, read by the heart's."""

    progress: int = 0
    working: bool = False
    group: GroupPulse | None = None
    effort: Effort = NO_EFFORT

    def __post_init__(self) -> None:
        self._awake = self._next = 0.0

    def note_turn(self, seconds: float, now: float) -> None:
        """A turn of the engine's loop took so long. To be called in its thread."""
        self._awake += seconds
        if now >= self._next:
            self._next = now + EFFORT_SECONDS
            self.effort = Effort(self._awake, time.thread_time())


class HeartPort(Protocol):
    """A heart's end of the control plane; `ControlClient` is the real one."""

    @property
    def life(self) -> Life: ...

    def begin_life(self, life: Life) -> None: ...

    def send(self, message: Message) -> None: ...

    def receive_all(self) -> list[Message]: ...


class StillHeart:
    """Of a rank that nobody watches: its lease never ends."""

    def __init__(self) -> None:
        self.pulse = Pulse()

    def lease_holds(self) -> bool:
        """Always."""
        return True

    def begin_life(self, life: Life) -> None:
        """Nobody listens."""

    def stop(self) -> None:
        """There is nothing to stop."""


class Heart:
    """Beats from `start` to `stop`. `connect` gives a life its socket; it is called in the heart's own thread, as is
    `end`, with the reason, when the process must go. `is_gone` asks about a frontend that is silent."""

    def __init__(
        self,
        connect: Callable[[Life], ControlClient],
        life: Life,
        *,
        end: Callable[[str], None],
        is_gone: Callable[[], bool] = lambda: False,
        abandoned_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        pulse: Pulse | None = None,
    ) -> None:
        self._connect = connect
        self._end = end
        self._is_gone = is_gone
        self._abandoned_s = abandoned_s
        self._life = life
        self.pulse = pulse or Pulse()
        self._clock = clock
        self._heard_at = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def start(self) -> None:
        """Beat from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; waits for the thread, at most about one beat."""
        self._stopping.set()
        self._thread.join()

    def begin_life(self, life: Life) -> None:
        """Beat for another life of this process, with a new lease."""
        self._heard_at = self._clock()
        self._life = life

    def lease_holds(self) -> bool:
        """The frontend has answered within LEASE_SECONDS."""
        return self._clock() - self._heard_at < LEASE_SECONDS

    def _run(self) -> None:
        control = self._connect(self._life)
        try:
            while not self._stopping.is_set():
                self.beat(control)
                next_beat = self._clock() + BEAT_SECONDS
                left = BEAT_SECONDS
                while left > 0 and not self._stopping.is_set():
                    control.wait(left)
                    self.listen(control)
                    left = next_beat - self._clock()
        finally:
            control.close()

    def beat(self, control: HeartPort) -> None:
        """Say that the process runs, as the life that it is in."""
        if control.life != self._life:
            control.begin_life(self._life)
        with contextlib.suppress(Overloaded):  # a frontend that takes nothing does not answer either
            pulse, effort = self.pulse, self.pulse.effort
            control.send(Heartbeat(pulse.progress, pulse.working, pulse.group, effort.awake, effort.processor))

    def listen(self, control: HeartPort) -> None:
        """Take in the answers; end the process where they, or their absence, say so."""
        for message in control.receive_all():
            if isinstance(message, Heard):
                self._heard_at = self._clock()
            elif isinstance(message, Stop):
                self._end("the frontend has given it up")
        if self._clock() - self._heard_at > self._abandoned_s:
            self._end(f"the frontend has not been heard for {self._abandoned_s:g} s")
        elif not self.lease_holds() and self._is_gone():
            self._end("the frontend is gone")
