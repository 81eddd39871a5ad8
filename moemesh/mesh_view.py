"""The controller's view of the mesh: its ranks, what state each is in, and what `/mesh` says of them. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mesh_config.coverage import NO_LOSS, Loss, coverage
from mesh_config.mesh import MeshConfig
from mesh_config.placement import Placement
from transport import messages

RankState = Literal["loading", "up", "dead"]


@dataclass(kw_only=True)
class RankRecord:
    """What is known of one rank. `stage`, `done` and `total` describe its loading."""

    rank: int
    state: RankState = "loading"
    pid: int | None = None
    incarnation: int = 0
    host: str = ""
    isa: str = ""
    num_threads: int = 0
    num_blocks: int = 0
    num_steps: float = 0.0
    stage: str = "starting"
    done: int = 0
    total: int = 0


class MeshView:
    """One record per rank, and the epoch that counts changes of the set of ranks that are up."""

    def __init__(self, mesh: MeshConfig, placement: Placement, *, expert_bytes: int, frontend_pid: int) -> None:
        self._mesh = mesh
        self._placement = placement
        self._expert_bytes = expert_bytes
        self._frontend_pid = frontend_pid
        self.epoch = 0
        self._ranks = {rank: RankRecord(rank=rank) for rank in range(mesh.num_ranks)}
        self._expert_load = {layer: [0] * len(placement.hosts_of(layer)) for layer in placement.moe_layers}

    @property
    def ready(self) -> bool:
        """Whether every rank is up."""
        return all(record.state == "up" for record in self._ranks.values())

    def known_ranks(self) -> list[int]:
        """Ranks that have said hello."""
        return [rank for rank, record in self._ranks.items() if record.pid is not None]

    def instruction_sets(self) -> dict[int, str]:
        """Instruction set of every rank that has said hello."""
        return {rank: self._ranks[rank].isa for rank in self.known_ranks()}

    def pids(self) -> dict[int, int]:
        """Process id of every rank that has said hello."""
        return {rank: pid for rank, record in self._ranks.items() if (pid := record.pid) is not None}

    def note_hello(self, hello: messages.Hello) -> None:
        record = self._ranks[hello.rank]
        record.pid, record.incarnation, record.host = hello.pid, hello.incarnation, hello.host
        record.isa, record.num_threads = hello.isa, hello.num_threads

    def note_progress(self, rank: int, stage: str, done: int, total: int) -> None:
        record = self._ranks[rank]
        record.stage, record.done, record.total = stage, done, total

    def note_ready(self, rank: int, num_blocks: int) -> None:
        record = self._ranks[rank]
        record.state, record.stage, record.num_blocks = "up", "", num_blocks
        self.epoch += 1

    def note_failed(self, rank: int) -> None:
        self._ranks[rank].state = "dead"
        self.epoch += 1

    def note_steps(self, rank: int, num_steps: float) -> bool:
        """Whether the rank has got on since it last said."""
        record = self._ranks[rank]
        moved, record.num_steps = num_steps != record.num_steps, num_steps
        return moved

    def note_expert_load(self, changes: Mapping[int, Sequence[int]]) -> None:
        """Add the tokens that a rank has routed to each expert since it last said."""
        for layer, counts in changes.items():
            total = self._expert_load[layer]
            for expert, count in enumerate(counts):
                total[expert] += count

    def loading_progress(self) -> tuple[int, int]:
        """Bytes loaded and bytes to load, over all ranks."""
        records = self._ranks.values()
        return sum(record.done for record in records), sum(record.total for record in records)

    def loading_detail(self) -> str:
        """One line on what is still being waited for."""
        loading = [record for record in self._ranks.values() if record.state != "up"]
        first = loading[0]
        progress = f" {first.done}/{first.total}" if first.total else ""
        return f"{len(loading)} of {len(self._ranks)} ranks are not up; rank {first.rank}: {first.stage}{progress}"

    def describe(self) -> dict[str, Any]:
        """The JSON of `/mesh`."""
        living = [rank for rank in self._mesh.expert_ranks if self._ranks[rank].state != "dead"]
        losses = coverage(self._placement, living, expert_bytes=self._expert_bytes)
        return {
            "epoch": self.epoch,
            "frontend_pid": self._frontend_pid,
            "ranks": [self._describe_rank(record, losses.get(record.rank, NO_LOSS)) for record in self._ranks.values()],
            "attention_groups": [list(group) for group in self._mesh.groups],
            "placement": {
                "version": self._placement.version,
                "experts": {
                    str(layer): [list(hosts) for hosts in self._placement.hosts_of(layer)]
                    for layer in self._placement.moe_layers
                },
            },
            "expert_load": {str(layer): list(counts) for layer, counts in self._expert_load.items()},
        }

    def _describe_rank(self, record: RankRecord, loss: Loss) -> dict[str, Any]:
        return {
            "rank": record.rank,
            "pid": record.pid,
            "incarnation": record.incarnation,
            "host": record.host,
            "roles": sorted(self._mesh.roles(record.rank)),
            "state": record.state,
            "attention_group": self._mesh.group_of(record.rank),
            "threads": record.num_threads,
            "instruction_set": record.isa,
            "cache_blocks": record.num_blocks,
            "loss": {
                "cover": loss.cover,
                "experts_without_replica": loss.alone,
                "reload_bytes": loss.num_bytes,
                "reload_seconds": loss.seconds,
            },
        }
