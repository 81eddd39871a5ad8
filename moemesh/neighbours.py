"""The processes of the other ranks: which of them this one has met, and whom it is to meet. No I/O, no clock.

A process that came after the mesh was started is met by each of the others, two at a time: it and its spawner begin
with that, and every view names those who can be met now. Of two, the later in the order of (incarnation it began as,
rank) connects, the other accepts. Who has not been met is not talked with, whatever the view says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from transport import messages

MOST_FAILURES = 3
"""In meeting one process: after as many a newcomer gives up, and another takes its place."""

logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """A meeting, or the start of a process, came to nothing."""

    rank: int
    incarnation: int
    reason: str


class Meetings(Protocol):
    """How processes meet; `MpiMeetings` is the real one."""

    def spawn(self, rank: int, incarnation: int, command: Sequence[str]) -> None: ...

    def accept(self, rank: int, incarnation: int) -> None: ...

    def connect(self, lives: Iterable[tuple[int, int]]) -> None: ...

    def take_failed(self) -> Sequence[tuple[int, int, str]]: ...


class MeetingFailed(RuntimeError):
    """A newcomer cannot meet somebody who is there."""


class Neighbours:
    """Of the process that began as life `born` of `rank`."""

    def __init__(
        self,
        rank: int,
        *,
        born: int,
        met: Mapping[int, int],
        meetings: Meetings | None = None,
        command: Callable[[messages.Respawn], Sequence[str]] | None = None,
    ) -> None:
        """`met`: the processes that are within reach from the start, each with the incarnation that it began as.
        `command` starts a life. Without `meetings` nobody is met but whom the link finds by itself."""
        self._rank = rank
        self._born = born
        self._met = dict(met)
        self._meetings = meetings
        self._command = command
        self._meeting: set[tuple[int, int]] = set()
        self._spawning: set[tuple[int, int]] = set()
        self._failures: Counter[tuple[int, int]] = Counter()
        self._view: messages.View | None = None

    def reaches(self, peer: int, born: int) -> bool:
        """The process of the peer that began as this life has been met."""
        return self._met.get(peer) == born

    def joined(self, processes: Iterable[tuple[int, int]]) -> None:
        """These have been met."""
        for process in processes:
            self._met[process[0]] = process[1]
            self._meeting.discard(process)
            self._spawning.discard(process)

    def follow(self, view: messages.View) -> None:
        """Begin to meet those who are there and were not met."""
        self._view = view
        self._meet()

    def spawn(self, order: messages.Respawn) -> None:
        """Start a process, and meet it."""
        assert self._meetings is not None
        assert self._command is not None
        logger.info("rank %d starts life %d of rank %d", self._rank, order.incarnation, order.rank)
        self._meeting.add((order.rank, order.incarnation))
        self._spawning.add((order.rank, order.incarnation))
        self._meetings.spawn(order.rank, order.incarnation, self._command(order))

    def take_not_spawned(self) -> list[messages.NotSpawned]:
        """Orders to `spawn` that came to nothing since the last call. Meetings that did are begun anew.

        Raises MeetingFailed in a newcomer that has failed too often to meet the same process, which is still there.
        """
        if self._meetings is None:
            return []
        not_spawned = []
        for failure in self._meetings.take_failed():
            rank, incarnation, reason = failure
            process = (rank, incarnation)
            self._meeting.discard(process)
            if process in self._spawning:
                self._spawning.discard(process)
                not_spawned.append(messages.NotSpawned(rank, incarnation, reason))
                continue
            logger.warning("rank %d has not met rank %d (life %d): %s", self._rank, rank, incarnation, reason)
            self._failures[process] += 1
            if self._connects(process) and process in self._present() and self._failures[process] >= MOST_FAILURES:
                raise MeetingFailed(f"cannot meet rank {rank} (life {incarnation}): {reason}")
            self._meet()
        return not_spawned

    def _meet(self) -> None:
        if self._meetings is None:
            return
        new = [process for process in self._present() if not self.reaches(*process) and process not in self._meeting]
        self._meeting.update(new)
        self._meetings.connect([process for process in new if self._connects(process)])
        for process in new:
            if not self._connects(process):
                self._meetings.accept(*process)

    def _present(self) -> list[tuple[int, int]]:
        """The other processes that can be met."""
        view = self._view
        if view is None:
            return []
        found = enumerate(zip(view.born, view.states, strict=True))
        return [(peer, born) for peer, (born, state) in found if peer != self._rank and born >= 0 and state != "dead"]

    def _connects(self, process: tuple[int, int]) -> bool:
        return (self._born, self._rank) > (process[1], process[0])
