"""What the mesh is: its ranks, their roles, the attention groups and the limits of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mesh_config.arithmetic import Arithmetic
from mesh_config.errors import ConfigError
from mesh_config.model_shape import ModelConfig

Role = Literal["attention", "expert"]

MAX_RANKS = 256
MAX_DEFAULT_TP = 8
BLOCK_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """A mesh of `num_ranks` ranks; validated at construction, immutable.

    `attention_ranks` = A makes the first A ranks attention only and the others expert only; None gives every rank both
    roles. `attention_tp` consecutive attention ranks form a group. `redundant_experts` are copies of experts in each
    MoE layer beyond one of each. `max_num_batched_tokens` and `max_num_seqs` bound a step of one group; `max_model_len`
    a sequence, prompt and output together. `num_cache_blocks` per rank is None where the free memory decides.
    `prefix_caching`: sequences with equal beginnings share the cache of these. `prefill_attention`: the form that
    positions of a prompt take, generated ones are always absorbed. `arithmetic`: see kernels/runtime.py; auto until all
    ranks of the start have said what their processors have. `machines` names the host of each rank; empty: all are on
    one.
    """

    num_ranks: int = 1
    attention_tp: int = 1
    attention_ranks: int | None = None
    max_model_len: int
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256
    num_cache_blocks: int | None = None
    redundant_experts: int = 0
    combine: Literal["exact", "compact"] = "exact"
    expert_hold: Literal["auto", "on", "off"] = "auto"
    micro_batches: Literal["auto"] | int = "auto"
    credit_window: int = 16
    prefix_caching: bool = True
    prefill_attention: Literal["absorbed", "expanded"] = "absorbed"
    arithmetic: Arithmetic = "float32"
    block_size: int = BLOCK_SIZE
    device: Literal["cpu", "cuda"] = "cpu"
    machines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise ConfigError(f"ranks = {self.num_ranks}: a mesh has 1 to {MAX_RANKS} ranks")
        self._check_attention()
        self._check_limits()
        _check_choice("combine", self.combine, ("exact", "compact"))
        _check_choice("prefill_attention", self.prefill_attention, ("absorbed", "expanded"))
        _check_choice("arithmetic", self.arithmetic, ("auto", "float32", "bf16x3"))
        _check_choice("expert_hold", self.expert_hold, ("auto", "on", "off"))
        _check_choice("micro_batches", self.micro_batches, ("auto", 1, 2))
        _check_choice("block_size", self.block_size, (BLOCK_SIZE,))
        _check_choice("device", self.device, ("cpu", "cuda"))
        if self.machines and len(self.machines) != self.num_ranks:
            raise ConfigError(f"machines of {len(self.machines)} ranks are named, there are {self.num_ranks}")

    def _check_attention(self) -> None:
        a = self.attention_ranks
        if a is not None and not 1 <= a < self.num_ranks:
            raise ConfigError(
                f"attention-ranks = {a} of {self.num_ranks} ranks leaves no rank for "
                f"{'attention' if a < 1 else 'the experts'}: choose 1 to {self.num_ranks - 1}, "
                "or leave it out to give every rank both roles"
            )
        if self.attention_tp < 1 or self.num_attention_ranks % self.attention_tp:
            divisors = [t for t in range(1, self.num_attention_ranks + 1) if self.num_attention_ranks % t == 0]
            raise ConfigError(
                f"attention-tp = {self.attention_tp} does not divide the {self.num_attention_ranks} attention ranks: "
                f"choose one of {', '.join(map(str, divisors))}"
            )

    def _check_limits(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "credit_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.redundant_experts < 0:
            raise ConfigError(f"redundant-experts = {self.redundant_experts}: at least 0 is needed")
        if self.num_cache_blocks is not None and self.num_cache_blocks < 1:
            raise ConfigError(f"num_cache_blocks = {self.num_cache_blocks}: at least 1 is needed")

    @property
    def num_attention_ranks(self) -> int:
        return self.num_ranks if self.attention_ranks is None else self.attention_ranks

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """The ranks that host experts, ascending."""
        return tuple(range(self.attention_ranks or 0, self.num_ranks))

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each attention group; the first of a group leads it."""
        starts = range(0, self.num_attention_ranks, self.attention_tp)
        return tuple(tuple(range(start, start + self.attention_tp)) for start in starts)

    def beside(self, rank: int) -> tuple[int, ...]:
        """The ranks on the host of `rank`, itself among them."""
        ranks = tuple(range(self.num_ranks))
        return tuple(r for r in ranks if self.machines[r] == self.machines[rank]) if self.machines else ranks

    def roles(self, rank: int) -> frozenset[Role]:
        roles: set[Role] = set()
        if rank < self.num_attention_ranks:
            roles.add("attention")
        if rank in self.expert_ranks:
            roles.add("expert")
        return frozenset(roles)

    def group_of(self, rank: int) -> int | None:
        """The index in `groups` of the rank's attention group; None for a rank with experts only."""
        return rank // self.attention_tp if rank < self.num_attention_ranks else None

    def check_model(self, model: ModelConfig) -> None:
        """ConfigError where this mesh cannot serve `model`."""
        shards = model.num_logical_shards
        if shards % self.attention_tp:
            supported = ", ".join(str(2**i) for i in range(shards.bit_length()))
            raise ConfigError(
                f"attention-tp = {self.attention_tp} does not divide the {shards} shards of the model's "
                f"{model.num_heads} attention heads: choose one of {supported}"
            )
        if self.max_model_len > model.max_position_embeddings:
            raise ConfigError(
                f"max-model-len = {self.max_model_len} is above the model's max_position_embeddings = "
                f"{model.max_position_embeddings}: lower it"
            )
        self._check_redundancy(model)

    def _check_redundancy(self, model: ModelConfig) -> None:
        count = len(self.expert_ranks)
        most = model.num_experts * (count - 1) if model.moe_layers else 0
        if self.redundant_experts > most:
            raise ConfigError(
                f"redundant-experts = {self.redundant_experts}: {count} ranks can hold at most {most} further copies "
                f"of the {model.num_experts} experts of a layer, one of each on a rank: lower it, or use more ranks"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MeshConfig:
        """The inverse of `to_dict`; an unknown key is an error."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"mesh configuration: unknown field {unknown[0]}")
        return cls(**{**values, "machines": tuple(values.get("machines", ()))})


def default_attention_tp(model: ModelConfig, attention_ranks: int, ranks_on_host: int) -> int:
    """The ranks of a host, at most 8, reduced until it divides the heads' shards and the number of attention ranks."""
    tp = max(1, min(ranks_on_host, attention_ranks, MAX_DEFAULT_TP))
    while model.num_logical_shards % tp or attention_ranks % tp:
        tp -= 1
    return tp


def make_mesh(model: ModelConfig, **fields: Any) -> MeshConfig:
    """A MeshConfig checked against `model`. `fields` are MeshConfig's; those that are None take their defaults,
    `attention_tp` and `max_model_len` from the model."""
    given = {name: value for name, value in fields.items() if value is not None}
    given.setdefault("max_model_len", model.max_position_embeddings)
    if "attention_tp" not in given:
        without = MeshConfig.from_dict(given)
        fewest = min(len(without.beside(rank)) for rank in range(without.num_ranks))
        given["attention_tp"] = default_attention_tp(model, without.num_attention_ranks, fewest)
    mesh = MeshConfig.from_dict(given)
    mesh.check_model(model)
    return mesh


def _check_choice(name: str, value: object, supported: tuple[object, ...]) -> None:
    if value not in supported:
        raise ConfigError(f"{name} = {value}: supported here: {', '.join(map(str, supported))}")
