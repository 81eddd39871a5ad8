"""How a lost rank comes back: by a new process, when and by whom, and until when that is waited for. Part of
membership; no I/O, no clock.

    dead --ended, not before retry_at--> respawned by a survivor --begins, says hello, meets the others--> up
      ^                                        |
      +------does not come in time-------------+      each time by another survivor; given up after most_attempts

    all dead --their launcher has ended, not before one's retry_at--> all started again by the frontend
"""

from __future__ import annotations

from collections.abc import Sequence

from moemesh.membership_records import MembershipSettings
from moemesh.rank_record import RankRecord

MOST_FAILURES = 3


class Healing:
    """Decides over `ranks`, which somebody else keeps."""

    def __init__(self, ranks: Sequence[RankRecord], settings: MembershipSettings) -> None:
        self._ranks = ranks
        self._settings = settings
        self._launcher_ended = False

    @property
    def respawns(self) -> bool:
        """A lost process is replaced."""
        return self._settings.respawn and self._settings.fault_tolerance

    def may_respawn(self, record: RankRecord) -> bool:
        """A new process may be tried."""
        return self.respawns and record.attempts < self._settings.most_attempts

    def may_return(self) -> bool:
        """Some rank may yet become what is missing."""
        if self.all_lost:
            return self._settings.restarts and any(self.may_respawn(record) for record in self._ranks)
        if any(record.state == "joining" for record in self._ranks):
            return True
        if any(record.state == "dead" and not record.ended and record.killed_at is None for record in self._ranks):
            return True
        hosts = {record.host for record in self._ranks if record.living}
        lost = (record for record in self._ranks if record.state == "dead" and record.host in hosts)
        return any(self.may_respawn(record) for record in lost)

    def may_be_replaced(self, record: RankRecord) -> bool:
        """Should a living rank be lost, there is somebody to start a new process for it."""
        others = (other for other in self._ranks if other.living and other is not record)
        return self.may_respawn(record) and any(other.host == record.host for other in others)

    @property
    def nobody_may_come(self) -> bool:
        """Every lost rank is lost for good."""
        lost = [record for record in self._ranks if not record.living]
        return all(record.state == "dead" and record.ended and not self.may_respawn(record) for record in lost)

    def worth_waiting_for(self) -> bool:
        """Whether a lost rank may soon be back. One whose lives fail again and again is started again, but not waited
        for."""
        return any(self._soon_back(record) for record in self._ranks)

    def _soon_back(self, record: RankRecord) -> bool:
        if record.living or record.failures > MOST_FAILURES:
            return False
        fenced = not record.ended and record.killed_at is None
        return record.state == "joining" or fenced or self._settings.respawn

    def note_death(self, record: RankRecord, reason: str, now: float) -> str:
        """A rank that is not dead yet is about to be: from when on it may live again, and the reason in full."""
        settings = self._settings
        if record.state == "joining":
            record.attempts += 1
            if record.attempts >= settings.most_attempts:
                reason = f"{reason} (given up after {record.attempts} attempts)"
        if record.living and now - record.since >= settings.steady_after:
            record.failures = 0
        delay = settings.backoff * 2.0 ** (record.failures - 1) if record.failures else 0.0
        record.failures += 1
        record.retry_at = now + min(delay, settings.longest_backoff)
        return reason

    def readmits(self, record: RankRecord, now: float) -> bool:
        """A rank whose heart was just heard was fenced, and may come back in the process that it has."""
        fenced = record.state == "dead" and not record.ended and record.killed_at is None
        return fenced and now >= record.retry_at

    def grace_is_over(self, record: RankRecord, now: float) -> bool:
        """A fenced process that does not come back is killed."""
        return record.killed_at is None and now - record.since > self._settings.stop_grace

    def out_of_sight(self, record: RankRecord, now: float) -> bool:
        """Nobody has seen the killed process end, and nobody will; its life is fenced whatever it does."""
        return record.killed_at is not None and now - record.killed_at > self._settings.stop_grace

    def begin_process(self, record: RankRecord, now: float) -> bool:
        """Begin the next life of a rank whose process has ended, if it is time, in a process that `record.spawner` is
        to start: a survivor on the same host that is not at it. After a failure another one than before: it may have
        been the survivor's.
        """
        if not self.may_respawn(record) or now < record.retry_at:
            return False
        busy = {other.spawner for other in self._ranks if other.state == "joining" and not other.said_hello}
        there = [other for other in self._ranks if other.state == "up" and other.host == record.host]
        free = [other.rank for other in there if other.rank not in busy]
        if not free:
            return False
        record.begin_process(now, spawner=free[record.attempts % len(free)])
        return True

    @property
    def all_lost(self) -> bool:
        """No process is left, and none is to come."""
        return all(record.state == "dead" and record.ended for record in self._ranks)

    def note_launcher_ended(self) -> None:
        """Whoever started the ranks can start all of them again."""
        self._launcher_ended = True

    def begin_all(self, now: float) -> int | None:
        """Begin the next life of all ranks, if none is left and it is time; its incarnation, the same for all."""
        may_begin = self._launcher_ended and self.all_lost and any(self.may_respawn(record) for record in self._ranks)
        if not may_begin or now < min(record.retry_at for record in self._ranks):
            return None
        self._launcher_ended = False
        incarnation = 1 + max(record.incarnation for record in self._ranks)
        for record in self._ranks:
            record.begin_process(now, spawner=None, incarnation=incarnation)
        return incarnation

    @property
    def beginning_all(self) -> bool:
        """Some that were started with all others are not there yet: what is theirs is not to be taken over."""
        new = (record for record in self._ranks if record.state == "joining" and record.born == record.incarnation)
        return any(record.spawner is None for record in new)

    def given_up(self, record: RankRecord, now: float) -> str:
        """Why the new process of a joining rank is not waited for any longer; "" while it is. To be asked once: the
        end of its spawner is no fault of the newcomer."""
        settings, spawner, waiting = self._settings, record.spawner, now - record.since
        if record.said_hello:
            return ""
        if spawner is not None and not self._ranks[spawner].living:
            record.attempts -= 1
            record.failures = max(0, record.failures - 1)
            return f"rank {spawner}, which was to start it, is gone"
        if waiting > settings.hello_timeout:
            return f"the new process has not said hello for {waiting:.0f} s"
        if not record.began and waiting > settings.begin_timeout:
            return f"no new process has begun for {waiting:.0f} s"
        return ""

    def fell_silent(self, record: RankRecord, now: float) -> str:
        """Why a joining rank that has said hello is lost; "" while it is not."""
        silent = now - record.heard_at
        if record.said_hello and silent > self._settings.starved_dead:
            return f"its heart has been silent for {silent:.1f} s"
        return ""
