"""What the loss of each rank would cost the experts, said before it is lost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from mesh_config.placement import Placement

ASSUMED_READ_BANDWIDTH = 2e9
"""Bytes of weights a second that a rank reads, checks and packs, where nobody has measured it."""

Cover = Literal["none needed", "replica", "reload", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How the experts of a lost rank come back, and when.

    `cover`: the rank hosts none; all have a replica; survivors load those that have none, `alone` of them in all,
    `num_bytes` and `seconds` each at most, if they start at once; or there is nobody who could.
    """

    cover: Cover
    alone: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        match self.cover:
            case "none needed":
                return "it hosts no experts"
            case "replica":
                return "covered by replicas"
            case "reload":
                return f"covered by reload: {self.alone} experts without a replica, about {self.seconds:.1f} s"
            case "nothing":
                return f"not covered: nobody has room for its {self.alone} experts without a replica"


NO_LOSS = Loss(cover="none needed")


def coverage(
    placement: Placement,
    living: Collection[int],
    *,
    expert_bytes: float,
    read_bandwidth: float = ASSUMED_READ_BANDWIDTH,
    room: Mapping[int, int] | None = None,
) -> dict[int, Loss]:
    """The Loss of each of the `living` ranks, if it alone were lost.

    `living` are the ranks that may host experts; `expert_bytes` the bytes of one, `read_bandwidth` bytes a second of
    one rank, `room` how many more experts each can hold (default: any number).
    """
    alone = dict.fromkeys(living, 0)
    hosting = set()
    for layer in placement.moe_layers:
        for hosts in placement.hosts_of(layer):
            there = [rank for rank in hosts if rank in alone]
            hosting.update(there)
            if len(there) == 1:
                alone[there[0]] += 1
    losses = {}
    for rank, count in alone.items():
        if not count:
            losses[rank] = Loss(cover="replica") if rank in hosting else NO_LOSS
            continue
        survivors = [other for other in alone if other != rank and (room is None or room.get(other, 0) > 0)]
        if not survivors or (room is not None and sum(room[other] for other in survivors) < count):
            losses[rank] = Loss(cover="nothing", alone=count)
            continue
        num_bytes = int(-(-count // len(survivors)) * expert_bytes)
        losses[rank] = Loss(cover="reload", alone=count, num_bytes=num_bytes, seconds=num_bytes / read_bandwidth)
    return losses
