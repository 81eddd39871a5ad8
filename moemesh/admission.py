"""Which request goes to an attention group when, and which is turned away. Pure decisions.

    enter --> waiting --take--> in a group --lost--> restarting --take--> in a group ...
                 |
                 +--expired

Nobody overtakes: who has lost its group goes first, then who came first. A group is given few more requests than it
can compute at a time: who waits here can still be turned away, or go to another group.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moemesh.ledger import GroupLoad, Ledger, LedgerEntry
from moemesh.queue_pace import QueuePace


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """The most that may wait, in requests and tokens of prompts, and for how many seconds; None: no limit.

    A group computes at most `max_num_seqs` at a time; of those that begin again, at most `restart_tokens` tokens (and
    at least one request), lest the others stand still meanwhile.
    """

    max_num_seqs: int
    restart_tokens: int
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    queue_timeout: float | None = None

    @property
    def requests_per_group(self) -> int:
        """With some at hand for those that end, so that no step waits for the frontend."""
        return self.max_num_seqs + max(4, self.max_num_seqs // 4)


class QueueFull(Exception):
    """No more may wait. The message names the limit."""


class Admission:
    """The requests of a ledger that are in no group."""

    def __init__(self, ledger: Ledger, limits: AdmissionLimits) -> None:
        self._ledger = ledger
        self._limits = limits
        self._restarts: OrderedDict[int, LedgerEntry] = OrderedDict()
        self._waiting: OrderedDict[int, LedgerEntry] = OrderedDict()
        self._waiting_tokens = 0
        self._pace = QueuePace()

    @property
    def num_waiting(self) -> int:
        """Requests in no group."""
        return len(self._restarts) + len(self._waiting)

    def check_room(self, num_tokens: int) -> None:
        """Raises QueueFull when a prompt of so many tokens may not wait. One that need not wait is never refused."""
        requests, most = len(self._waiting), self._limits.max_queued_requests
        if most is not None and requests >= most:
            raise QueueFull(f"{requests} requests are waiting, at most {most} may")
        most = self._limits.max_queued_tokens
        if most is not None and requests and self._waiting_tokens + num_tokens > most:
            raise QueueFull(f"requests with {self._waiting_tokens} tokens are waiting, at most {most} may")

    def enter(self, entry: LedgerEntry, now: float) -> None:
        """A new request; `check_room` has been asked."""
        entry.waiting_since = now
        if not self._waiting:
            self._pace.begin(now)
        self._waiting[entry.request_id] = entry
        self._waiting_tokens += len(entry.prompt)

    def restart(self, entries: Iterable[LedgerEntry]) -> None:
        """Requests that have lost their group."""
        for entry in sorted([*self._restarts.values(), *entries], key=lambda entry: entry.request_id):
            self._restarts[entry.request_id] = entry
            self._restarts.move_to_end(entry.request_id)

    def put_back(self, entry: LedgerEntry) -> None:
        """The group could not be told of it: it is the next one again."""
        entry.group = None
        if entry.restarting:
            self.restart([entry])
        else:
            self._waiting[entry.request_id] = entry
            self._waiting_tokens += len(entry.prompt)
            self._waiting.move_to_end(entry.request_id, last=False)

    def forget(self, request_id: int) -> None:
        """The request has ended, wherever it was."""
        self._restarts.pop(request_id, None)
        waited = self._waiting.pop(request_id, None)
        if waited is not None:
            self._waiting_tokens -= len(waited.prompt)

    def expired(self, now: float) -> list[LedgerEntry]:
        """Those that have waited for too long; `forget` them."""
        timeout = self._limits.queue_timeout
        if timeout is None:
            return []
        return [entry for entry in self._waiting.values() if now - entry.waiting_since > timeout]

    def retry_after(self, now: float) -> float:
        """Seconds until those that wait now have probably got their turn."""
        return self._pace.seconds(len(self._waiting), now)

    def take(self, groups: Sequence[int], now: float) -> Iterator[LedgerEntry]:
        """The requests that go to one of `groups` now: in `entry.group`, and no longer waiting."""
        if not groups or not self.num_waiting:
            return
        loads = self._ledger.loads()
        while self._restarts:
            entry = next(iter(self._restarts.values()))
            if not self._give(entry, [group for group in groups if self._takes_restart(loads[group], entry)], loads):
                return
            yield entry
        while self._waiting:
            entry = next(iter(self._waiting.values()))
            if not self._give(entry, [group for group in groups if self._has_room(loads[group])], loads):
                return
            self._pace.left(now)
            yield entry

    def _give(self, entry: LedgerEntry, groups: Sequence[int], loads: Sequence[GroupLoad]) -> bool:
        if not groups:
            return False
        self.forget(entry.request_id)
        self._ledger.assign(entry, groups, loads)
        return True

    def _has_room(self, load: GroupLoad) -> bool:
        return load.requests < self._limits.requests_per_group

    def _takes_restart(self, load: GroupLoad, entry: LedgerEntry) -> bool:
        fits = not load.restarting or load.restarting + entry.num_tokens <= self._limits.restart_tokens
        return fits and self._has_room(load)
