"""Credit windows: how many frames may be under way to one peer, and when it is told that they were taken.

    ours:   queued --(window open)--> numbered, in flight --(peer acknowledges that number or a later one)--> done
    theirs: arrived with its number --> acknowledged on our next frame, or alone when half a window is owed

Why: a stopped peer must not hurt the others. About 512 small unanswered frames exhaust the shared-memory pool of Open
MPI and stall the sender's traffic with live peers; beyond the window frames wait in our own memory instead.

An acknowledgement names the highest number seen, so one that is lost, doubled or late costs nothing: the next one says
the same and more. Frames below it that never came are given up: who waits for them asks again, the window does not.
If everything under way is lost, nothing that could be acknowledged arrives any more; then a probe names our last
number, and the peer acknowledges that. Pure: knows no sockets, and time only as it is told.
"""

from collections import deque
from typing import Generic, TypeVar

from transport.errors import Overloaded, ProtocolError

ItemT = TypeVar("ItemT")

DEFAULT_WINDOW = 16
DEFAULT_MAX_QUEUED = 1024
MAX_WINDOW = 65535
MAX_MISSING = 1024
"""Numbers below the highest that may still come. Older ones are refused, as if they had come."""
FIRST_PROBE_SECONDS = 0.2
LAST_PROBE_SECONDS = 60.0
"""Probes to a peer that stands still pile up as frames do: so the time between two doubles, up to this."""


class CreditWindow(Generic[ItemT]):
    """Both directions of the traffic with one life of one peer."""

    def __init__(self, size: int = DEFAULT_WINDOW, max_queued: int = DEFAULT_MAX_QUEUED) -> None:
        if not 1 <= size <= MAX_WINDOW:
            raise ValueError(f"credit window must be 1 to {MAX_WINDOW} frames, got {size}")
        if max_queued < 1:
            raise ValueError(f"the queue behind the credit window must hold at least 1 frame, got {max_queued}")
        self._size = size
        self._max_queued = max_queued
        self._queue: deque[ItemT] = deque()
        self.sequence = 0
        """Number of the last frame that left. Frames count from 1; 0 is on frames that take no credit."""
        self._acknowledged = 0
        self._seen = 0
        self._missing: set[int] = set()
        self._told = 0
        self._must_tell = False
        self._quiet_since: tuple[int, float] | None = None
        self._patience = FIRST_PROBE_SECONDS

    @property
    def queued(self) -> int:
        """Frames that wait for a credit."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Frames sent that the peer has not yet acknowledged."""
        return self.sequence - self._acknowledged

    # --- ours

    def push(self, item: ItemT) -> None:
        """Queue a frame for the peer. Raises Overloaded when the queue is full; the frame is then not kept."""
        if len(self._queue) >= self._max_queued:
            raise Overloaded(
                f"{len(self._queue)} frames (at most {self._max_queued}) already wait behind {self.in_flight} "
                "unanswered ones: the peer does not take them; send less or treat it as suspect"
            )
        self._queue.append(item)

    def pop(self) -> ItemT | None:
        """The next frame that may leave now, in order, or None. Its number is `sequence` until the next one leaves."""
        if not self._queue or self.sequence - self._acknowledged >= self._size:
            return None
        self.sequence += 1
        return self._queue.popleft()

    def acknowledged(self, sequence: int) -> None:
        """The peer has seen our frames up to `sequence`. Raises ProtocolError for what was never sent."""
        if sequence > self.sequence:
            raise ProtocolError(f"peer acknowledged frame {sequence} and was sent {self.sequence}")
        if sequence > self._acknowledged:
            self._acknowledged = sequence

    def probe_due(self, now: float) -> bool:
        """Frames wait and the window has been full without news for a while: send a probe. `now` in seconds."""
        if not self._queue or self.in_flight < self._size:
            self._quiet_since = None
            return False
        if self._quiet_since is None or self._quiet_since[0] != self._acknowledged:
            self._quiet_since = (self._acknowledged, now)
            self._patience = FIRST_PROBE_SECONDS
            return False
        if now - self._quiet_since[1] < self._patience:
            return False
        self._quiet_since = (self._acknowledged, now)
        self._patience = min(2 * self._patience, LAST_PROBE_SECONDS)
        return True

    # --- theirs

    def arrived(self, sequence: int) -> bool:
        """The peer's frame of this number is here; False when it was here before, and is to be dropped.

        Raises ProtocolError for a number that no window allows.
        """
        if sequence == self._seen + 1:
            self._seen = sequence
            return True
        if sequence > self._seen:
            self._skip_to(sequence)
            self._missing.discard(sequence)
            return True
        if sequence in self._missing:
            self._missing.remove(sequence)
            return True
        return False

    def probed(self, sequence: int) -> None:
        """The peer says that this was its last number, and wants to hear that we know."""
        if sequence > self._seen:
            self._skip_to(sequence)
        self._must_tell = True

    def tell(self) -> int:
        """The highest number seen, to ride on a frame that leaves now."""
        self._must_tell = False
        self._told = self._seen
        return self._seen

    def must_tell(self) -> bool:
        """The acknowledgement must leave on a frame of its own: half a window is owed, or the peer asked."""
        return self._must_tell or 2 * (self._seen - self._told) >= self._size

    def _skip_to(self, sequence: int) -> None:
        if sequence - self._seen > MAX_WINDOW:
            raise ProtocolError(f"peer's frame {sequence} is beyond any window after frame {self._seen}")
        self._missing.update(range(self._seen + 1, sequence + 1))
        self._seen = sequence
        if len(self._missing) > MAX_MISSING:
            self._missing = set(sorted(self._missing)[-MAX_MISSING:])

    def clear(self) -> list[ItemT]:
        """The peer is gone: forget what waits; returns the frames that never left."""
        dropped = list(self._queue)
        self._queue.clear()
        self._acknowledged = self.sequence
        return dropped
