"""Credit windows: how many frames may be under way to one peer, and when it is told that they were taken.

    ours:   queued --(credit left)--> in flight --(peer returns credits)--> done
    theirs: arrived --(the rank takes it)--> owed --(on our next frame, or alone when half a window is owed)--> returned

Why: a stopped peer must not hurt the others. About 512 small unanswered frames exhaust the shared-memory pool of Open
MPI and stall the sender's traffic with live peers; beyond the window frames wait in our own memory instead.
Pure: knows no sockets and no clock.
"""

from collections import deque
from typing import Generic, TypeVar

from transport.errors import Overloaded, ProtocolError

ItemT = TypeVar("ItemT")

DEFAULT_WINDOW = 16
DEFAULT_MAX_QUEUED = 1024
MAX_WINDOW = 65535


class CreditWindow(Generic[ItemT]):
    """Both directions of the traffic with one peer."""

    def __init__(self, size: int = DEFAULT_WINDOW, max_queued: int = DEFAULT_MAX_QUEUED) -> None:
        if not 1 <= size <= MAX_WINDOW:
            raise ValueError(f"credit window must be 1 to {MAX_WINDOW} frames, got {size}")
        if max_queued < 1:
            raise ValueError(f"the queue behind the credit window must hold at least 1 frame, got {max_queued}")
        self._size = size
        self._max_queued = max_queued
        self._queue: deque[ItemT] = deque()
        self._in_flight = 0
        self._owed = 0

    @property
    def queued(self) -> int:
        """Frames that wait for a credit."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Frames sent that the peer has not yet said it took."""
        return self._in_flight

    def push(self, item: ItemT) -> None:
        """Queue a frame for the peer. Raises Overloaded when the queue is full; the frame is then not kept."""
        if len(self._queue) >= self._max_queued:
            raise Overloaded(
                f"{len(self._queue)} frames (at most {self._max_queued}) already wait behind {self._in_flight} "
                "unanswered ones: the peer does not take them; send less or treat it as suspect"
            )
        self._queue.append(item)

    def pop(self) -> ItemT | None:
        """The next frame that may leave now, in order, or None. It counts as in flight from here on."""
        if not self._queue or self._in_flight >= self._size:
            return None
        self._in_flight += 1
        return self._queue.popleft()

    def returned(self, credits: int) -> None:
        """The peer returned credits. Raises ProtocolError when it returns more than are out; all are back then."""
        in_flight = self._in_flight
        self._in_flight = max(0, in_flight - credits)
        if credits > in_flight:
            raise ProtocolError(f"peer returned {credits} credits while {in_flight} frames were in flight")

    def consumed(self) -> None:
        """We took one frame of the peer's: it is owed a credit."""
        self._owed += 1

    def take_owed(self) -> int:
        """All credits owed, to ride on a frame that leaves now."""
        owed, self._owed = self._owed, 0
        return owed

    def take_due(self) -> int:
        """All credits owed if they must leave on a frame of their own (half the window), else 0."""
        return self.take_owed() if 2 * self._owed >= self._size else 0

    def clear(self) -> list[ItemT]:
        """The peer is gone: forget everything; returns the frames that never left."""
        dropped = list(self._queue)
        self._queue.clear()
        self._in_flight = self._owed = 0
        return dropped
