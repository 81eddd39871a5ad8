"""What the ranks have said of themselves, and what `/mesh` says of them. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh_config.arithmetic import Arithmetic, settled_arithmetic
from mesh_config.coverage import NO_LOSS, Loss, coverage
from mesh_config.mesh import MeshConfig
from moemesh.expert_homes import count_experts
from moemesh.membership import Membership
from transport import messages


@dataclass(kw_only=True)
class RankFacts:
    """What one rank has said. `stage`, `done` and `total` describe its loading."""

    rank: int
    pid: int | None = None
    host: str = ""
    isa: str = ""
    num_threads: int = 0
    num_blocks: int = 0
    num_steps: float = 0.0
    stage: str = "starting"
    done: int = 0
    total: int = 0


class MeshView:
    """The facts of each rank, beside the state that membership gives it.

    `arithmetic`: what the mesh computes in; "auto" until all ranks have said hello once.
    """

    def __init__(self, mesh: MeshConfig, membership: Membership, *, expert_bytes: int, frontend_pid: int) -> None:
        self._mesh = mesh
        self._membership = membership
        self._expert_bytes = expert_bytes
        self._frontend_pid = frontend_pid
        self.arithmetic: Arithmetic = mesh.arithmetic
        self._ranks = {rank: RankFacts(rank=rank) for rank in range(mesh.num_ranks)}
        placement = membership.placement
        self._expert_load = {layer: [0] * len(placement.hosts_of(layer)) for layer in placement.moe_layers}

    def known_ranks(self) -> list[int]:
        """Ranks that have said hello."""
        return [rank for rank, facts in self._ranks.items() if facts.pid is not None]

    def place_on_host(self, rank: int) -> tuple[int, int]:
        """Its number among the ranks of its host, and how many they are."""
        host = self._ranks[rank].host
        there = [facts.rank for facts in self._ranks.values() if facts.host == host]
        return there.index(rank), len(there)

    def instruction_sets(self) -> dict[int, str]:
        """Instruction set of every rank that has said hello."""
        return {rank: self._ranks[rank].isa for rank in self.known_ranks()}

    def note_hello(self, hello: messages.Hello) -> None:
        facts = RankFacts(rank=hello.rank, pid=hello.pid, host=hello.host)
        facts.isa, facts.num_threads = hello.isa, hello.num_threads
        self._ranks[hello.rank] = facts
        known = self.instruction_sets()
        if len(known) == self._mesh.num_ranks:
            self.arithmetic = settled_arithmetic(self.arithmetic, known.values())

    def note_progress(self, rank: int, stage: str, done: int, total: int) -> None:
        facts = self._ranks[rank]
        facts.stage, facts.done, facts.total = stage, done, total

    def note_ready(self, rank: int, num_blocks: int) -> None:
        facts = self._ranks[rank]
        facts.stage, facts.num_blocks = "", num_blocks

    def note_steps(self, rank: int, num_steps: float) -> bool:
        """Whether the rank has got on since it last said."""
        facts = self._ranks[rank]
        moved, facts.num_steps = num_steps != facts.num_steps, num_steps
        return moved

    def note_expert_load(self, changes: Mapping[int, Sequence[int]]) -> None:
        """Add the tokens that a rank has routed to each expert since it last said."""
        for layer, counts in changes.items():
            total = self._expert_load[layer]
            for expert, count in enumerate(counts):
                total[expert] += count

    def loading_progress(self) -> tuple[int, int]:
        """Bytes loaded and bytes to load, over all ranks."""
        facts = self._ranks.values()
        return sum(rank.done for rank in facts), sum(rank.total for rank in facts)

    def loading_detail(self) -> str:
        """One line on what is still being waited for."""
        states = self._membership.view.ranks
        loading = [rank for rank, record in enumerate(states) if record.state != "up"]
        first = self._ranks[loading[0]]
        progress = f" {first.done}/{first.total}" if first.total else ""
        return f"{len(loading)} of {len(states)} ranks are not up; rank {first.rank}: {first.stage}{progress}"

    def describe(self) -> dict[str, Any]:
        """The JSON of `/mesh`."""
        view, homes = self._membership.view, self._membership.homes
        placement = homes.placement
        losses = coverage(placement, self._membership.expert_hosts(), expert_bytes=self._expert_bytes)
        return {
            "epoch": view.epoch,
            "frontend_pid": self._frontend_pid,
            "arithmetic": self.arithmetic,
            "ranks": [self._describe_rank(rank, losses.get(rank, NO_LOSS)) for rank in self._ranks],
            "attention_groups": [list(group) for group in self._mesh.groups],
            "groups": [{"generation": group.generation, "members": list(group.members)} for group in view.groups],
            "placement": {
                "version": placement.version,
                "experts": {
                    str(layer): [list(hosts) for hosts in placement.hosts_of(layer)] for layer in placement.moe_layers
                },
                "missing": homes.missing,
                "loading": {str(rank): count_experts(order) for rank, order in homes.orders.items()},
                "problems": {str(rank): problem for rank, problem in homes.problems.items()},
            },
            "expert_load": {str(layer): list(counts) for layer, counts in self._expert_load.items()},
        }

    def _describe_rank(self, rank: int, loss: Loss) -> dict[str, Any]:
        facts, record = self._ranks[rank], self._membership.view.ranks[rank]
        return {
            "rank": rank,
            "pid": facts.pid,
            "incarnation": record.incarnation,
            "host": facts.host,
            "roles": sorted(self._mesh.roles(rank)),
            "state": record.state,
            "reason": record.reason,
            "attention_group": self._mesh.group_of(rank),
            "threads": facts.num_threads,
            "instruction_set": facts.isa,
            "cache_blocks": facts.num_blocks,
            "loss": {
                "cover": loss.cover,
                "experts_without_replica": loss.alone,
                "reload_bytes": loss.num_bytes,
                "reload_seconds": loss.seconds,
            },
        }
