"""Which rank hosts which expert, per MoE layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mesh_config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`experts[layer][e]` is the rank that hosts logical expert e of MoE layer `layer`. A change is a new version."""

    version: int
    num_ranks: int
    experts: Mapping[int, tuple[int, ...]] = field(repr=False)

    def __post_init__(self) -> None:
        for layer, ranks in self.experts.items():
            wrong = [rank for rank in ranks if not 0 <= rank < self.num_ranks]
            if wrong:
                raise ConfigError(f"placement of layer {layer}: rank {wrong[0]} is not among 0..{self.num_ranks - 1}")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.experts)

    def ranks_of(self, layer: int) -> tuple[int, ...]:
        """The rank of each logical expert of `layer`, by expert id."""
        return self.experts[layer]

    def experts_on(self, layer: int, rank: int) -> tuple[int, ...]:
        """The logical experts of `layer` on `rank`, ascending."""
        return tuple(expert for expert, host in enumerate(self.experts[layer]) if host == rank)


def even_placement(
    num_experts: int, moe_layers: Sequence[int], expert_ranks: Sequence[int], num_ranks: int
) -> Placement:
    """Contiguous ranges of experts, at most one apart in size; which ranks take one more rotates with the layer.

    10 experts on ranks (0, 1, 2, 3): the first MoE layer gives 3 3 2 2, the second 2 2 3 3, and so on, so that the
    totals of two ranks never differ by more than 1 either.
    """
    if not expert_ranks or len(set(expert_ranks)) != len(expert_ranks):
        raise ConfigError(f"expert ranks {list(expert_ranks)}: at least one is needed, and each only once")
    experts = {layer: _contiguous(num_experts, expert_ranks, rotation) for rotation, layer in enumerate(moe_layers)}
    return Placement(version=0, num_ranks=num_ranks, experts=experts)


def _contiguous(num_experts: int, expert_ranks: Sequence[int], rotation: int) -> tuple[int, ...]:
    count = len(expert_ranks)
    base, remainder = divmod(num_experts, count)
    ranks: list[int] = []
    for index, rank in enumerate(expert_ranks):
        takes_one_more = (index - rotation * remainder) % count < remainder
        ranks += [rank] * (base + takes_one_more)
    return tuple(ranks)
