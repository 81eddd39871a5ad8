"""Which ranks host which expert, per MoE layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mesh_config.errors import ConfigError
from mesh_config.replicas import Copies, spread_copies

Hosts = tuple[int, ...]
NOWHERE = -1


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`hosts[layer][e]` are the ranks that host logical expert e of MoE layer `layer`, whom to ask first in front.

    An expert without a host has an empty tuple. A change is a new version.
    """

    version: int
    num_ranks: int
    hosts: Mapping[int, tuple[Hosts, ...]] = field(repr=False)

    def __post_init__(self) -> None:
        for layer, hosts in self.hosts.items():
            for ranks in set(hosts):
                wrong = [rank for rank in ranks if not 0 <= rank < self.num_ranks]
                if wrong:
                    raise ConfigError(
                        f"placement of layer {layer}: rank {wrong[0]} is not among 0..{self.num_ranks - 1}"
                    )
                if len(set(ranks)) != len(ranks):
                    raise ConfigError(f"placement of layer {layer}: ranks {list(ranks)} host one expert twice")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.hosts)

    def hosts_of(self, layer: int) -> tuple[Hosts, ...]:
        """The ranks of each logical expert of `layer`, by expert id."""
        return self.hosts[layer]

    def ranks_of(self, layer: int) -> tuple[int, ...]:
        """Whom to ask for each logical expert of `layer`, by expert id; NOWHERE for one that has no host."""
        return tuple(hosts[0] if hosts else NOWHERE for hosts in self.hosts[layer])

    def experts_on(self, layer: int, rank: int) -> tuple[int, ...]:
        """The logical experts of `layer` on `rank`, ascending."""
        return self._by_rank[layer].get(rank, ())

    def experts_of(self, rank: int) -> dict[int, tuple[int, ...]]:
        """The logical experts on `rank`, of each layer where it has any."""
        return {layer: experts for layer in self.hosts if (experts := self.experts_on(layer, rank))}

    @cached_property
    def missing(self) -> dict[int, frozenset[int]]:
        """The logical experts that have no host, of each layer where there are any."""
        if () not in self._distinct_hosts:
            return {}
        nowhere = {
            layer: frozenset(e for e, ranks in enumerate(hosts) if not ranks) for layer, hosts in self.hosts.items()
        }
        return {layer: experts for layer, experts in nowhere.items() if experts}

    def without(self, dead: Collection[int]) -> Placement:
        """What is left when `dead` are gone; their experts may be nowhere then."""
        if not dead:
            return self
        left = {hosts: tuple(rank for rank in hosts if rank not in dead) for hosts in self._distinct_hosts}
        return self._changed({layer: tuple(left[ranks] for ranks in hosts) for layer, hosts in self.hosts.items()})

    def hosting(self, rank: int, experts: Mapping[int, Collection[int]]) -> Placement:
        """`rank` hosts `experts` of each layer as well, to be asked where nobody was before it."""
        added = {layer: set(experts.get(layer, ())).difference(self.experts_on(layer, rank)) for layer in self.hosts}
        return self._changed(
            {
                layer: tuple((*ranks, rank) if e in new else ranks for e, ranks in enumerate(self.hosts[layer]))
                for layer, new in added.items()
                if new
            }
        )

    def at_home(self, home: Placement) -> Placement:
        """Experts that have a host of `home`'s are at those alone again, in the order of `home`."""
        changes = {}
        for layer, hosts in self.hosts.items():
            back = {
                pair: tuple(rank for rank in pair[1] if rank in pair[0]) or pair[0]
                for pair in set(zip(hosts, home.hosts[layer], strict=True))
            }
            if any(ranks != pair[0] for pair, ranks in back.items()):
                changes[layer] = tuple(back[pair] for pair in zip(hosts, home.hosts[layer], strict=True))
        return self._changed(changes)

    def _changed(self, layers: Mapping[int, tuple[Hosts, ...]]) -> Placement:
        """With other hosts in these layers."""
        if not layers:
            return self
        return Placement(version=self.version + 1, num_ranks=self.num_ranks, hosts={**self.hosts, **layers})

    @cached_property
    def _distinct_hosts(self) -> frozenset[Hosts]:
        return frozenset(ranks for hosts in self.hosts.values() for ranks in hosts)

    @cached_property
    def _by_rank(self) -> dict[int, dict[int, tuple[int, ...]]]:
        by_rank: dict[int, dict[int, tuple[int, ...]]] = {}
        for layer, hosts in self.hosts.items():
            lists: dict[int, list[int]] = {}
            for expert, ranks in enumerate(hosts):
                for rank in ranks:
                    lists.setdefault(rank, []).append(expert)
            by_rank[layer] = {rank: tuple(experts) for rank, experts in lists.items()}
        return by_rank


def even_placement(
    num_experts: int,
    moe_layers: Sequence[int],
    expert_ranks: Sequence[int],
    num_ranks: int,
    *,
    redundant: int = 0,
    machine_of: Mapping[int, str] | None = None,
) -> Placement:
    """Contiguous ranges of experts, and `redundant` more copies per layer, never two of an expert on one rank, nor on
    one machine (`machine_of` rank; default: all on one) while another has room.

    Ranks are at most one apart in what they host; which ones take one more rotates with the layer. 10 experts on ranks
    (0, 1, 2, 3): the first MoE layer gives 3 3 2 2, the second 2 2 3 3, and so on, so that the totals of two ranks
    never differ by more than 1 either. No expert has two copies more than another.
    """
    count = len(expert_ranks)
    if not expert_ranks or len(set(expert_ranks)) != count:
        raise ConfigError(f"expert ranks {list(expert_ranks)}: at least one is needed, and each only once")
    assert 0 <= redundant <= num_experts * (count - 1), f"{redundant} copies, two of one expert on one rank"
    machines = tuple((machine_of or {}).get(rank, "") for rank in expert_ranks)
    # Layers whose larger ranks are the same are placed alike: there are at most as many patterns as ranks.
    patterns: dict[int, tuple[Hosts, ...]] = {}
    hosts: dict[int, tuple[Hosts, ...]] = {}
    remainder = (num_experts + redundant) % count
    for rotation, layer in enumerate(moe_layers):
        start = rotation * remainder % count if remainder else rotation % count if redundant else 0
        if start not in patterns:
            copies = _layer_copies(num_experts, redundant, start, machines)
            patterns[start] = tuple(tuple(expert_ranks[place] for place in places) for places in copies)
        hosts[layer] = patterns[start]
    return Placement(version=0, num_ranks=num_ranks, hosts=hosts)


def _layer_copies(num_experts: int, redundant: int, start: int, machines: Sequence[str]) -> Copies:
    """The places (indices of expert ranks) of each expert in a layer whose larger ranks begin with `start`."""
    count = len(machines)
    physical, more = divmod(num_experts + redundant, count)
    logical, first = divmod(num_experts, count)
    totals = [physical + ((place - start) % count < more) for place in range(count)]
    # Who takes one more of the logical experts takes one more in all, or there is room for it anyway.
    primaries = [logical + ((place - start) % count < first) for place in range(count)]
    ranges = [place for place, size in enumerate(primaries) for _ in range(size)]
    return spread_copies(ranges, totals, machines=machines, start=start)


def take_over(
    placement: Placement,
    living: Collection[int],
    *,
    room: Mapping[int, int] | None = None,
    refused: Mapping[tuple[int, int], Collection[int]] | None = None,
) -> dict[int, dict[int, tuple[int, ...]]]:
    """Who must load what, so that every expert has a living host: rank -> layer -> experts, ascending.

    `living` are the ranks that may host experts, `room` how many more each can hold (default: any number), `refused`
    by (layer, expert) who cannot take it (default: nobody); what nobody can take is not in the plan. Each expert goes
    to who hosts fewest, of the layer, then of all.
    """
    ranks = sorted(set(living))
    left = dict.fromkeys(ranks, 1 << 62) if room is None else {rank: room.get(rank, 0) for rank in ranks}
    total = {rank: sum(map(len, placement.experts_of(rank).values())) for rank in ranks}
    plan: dict[int, dict[int, list[int]]] = {}
    for layer in placement.moe_layers:
        orphans = [e for e, hosts in enumerate(placement.hosts_of(layer)) if not any(h in left for h in hosts)]
        here = {rank: len(placement.experts_on(layer, rank)) for rank in ranks}
        for expert in orphans:
            not_by = () if refused is None else refused.get((layer, expert), ())
            able = [rank for rank in ranks if left[rank] > 0 and rank not in not_by]
            if not able:
                continue
            rank = min(able, key=lambda r: (here[r], total[r], r))
            plan.setdefault(rank, {}).setdefault(layer, []).append(expert)
            here[rank] += 1
            total[rank] += 1
            left[rank] -= 1
    return {rank: {layer: tuple(experts) for layer, experts in layers.items()} for rank, layers in sorted(plan.items())}
