"""What membership remembers of one rank, and what that says of it. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moemesh.membership_records import LIVING, MembershipSettings, RankState
from transport.life import Life

MOST_FAILURES = 3


@dataclass(kw_only=True, eq=False)
class RankRecord:
    """One rank in its present life. Times are the controller's.

    `born`: the life that its process began as. `began`, `said_hello`: how far a new process has come; `spawner` was to
    start it. `hosting`: the experts that a life which does not serve yet says it has. `ended`: the process of this life
    is known to be gone. `failures`: deaths in a row, none of which came after a long time up; the next life does not
    begin before `retry_at`. `attempts`: lives in a row that never served.
    """

    rank: int
    incarnation: int = 0
    state: RankState = "loading"
    reason: str = "starting"
    since: float = 0.0
    host: str = ""
    born: int = 0
    began: bool = False
    said_hello: bool = False
    spawner: int | None = None
    ended: bool = False
    killed_at: float | None = None
    failures: int = 0
    attempts: int = 0
    retry_at: float = 0.0
    heard_at: float = 0.0
    seen_running_at: float | None = None
    progress: int = 0
    progressed_at: float = 0.0
    working: bool = False
    late_since: float | None = None
    late: dict[int, float] = field(default_factory=dict)
    hosting: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def life(self) -> Life:
        return Life(self.rank, self.incarnation)

    @property
    def living(self) -> bool:
        """It serves."""
        return self.state in LIVING

    @property
    def can_be_met(self) -> bool:
        """Its process takes part in the mesh, or will without being met."""
        return self.said_hello or self.born == 0

    def begin_life(self, now: float) -> None:
        """A new incarnation: nothing that was known of the one before holds."""
        self.incarnation += 1
        self.ended = self.working = False
        self.killed_at = self.seen_running_at = self.spawner = None
        self.hosting = {}
        self.progress = 0
        self.forgive(now)

    def begin_process(self, now: float, *, spawner: int | None) -> None:
        """A new incarnation, in a process that `spawner` is to start (None: the frontend)."""
        self.begin_life(now)
        self.born = self.incarnation
        self.began = self.said_hello = False
        self.spawner = spawner

    def forgive(self, now: float) -> None:
        """All deadlines begin anew."""
        self.heard_at = self.progressed_at = now
        self.late_since = None
        self.late.clear()

    def shift(self, seconds: float, now: float) -> None:
        """The controller was away for so long: nobody's silence lasted as long as it seems."""
        self.heard_at = min(now, self.heard_at + seconds)
        self.progressed_at = min(now, self.progressed_at + seconds)
        if self.late_since is not None:
            self.late_since = min(now, self.late_since + seconds)
        self.late = {reporter: min(now, at + seconds) for reporter, at in self.late.items()}

    def beat(self, progress: int, working: bool, now: float) -> None:
        """Its heart was heard."""
        self.heard_at = now
        # Work that begins counts as progress: an idle rank has none to show.
        if progress != self.progress or not (working and self.working):
            self.progressed_at = now
        self.progress, self.working = progress, working

    def note_late(self, reporter: int, now: float) -> None:
        """A peer waits for it in vain."""
        if self.late_since is None:
            self.late_since = now
        self.late[reporter] = now

    def forget_late(self, now: float, memory: float) -> None:
        """Reports that nobody has repeated do not count any more."""
        self.late = {reporter: at for reporter, at in self.late.items() if now - at <= memory}
        if not self.late:
            self.late_since = None


def suspicion(record: RankRecord, now: float, settings: MembershipSettings) -> str:
    """Why a living rank is to be suspected; "" for no reason."""
    if not settings.fault_tolerance:
        return ""
    silent = now - record.heard_at
    if silent > settings.suspect_after:
        return f"its heart has been silent for {silent:.1f} s"
    if record.late:
        return f"late for {', '.join(f'rank {reporter}' for reporter in sorted(record.late))}"
    still = now - record.progressed_at
    if record.working and still > settings.stuck_after:
        return f"its heart beats, its work has stood still for {still:.1f} s"
    return ""


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


def worth_waiting_for(record: RankRecord, settings: MembershipSettings) -> bool:
    """Whether a lost rank may soon be back. One whose lives fail again and again is started again, but not waited
    for."""
    if record.living or record.failures > MOST_FAILURES:
        return False
    fenced = not record.ended and record.killed_at is None
    return record.state == "joining" or fenced or settings.respawn
