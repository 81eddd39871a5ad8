"""What membership remembers of one rank, and what that says of it. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moemesh.membership_records import LIVING, RankState, Transition
from transport.life import Life

_LEGAL: frozenset[tuple[RankState, RankState]] = frozenset(
    {
        ("loading", "up"),
        ("loading", "dead"),
        ("up", "suspect"),
        ("up", "dead"),
        ("suspect", "up"),
        ("suspect", "dead"),
        ("dead", "joining"),
        ("joining", "up"),
        ("joining", "dead"),
    }
)


@dataclass(kw_only=True, eq=False)
class RankRecord:
    """One rank in its present life. Times are the controller's.

    `born`: the life that its process began as. `began`, `said_hello`: how far a new process has come; `spawner` was to
    start it. `hosting`: the experts that a life which does not serve yet says it has. `ended`: the process of this life
    is known to be gone. `failures`: deaths in a row, none of which came after a long time up; the next life does not
    begin before `retry_at`. `attempts`: lives in a row that never served. `slow`: why it is believed to be, if so.
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
    slow: str = ""
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

    def move(self, state: RankState, reason: str, now: float) -> Transition:
        """Change the state, which may follow the present one."""
        before = self.state
        if (before, state) not in _LEGAL:
            raise AssertionError(f"{self} cannot become {state} ({reason})")
        if {before, state} != {"up", "suspect"}:
            self.since = now
        self.state, self.reason = state, reason
        return Transition(self.life, before, state, reason)

    def begin_life(self, now: float) -> None:
        """A new incarnation: nothing that was known of the one before holds."""
        self.incarnation += 1
        self.ended = self.working = False
        self.killed_at = self.seen_running_at = self.spawner = None
        self.hosting = {}
        self.progress = 0
        self.forgive(now)

    def begin_process(self, now: float, *, spawner: int | None, incarnation: int | None = None) -> None:
        """A new incarnation, in a process that `spawner` is to start (None: the frontend). By default the next one."""
        self.begin_life(now)
        if incarnation is not None:
            self.incarnation = incarnation
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
