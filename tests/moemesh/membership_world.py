"""A membership with a clock of its own, told event by event."""

from __future__ import annotations

from typing import Any, TypeVar

from mesh_config import MeshConfig, even_placement
from moemesh.membership import Membership
from moemesh.membership_records import (
    TICK_SECONDS,
    Event,
    Heartbeat,
    HelloSeen,
    Instruction,
    MembershipSettings,
    ReadySeen,
    Tick,
)
from moemesh.slowness import NO_EFFORT, Effort
from transport.life import Life
from transport.messages import GroupPulse

T = TypeVar("T")


class Mesh:
    """A membership with a clock, and hearts that beat unless they are `silent`."""

    def __init__(
        self,
        num_ranks: int = 4,
        *,
        attention_ranks: int | None = 2,
        tp: int = 1,
        redundant: int = 0,
        **settings: Any,
    ) -> None:
        mesh = MeshConfig(num_ranks=num_ranks, attention_ranks=attention_ranks, attention_tp=tp, max_model_len=64)
        placement = even_placement(4, (1,), mesh.expert_ranks, num_ranks, redundant=redundant)
        self.num_ranks = num_ranks
        self.now = 100.0
        self.silent: set[int] = set()
        self.working: set[int] = set()
        self.stuck: set[int] = set()
        self.waits: dict[int, list[int]] = {}
        self.starved: set[int] = set()
        self._efforts = [NO_EFFORT] * num_ranks
        self.progress = 0
        self.membership = Membership(mesh, placement, MembershipSettings(**settings))

    def tell(self, *events: Event) -> list[Instruction]:
        return [instruction for event in events for instruction in self.membership.handle(event, self.now)]

    def start(self) -> Mesh:
        for rank in range(self.num_ranks):
            self.tell(HelloSeen(Life(rank)), ReadySeen(Life(rank)))
        return self

    def wait(self, seconds: float, *also: Event) -> list[Instruction]:
        """Beats and ticks for a while, `also` before each tick."""
        out: list[Instruction] = []
        for _ in range(round(seconds / TICK_SECONDS)):
            self.now += TICK_SECONDS
            self.progress += 1
            for rank in range(self.num_ranks):
                if rank not in self.silent:
                    progress = 0 if rank in self.stuck else self.progress
                    life, working, effort = self.membership.present(rank), rank in self.working, self._go_on(rank)
                    out += self.tell(Heartbeat(life, progress, working, self.pulse(rank), effort))
            out += self.tell(*also, Tick())
        return out

    def pulse(self, rank: int) -> GroupPulse | None:
        """A member of the first group that `waits` for others."""
        generation = self.membership.view.groups[0].generation
        return GroupPulse(generation, 0, 0, self.waits[rank]) if rank in self.waits else None

    def _go_on(self, rank: int) -> Effort:
        """Who has too little of a processor is awake all the time; the others wait for it."""
        awake, share = (1.0, 0.03) if rank in self.starved else (0.1, 1.0)
        before = self._efforts[rank]
        added = Effort(TICK_SECONDS * awake, TICK_SECONDS * awake * share)
        self._efforts[rank] = Effort(before.awake + added.awake, before.processor + added.processor)
        return self._efforts[rank]

    def states(self) -> list[str]:
        return [record.state for record in self.membership.view.ranks]


def of(kind: type[T], instructions: list[Instruction]) -> list[T]:
    return [instruction for instruction in instructions if isinstance(instruction, kind)]
