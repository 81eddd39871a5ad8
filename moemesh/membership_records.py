"""What membership is told, what it says is to be done, and the view that it publishes. Plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mesh_config.placement import Placement
from moemesh.expert_homes import Orders
from moemesh.slowness import NO_EFFORT, Effort
from transport.life import Life
from transport.messages import GroupPulse

RankState = Literal["loading", "up", "suspect", "dead", "joining"]
"""`suspect` ranks are members still, asked as before and hedged; `dead` ones are fenced: nothing of them counts."""

LIVING: frozenset[RankState] = frozenset({"up", "suspect"})
"""The states in which a rank serves."""


# --- the view


@dataclass(frozen=True, kw_only=True, slots=True)
class RankView:
    """One rank, and why it is in its state. `born`: the incarnation that its process began as; -1 while there is none
    that others can meet."""

    incarnation: int
    state: RankState
    reason: str = ""
    born: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupView:
    """An attention group: `members`, the leader first, or () while it computes nothing.

    `generation` grows when the members, or the life of one of them, change, or when the step under way is to be run
    again. `since`: the generation that began with an empty cache; members that were there all the time come first and
    have what was cached since.
    """

    generation: int
    members: tuple[int, ...]
    since: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Who is in the mesh; ranks and groups by number. A later view has a higher epoch."""

    epoch: int
    ranks: tuple[RankView, ...]
    groups: tuple[GroupView, ...]

    def living(self) -> tuple[int, ...]:
        """Ranks that serve."""
        return tuple(rank for rank, record in enumerate(self.ranks) if record.state in LIVING)

    def listening(self) -> tuple[int, ...]:
        """Ranks that follow the view: those that serve, and those about to."""
        joining = (rank for rank, record in enumerate(self.ranks) if record.state == "joining" and record.born >= 0)
        return (*self.living(), *joining)


# --- events. Each names the lives it is about; one about another life than the present one changes nothing.


@dataclass(frozen=True, slots=True)
class ProcessBegan:
    """A rank's process is there, and does not take part yet."""

    life: Life


@dataclass(frozen=True, slots=True)
class HelloSeen:
    """A rank takes part, on this host: it can be told what to load, and others can meet it."""

    life: Life
    host: str = ""


@dataclass(frozen=True, slots=True)
class ReadySeen:
    """A rank can compute."""

    life: Life


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank's heart beats. `progress` counts what its engine has done; `working`: it has something to do. `group`: how
    far it has got in its attention group."""

    life: Life
    progress: int
    working: bool
    group: GroupPulse | None = None
    effort: Effort = NO_EFFORT


@dataclass(frozen=True, slots=True)
class PeerLost:
    """MPI told the reporter that the peer's process has failed."""

    reporter: Life
    peer: Life


@dataclass(frozen=True, slots=True)
class PeerLate:
    """The peer missed the deadline of a call of the reporter's."""

    reporter: Life
    peer: Life


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The rank's process is gone: seen by the controller itself, on its own host."""

    life: Life


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """What became of a `Look`: the process is there, and `stopped` by a signal or not."""

    life: Life
    stopped: bool


@dataclass(frozen=True, slots=True)
class RankFailed:
    """The rank itself says that it cannot go on."""

    life: Life
    error: str


@dataclass(frozen=True, slots=True)
class HostingSeen:
    """The rank can answer for these experts of each layer, whether or not it could before. Others it was to load and
    could not: `refused`, for what `problem` says."""

    life: Life
    experts: Mapping[int, Sequence[int]]
    refused: Mapping[int, Sequence[int]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class UnfitSeen:
    """The rank cannot be in its attention group as it is in that generation."""

    life: Life
    generation: int
    error: str


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """The process of a life that was to begin could not be started."""

    life: Life
    error: str


@dataclass(frozen=True, slots=True)
class RanksEnded:
    """All processes have ended, and with them what started them. That can be started again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. To come every `TICK_SECONDS`: only here are deadlines looked at."""


Event = (
    ProcessBegan
    | HelloSeen
    | ReadySeen
    | Heartbeat
    | PeerLost
    | PeerLate
    | ProcessEnded
    | ProcessSeen
    | RankFailed
    | HostingSeen
    | UnfitSeen
    | SpawnFailed
    | RanksEnded
    | Tick
)


# --- instructions


@dataclass(frozen=True, slots=True)
class PublishView:
    """Tell every rank that serves. `orders`: by rank, what it is to load."""

    view: View
    placement: Placement
    orders: Orders


@dataclass(frozen=True, slots=True)
class RestartGroup:
    """The group has lost its cache: its sequences are to be computed again, elsewhere or when it is back."""

    group: int
    reason: str


@dataclass(frozen=True, slots=True)
class Regroup:
    """The group goes on with other members or runs its step again, and its sequences with what is cached of them.

    `lost`: a member was lost while it computed them; otherwise one has come, or a frame was lost.
    """

    group: int
    reason: str
    lost: bool


@dataclass(frozen=True, slots=True)
class Look:
    """Look at the process of a rank, if it is on this host, and say ProcessSeen or ProcessEnded."""

    life: Life


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL the process of a rank, if it is on this host."""

    life: Life


@dataclass(frozen=True, slots=True)
class Readmit:
    """Tell a rank that was fenced and is alive to drop all sequences and go on as `incarnation`."""

    life: Life
    incarnation: int


@dataclass(frozen=True, slots=True)
class Respawn:
    """Have a new process started as `life`, `by` a surviving rank."""

    life: Life
    by: int


@dataclass(frozen=True, slots=True)
class RestartRanks:
    """Nobody is left: start the processes of all ranks again, each as `incarnation`."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class FailMesh:
    """The mesh can serve no longer; said once."""

    reason: str


@dataclass(frozen=True, slots=True)
class Transition:
    """For the log and the metrics: a rank has changed its state."""

    life: Life
    before: RankState
    after: RankState
    reason: str


@dataclass(frozen=True, slots=True)
class TookOver:
    """For the log and the metrics: a rank has loaded so many experts that no other had, or could not, and why."""

    life: Life
    num_loaded: int
    num_refused: int
    problem: str


@dataclass(frozen=True, slots=True)
class GaveUpSlow:
    """For the metrics: a rank was given up for its slowness alone."""

    life: Life


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    text: str


Instruction = (
    PublishView
    | RestartGroup
    | Regroup
    | Look
    | Kill
    | Readmit
    | Respawn
    | RestartRanks
    | FailMesh
    | Transition
    | TookOver
    | GaveUpSlow
    | Note
)


# --- settings

TICK_SECONDS = 0.05
BEAT_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class MembershipSettings:
    """All times in seconds.

    A rank is suspect when its heart is silent for `suspect_after`, when a peer has reported it late within
    `late_memory`, or when its heart beats but its work has stood still for `stuck_after`. A suspect one is dead when

    - its heart is silent for `silent_dead`, or for `starved_dead` where its process was seen, and not as stopped,
    - or it is late without pause for `slow_dead` in the eyes of at least half of its peers, or for `stuck_dead` without
      progress,

    but not while more than half of the mesh is suspect, at most for `doubt`. It is dead at once when its process has
    ended or is stopped. One that is alive may come back, as a new life, until `stop_grace` is over; then it is killed.

    A lost process is replaced at once, with `backoff`, doubled each time up to `longest_backoff`, from the second
    death in a row on of which none came after `steady_after` of service. The new one must begin within
    `begin_timeout` and say hello within `hello_timeout`. After `most_attempts` in a row that never served it is given
    up. When no rank is left, all are started again where the frontend has started them: it then `restarts`.

    Without `fault_tolerance` nobody is suspected, and a lost process is the end of the mesh.
    """

    fault_tolerance: bool = True
    respawn: bool = True
    restarts: bool = False
    stop_grace: float = 15.0
    suspect_after: float = 0.4
    silent_dead: float = 1.5
    starved_dead: float = 10.0
    stuck_after: float = 2.0
    stuck_dead: float = 10.0
    slow_dead: float = 5.0
    late_memory: float = 1.0
    own_lateness: float = 0.2
    doubt: float = 3.0
    begin_timeout: float = 30.0
    hello_timeout: float = 60.0
    backoff: float = 1.0
    longest_backoff: float = 60.0
    steady_after: float = 3.0
    most_attempts: int = 5

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, bool) and value < 0:
                raise ValueError(f"{item.name} must not be negative, is {value}")
