"""Where each expert is, and who is to load those that no living rank has. Pure decisions; times are arguments.

    at home --its last host is lost--> nowhere --a survivor has loaded it--> taken over --a first host is back--> home
                                        |   ^
                                        +---+  the survivor could not: another one is asked, all again after a while

An expert is asked for where the placement says, and the placement changes after the loading, never before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mesh_config.placement import Placement, take_over

Experts = Mapping[int, Sequence[int]]
"""Logical experts by MoE layer."""
Orders = Mapping[int, Mapping[int, tuple[int, ...]]]
"""Experts that a rank is to load besides those that the placement gives it, by rank and layer."""

RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 60.0


class ExpertHomes:
    """The placement in force and the orders to those who load. `home` is the placement of the start."""

    def __init__(self, home: Placement) -> None:
        self._home = home
        self.placement = home
        self.orders: Orders = {}
        self.problems: dict[int, str] = {}
        """Why ranks could not load what they were asked to, the last time."""
        self._refused: dict[tuple[int, int], set[int]] = {}
        self._retry_at = 0.0
        self._retry_after = RETRY_SECONDS
        self._able: frozenset[int] = frozenset()
        self._changed = False

    @property
    def missing(self) -> int:
        """Experts that no living rank has, over all layers."""
        return count_experts(self.placement.missing)

    @property
    def stranded(self) -> bool:
        """Some of them are loaded by nobody either."""
        return self.missing > sum(map(count_experts, self.orders.values()))

    def lose(self, rank: int) -> None:
        """The life of a rank is over, with all that it had and could not do."""
        if self.placement.experts_of(rank):
            self.placement = self.placement.without({rank})
        self.orders = {other: order for other, order in self.orders.items() if other != rank}
        self.problems.pop(rank, None)
        for ranks in self._refused.values():
            ranks.discard(rank)
        self._changed = True

    def host(self, rank: int, experts: Experts) -> None:
        """A rank that serves can answer for these experts."""
        self.placement = self.placement.hosting(rank, experts).at_home(self._home)
        self._changed = True

    def refuse(self, rank: int, experts: Experts, problem: str, now: float) -> None:
        """A rank could not load these experts."""
        self.problems[rank] = problem
        self._retry_at = now + self._retry_after
        for layer, some in experts.items():
            for expert in some:
                self._refused.setdefault((layer, expert), set()).add(rank)
        self._changed = True

    def assign(self, able: Collection[int], now: float) -> dict[int, int]:
        """Have everything loaded that nobody has, by the ranks that are `able` to; how many more each is to load."""
        if self._refused and self.stranded and now >= self._retry_at:
            self._retry_after = min(2 * self._retry_after, LONGEST_RETRY_SECONDS)
            self._refused.clear()
        elif not self._changed and self._able == frozenset(able):
            return {}
        self._changed, self._able = False, frozenset(able)
        if not self.placement.missing:
            self._refused.clear()
            self.problems.clear()
            self._retry_after = RETRY_SECONDS
        orders = {rank: self._left_of(rank, order) for rank, order in self.orders.items() if rank in self._able}
        promised = self.placement
        for rank, order in orders.items():
            promised = promised.hosting(rank, order)
        new = take_over(promised, self._able, refused=self._refused) if promised.missing else {}
        for rank, more in new.items():
            orders[rank] = _together(orders.get(rank, {}), more)
        self.orders = {rank: order for rank, order in orders.items() if order}
        return {rank: count_experts(more) for rank, more in new.items()}

    def _left_of(self, rank: int, order: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """What of an order is still to be done."""
        left = {
            layer: tuple(
                expert
                for expert in experts
                if expert in self.placement.missing.get(layer, ())
                and rank not in self._refused.get((layer, expert), ())
            )
            for layer, experts in order.items()
        }
        return {layer: experts for layer, experts in left.items() if experts}


def count_experts(experts: Mapping[int, Collection[int]]) -> int:
    """Over all layers."""
    return sum(map(len, experts.values()))


def _together(one: Mapping[int, tuple[int, ...]], other: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted({*one.get(layer, ()), *other.get(layer, ())})) for layer in {**one, **other}}
