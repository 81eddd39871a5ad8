"""`moemesh plan MODEL`: what a mesh would need and whether it fits, and what the loss of each rank would cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from mesh_config import (
    MemoryPlan,
    MeshConfig,
    ModelConfig,
    Placement,
    available_memory,
    cache_bytes_per_token,
    count_parameters,
    coverage,
    load_model_config,
)
from mesh_config.memory_plan import format_bytes
from moemesh.mesh_plan import (
    CACHE_SHARE,
    check_quantization,
    expert_bytes_of,
    memory_of,
    mesh_of,
    placement_of,
)
from moemesh.options import GPU_MEMORY, PlanOptions

Shown = TypeVar("Shown")

GPUS_PER_HOST = 8
USABLE_GPU_MEMORY = 0.9
"""The rest is for CUDA itself and for what allocators cannot use."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What `plan_report` found: `lines` for people to read, `problems` for what keeps the mesh from being served."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "ok: this mesh fits" if self.ok else "this mesh does not fit:"
        return "\n".join([*self.lines, verdict, *(f"  {problem}" for problem in self.problems)])


@dataclass(frozen=True, kw_only=True)
class _Machines:
    """`hosts` are the ranks of each; `stores` the ranks that share `memory` bytes: those of a host, or one of a GPU."""

    hosts: tuple[range, ...]
    stores: tuple[range, ...]
    memory: int

    @property
    def of_ranks(self) -> tuple[str, ...]:
        return tuple(str(host) for host, ranks in enumerate(self.hosts) for _ in ranks)


def plan_report(options: PlanOptions) -> PlanReport:
    """The report on the mesh that `serve` would make of these options. Reads config.json only. Raises ConfigError."""
    model = load_model_config(options.model_folder)
    check_quantization(options, model)
    machines = _machines(options)
    device = "cpu" if options.gpu is None else "cuda"
    mesh = mesh_of(options, model, device=device, machines=machines.of_ranks)
    placement = placement_of(model, mesh)
    return _Report(options, model, mesh, placement, machines).make()


def _machines(options: PlanOptions) -> _Machines:
    ranks = options.ranks
    per_host = min(ranks, options.ranks_per_host or (ranks if options.gpu is None else GPUS_PER_HOST))
    hosts = tuple(range(first, min(first + per_host, ranks)) for first in range(0, ranks, per_host))
    if options.gpu is None:
        return _Machines(hosts=hosts, stores=hosts, memory=options.memory or available_memory())
    whole = options.memory or GPU_MEMORY[options.gpu]
    each = tuple(range(rank, rank + 1) for rank in range(ranks))
    return _Machines(hosts=hosts, stores=each, memory=int(whole * USABLE_GPU_MEMORY))


class _Report:
    """The lines of one report."""

    def __init__(
        self, options: PlanOptions, model: ModelConfig, mesh: MeshConfig, placement: Placement, machines: _Machines
    ) -> None:
        self._options = options
        self._model = model
        self._mesh = mesh
        self._placement = placement
        self._machines = machines

    def make(self) -> PlanReport:
        least = self._plans(replace(self._mesh, num_cache_blocks=self._blocks_of_a_sequence()))
        mesh = replace(self._mesh, num_cache_blocks=self._cache_blocks(least))
        plans = self._plans(mesh)
        lines = [*self._describe_mesh(), *self._describe_memory(plans, mesh.num_cache_blocks or 0)]
        return PlanReport(lines=(*lines, *self._describe_losses(plans)), problems=tuple(self._problems(least)))

    def _plans(self, mesh: MeshConfig) -> list[MemoryPlan]:
        return [memory_of(self._options, self._model, mesh, self._placement, rank) for rank in range(mesh.num_ranks)]

    def _blocks_of_a_sequence(self) -> int:
        return -(-self._mesh.max_model_len // self._mesh.block_size)

    def _cache_blocks(self, least: Sequence[MemoryPlan]) -> int:
        """As `serve` decides it: a share of the memory that is left, between one sequence and as many as may run."""
        one, per_block = self._blocks_of_a_sequence(), self._mesh.block_size * cache_bytes_per_token(self._model)
        if self._options.num_gpu_blocks_override is not None:
            return self._options.num_gpu_blocks_override
        if self._options.kv_cache_memory_bytes is not None:
            return max(1, self._options.kv_cache_memory_bytes // per_block)
        affordable = [
            int((self._left(least, store) + sum(least[rank].cache for rank in store)) * CACHE_SHARE) // attending
            for store in self._machines.stores
            if (attending := sum("attention" in self._mesh.roles(rank) for rank in store))
        ]
        return max(one, min(self._mesh.max_num_seqs * one, min(affordable) // per_block))

    def _left(self, plans: Sequence[MemoryPlan], store: Iterable[int]) -> int:
        return self._machines.memory - sum(plans[rank].total for rank in store)

    def _problems(self, least: Sequence[MemoryPlan]) -> Iterable[str]:
        for ranks, left in _runs([(store, self._left(least, store)) for store in self._machines.stores]):
            if left < 0:
                yield (
                    f"{ranks}: {format_bytes(-left)} more than the {format_bytes(self._machines.memory)} there are, "
                    "with the cache of a single sequence: use more ranks, a lower --max-model-len or fewer "
                    "--redundant-experts"
                )

    def _describe_mesh(self) -> Iterable[str]:
        model, mesh, counts = self._model, self._mesh, count_parameters(self._model)
        yield str(self._options.model_folder)
        yield _line(
            "model",
            f"{model.architecture}, {counts.total / 1e9:.2f}B parameters, {counts.active / 1e9:.2f}B active per token",
        )
        hosts = self._machines.hosts
        kind = f"{self._options.gpu} each" if self._options.gpu else "CPU"
        yield _line("ranks", f"{mesh.num_ranks} ({kind}) on {len(hosts)} host{'s' * (len(hosts) > 1)}")
        yield _line("attention", f"{len(mesh.groups)} groups of {mesh.attention_tp} ranks")
        copies = f", {mesh.redundant_experts} further copies" if mesh.redundant_experts else ""
        yield _line(
            "experts",
            f"{model.num_experts}{copies} in each of {len(model.moe_layers)} layers, "
            f"{format_bytes(expert_bytes_of(self._options, model))} each",
        )

    def _describe_memory(self, plans: Sequence[MemoryPlan], cache_blocks: int) -> Iterable[str]:
        shown = [
            (
                range(rank, rank + 1),
                f"{format_bytes(plan.total)} (experts {format_bytes(plan.experts)}, "
                f"other weights {format_bytes(plan.weights - plan.experts)}, cache {format_bytes(plan.cache)}, "
                f"workspace {format_bytes(plan.workspace)})",
            )
            for rank, plan in enumerate(plans)
        ]
        for ranks, text in _runs(shown):
            yield _line(ranks, text)
        yield _line("cache", f"{cache_blocks * self._mesh.block_size} tokens in each attention group")
        left = [(store, max(0, self._left(plans, store))) for store in self._machines.stores]
        where = "each GPU" if self._options.gpu else "each host"
        least = min(free for _, free in left)
        yield _line("left over", f"{format_bytes(least)} at least of {format_bytes(self._machines.memory)} on {where}")

    def _describe_losses(self, plans: Sequence[MemoryPlan]) -> Iterable[str]:
        each = expert_bytes_of(self._options, self._model)
        room: dict[int, int] = {}
        for store in self._machines.stores:
            hosting = [rank for rank in store if rank in self._mesh.expert_ranks]
            for rank in hosting:
                room[rank] = max(0, self._left(plans, store)) // each // len(hosting)
        losses = coverage(
            self._placement, room, expert_bytes=each, read_bandwidth=self._options.read_bandwidth, room=room
        )
        yield _line("what the loss of a rank would cost its experts", "")
        for ranks, loss in _runs([(range(rank, rank + 1), str(loss)) for rank, loss in losses.items()]):
            yield _line(f"  {ranks}", loss)


def _line(label: str, text: str) -> str:
    return f"  {label:<13} {text}".rstrip()


def _runs(shown: Iterable[tuple[range, Shown]]) -> Iterable[tuple[str, Shown]]:
    """Ranks that follow each other and are alike, in one line."""
    for value, alike in groupby(shown, key=lambda entry: entry[1]):
        ranks = [rank for part, _ in alike for rank in part]
        yield f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}", value
