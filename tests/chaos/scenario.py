"""What a scenario is made of: a mesh, streams, events and checks, all of it data."""

from __future__ import annotations

import enum
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.chaos.checks import Check
from tests.chaos.history import PHASES, Phase

VOCAB = 4096  # of the demo model


class Role(enum.Enum):
    """Whom an event strikes, by what /mesh says at that moment."""

    EXPERTS = "a rank that hosts experts and leads no attention group"
    EXPERTS_ONLY = "a rank that hosts experts and has no attention"
    LEADER = "the leader of an attention group"
    PEER = "a rank of an attention group that does not lead it"
    FIRST = "rank 0"
    ANY = "any rank"
    SAME = "whom the event before struck"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that is done `at` seconds after the fault phase began."""

    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Signal(Event):
    """A signal to `count` ranks of a role at the same moment."""

    number: signal.Signals
    who: Role
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Slow(Event):
    """A rank gets only 1/factor of the processor time it could use, for so long."""

    who: Role
    factor: float
    for_s: float


@dataclass(frozen=True, kw_only=True)
class KillMpirun(Event):
    """A signal to mpirun that ends it."""

    number: signal.Signals


@dataclass(frozen=True, kw_only=True)
class KillFrontend(Event):
    """SIGKILL to the frontend."""


@dataclass(frozen=True, kw_only=True)
class CutLink(Event):
    """The link between the two hosts is down, for so long."""

    for_s: float


@dataclass(frozen=True, kw_only=True)
class Overload(Event):
    """A crowd of `factor` times as many clients as the scenario has streams, for so long."""

    factor: int
    for_s: float


Damage = Literal[
    "truncated shard", "flipped byte", "missing tensor", "another checkpoint", "another config", "unlinked"
]


@dataclass(frozen=True, kw_only=True)
class DamageCheckpoint(Event):
    """The checkpoint that the mesh was started from changes under it."""

    how: Damage


@dataclass(frozen=True, kw_only=True)
class StartFrom(Event):
    """Another mesh is started, from a damaged copy."""

    how: Damage


@dataclass(frozen=True, kw_only=True)
class FillDisk(Event):
    """The file system of the mesh's temporary folder has no byte left."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Streams that run all the time: so many clients, each with a request of its own that it sends again and again."""

    streams: int = 16
    tokens: tuple[int, int] = (60, 240)

    def requests(self) -> list[dict[str, Any]]:
        """Half of them greedy, half drawn with a seed; prompts of all lengths. Always the same."""
        draw = random.Random(4)
        return [self._request(index, draw) for index in range(self.streams)]

    def _request(self, index: int, draw: random.Random) -> dict[str, Any]:
        sampling = {"temperature": 0} if index % 2 == 0 else {"temperature": 0.9, "top_p": 0.95, "seed": 100 + index}
        return {
            "prompt": draw.choices(range(3, VOCAB), k=draw.choice((1, 8, 33, 100))),
            "max_tokens": draw.randint(*self.tokens),
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **sampling,
        }


# whole: all ranks are up again. degraded: it serves on with what is left. gone: it ends.
Outcome = Literal["whole", "degraded", "gone"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One row of the table: what is started, what is done to it, what it must show.

    `rival`: no faults, but the throughput of this mesh against another with other flags. `own_checkpoint`: it serves
    from a copy. `small_disk`: its temporary folder is a file system of its own. `two_hosts`: its ranks are spread over
    two network namespaces.
    """

    name: str
    row: str
    flags: tuple[str, ...]
    events: tuple[Event, ...] = ()
    checks: Mapping[Phase, Sequence[Check]] = field(default_factory=dict)
    outcome: Outcome = "whole"
    load: Load = Load()
    settle_s: float = 30.0
    recovered_s: float = 3.0
    rival: tuple[str, ...] | None = None
    own_checkpoint: bool = False
    small_disk: bool = False
    two_hosts: bool = False

    def all_checks(self) -> list[tuple[Phase, Check]]:
        return [(phase, check) for phase in PHASES for check in self.checks.get(phase, ())]


def candidates(role: Role, mesh: Mapping[str, Any]) -> list[int]:
    """The living ranks of a role, by the JSON of /mesh."""
    groups = [group for group in mesh["attention_groups"] if group]
    leaders = {group[0] for group in groups}
    members = {rank for group in groups for rank in group}
    experts = {rank["rank"] for rank in mesh["ranks"] if "expert" in rank["roles"]}
    up = {rank["rank"] for rank in mesh["ranks"] if rank["state"] == "up"}
    chosen = {
        Role.EXPERTS: experts - leaders,
        Role.EXPERTS_ONLY: experts - members,
        Role.LEADER: leaders,
        Role.PEER: members - leaders,
        Role.FIRST: {0},
        Role.ANY: up,
    }[role]
    return sorted(chosen & up)


def choose(role: Role, mesh: Mapping[str, Any], count: int, draw: random.Random) -> list[int]:
    """`count` different ranks of a role. LookupError where there are not so many."""
    found = candidates(role, mesh)
    if len(found) < count:
        raise LookupError(f"{count} wanted, but {found} is {role.value}")
    return sorted(draw.sample(found, count))
