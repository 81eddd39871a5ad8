"""Whom time accuses: who is suspect, and whose suspicion has become death. Part of membership; no I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh_config.mesh import MeshConfig
from moemesh.membership_records import TICK_SECONDS, MembershipSettings
from moemesh.rank_record import RankRecord
from moemesh.slowness import Effort, Slow, Slowness

KEPT = "; kept: the mesh cannot serve without it"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A suspect rank is dead. `alive`: its process may be, and would do harm. `slow`: that is all that is wrong."""

    record: RankRecord
    reason: str
    alive: bool
    slow: bool = False


class Detection:
    """Looks at `ranks`, which somebody else keeps, once in a tick."""

    def __init__(self, mesh: MeshConfig, ranks: Sequence[RankRecord], settings: MembershipSettings) -> None:
        self._mesh = mesh
        self._ranks = ranks
        self._settings = settings
        self._last_tick: float | None = None
        self._doubt_since: float | None = None
        self._slowness = Slowness()
        self._slow: Slow | None = None

    def note_effort(self, record: RankRecord, effort: Effort) -> None:
        """Its heart said what it does with its time."""
        if record.living:
            self._slowness.note(record.rank, effort)

    def compare(self, now: float, *, settled: bool, can_spare: Callable[[RankRecord], bool]) -> None:
        """See whether one is slower than the others. `settled`: nobody comes, goes or loads."""
        if not settled or not self._settings.fault_tolerance:
            self._slowness.begin_anew()
        slow = self._slowness.look(now)
        if slow is not None and slow.action == "replace" and not can_spare(self._ranks[slow.rank]):
            slow = Slow(slow.rank, slow.reason + KEPT, "keep")
        for record in self._ranks:
            record.slow = slow.reason if slow is not None and slow.rank == record.rank else ""
        self._slow = slow

    def excuse_itself(self, now: float) -> float:
        """What was not heard while the controller was away is nobody's fault; how long that was, 0 for not at all."""
        late_by = math.inf if self._last_tick is None else now - self._last_tick - TICK_SECONDS
        self._last_tick = now
        if late_by <= self._settings.own_lateness:
            return 0.0
        for record in self._ranks:
            record.shift(late_by, now)
        if self._doubt_since is not None:
            self._doubt_since = min(now, self._doubt_since + late_by)
        self._slowness.pass_over()
        return 0.0 if late_by == math.inf else late_by

    def verdicts(self, now: float) -> list[Verdict]:
        """Who is dead now, by comparison or by time."""
        return [*self._by_comparison(now), *self._by_time(now)]

    def _by_comparison(self, now: float) -> list[Verdict]:
        """One whose slowness has lasted."""
        slow, self._slow = self._slow, None
        if slow is None or slow.action != "replace":
            return []
        self._slowness.replaced(slow.rank, now)
        return [Verdict(self._ranks[slow.rank], slow.reason, alive=True, slow=True)]

    def _by_time(self, now: float) -> list[Verdict]:
        """Where most seem ill, the one who looks may be."""
        suspects = [record for record in self._ranks if record.state == "suspect"]
        if 2 * len(suspects) <= sum(record.living for record in self._ranks):
            self._doubt_since = None
        elif self._doubt_since is None:
            self._doubt_since = now
        if self._doubt_since is not None and now - self._doubt_since < self._settings.doubt:
            return []
        working = {r.rank for r in self._ranks if r.living and r.working and self._mesh.group_of(r.rank) is not None}
        found = []
        for record in suspects:
            if reason := lost_touch(record, now, self._settings):
                found.append(Verdict(record, reason, alive=False))
            elif reason := useless(record, now, self._settings, callers=working - {record.rank}):
                found.append(Verdict(record, reason, alive=True))
        return found


def suspicion(record: RankRecord, now: float, settings: MembershipSettings) -> str:
    """Why a living rank is to be suspected; "" for no reason."""
    if not settings.fault_tolerance:
        return ""
    silent = now - record.heard_at
    if silent > settings.suspect_after:
        return f"its heart has been silent for {silent:.1f} s"
    if record.late and not record.slow:
        return f"late for {', '.join(f'rank {reporter}' for reporter in sorted(record.late))}"
    still = now - record.progressed_at
    if record.working and still > settings.stuck_after:
        return f"its heart beats, its work has stood still for {still:.1f} s"
    return record.slow


def lost_touch(record: RankRecord, now: float, settings: MembershipSettings) -> str:
    """Why a suspect rank is dead although it may yet be heard of; "" while it is not."""
    silent = now - record.heard_at
    runs = record.seen_running_at is not None and now - record.seen_running_at <= settings.suspect_after
    if silent > (settings.starved_dead if runs else settings.silent_dead):
        return f"its heart has been silent for {silent:.1f} s"
    return ""


def useless(record: RankRecord, now: float, settings: MembershipSettings, *, callers: set[int]) -> str:
    """Why a suspect rank is to be replaced although it is alive; "" for no reason.

    `callers`: those that may have calls out to it now.
    """
    if record.late_since is None:
        return ""
    late_for, still = now - record.late_since, now - record.progressed_at
    if record.working and min(still, late_for) > settings.stuck_dead:
        return f"its heart beats, its work has stood still for {still:.1f} s, and peers wait for it"
    if late_for > settings.slow_dead and 2 * len(record.late.keys() & callers) >= max(1, len(callers)):
        return f"slow: late without pause for {late_for:.1f} s"
    return ""
