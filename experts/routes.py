"""Whom to ask for an expert: the hosts that a placement names, less those that are gone, suspects last.

Shape legend: E logical experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from mesh_config.placement import Placement

SHORTEST_SUSPICION = 1.0
LONGEST_SUSPICION = 60.0


class Routes:
    """One rank's tables. Suspicion ends by itself, but lasts twice as long if it comes back soon; that of a dead one
    stays."""

    def __init__(self, placement: Placement, living: Mapping[int, int]) -> None:
        """`living`: the incarnation of each rank that lives."""
        self._num_ranks = placement.num_ranks
        self.living: Mapping[int, int] = living
        self._until: dict[int, float] = {}
        self._last: dict[int, tuple[float, float]] = {}  # how long the last suspicion lasted, and when it ends
        self.follow(placement, living)

    def follow(self, placement: Placement, living: Mapping[int, int]) -> None:
        """The mesh has changed. A rank that has gone, or has begun a new life, is suspect no longer."""
        renewed = [rank for rank in self._last if living.get(rank) != self.living.get(rank)]
        for rank in renewed:
            self._until.pop(rank, None)
            del self._last[rank]
        self._placement = placement
        self.living = dict(living)
        self._make_tables()

    @property
    def version(self) -> int:
        """Of the placement."""
        return self._placement.version

    @property
    def nobody(self) -> int:
        """What a table has for an expert without a living host: the number behind the last rank's."""
        return self._num_ranks

    def table(self, layer: int) -> Tensor:
        """Whom to ask for each expert of a layer: int32 [E], below `num_destinations`."""
        return self._tables[layer]

    def suspect(self, rank: int, now: float | None) -> None:
        """Ask others from now on, where there are others: for a while from `now`, or (None) as long as it lives."""
        known = rank in self._until
        if now is None:
            self._until[rank], self._last[rank] = inf, (inf, inf)
        elif not known:
            lasted, ended = self._last.get(rank, (0.0, -inf))
            lasts = min(max(SHORTEST_SUSPICION, 2 * lasted if now - ended < lasted else 0.0), LONGEST_SUSPICION)
            self._until[rank], self._last[rank] = now + lasts, (lasts, now + lasts)
        if not known or now is None:
            self._make_tables()

    def forgive(self, now: float) -> None:
        """End the suspicions whose time is over."""
        over = [rank for rank, until in self._until.items() if until <= now]
        for rank in over:
            del self._until[rank]
        if over:
            self._make_tables()

    def lost(self, rank: int) -> bool:
        """Whether a rank is gone, or suspect for as long as it lives: nothing comes from it any more."""
        return rank not in self.living or self._until.get(rank) == inf

    def host(self, layer: int, expert: int, besides: Collection[int] = ()) -> int | None:
        """Whom to ask for one expert, other than `besides`; None where there is nobody."""
        return self._best(self._placement.hosts_of(layer)[expert], besides)

    def _best(self, hosts: Sequence[int], besides: Collection[int] = ()) -> int | None:
        usable = [rank for rank in hosts if rank not in besides and not self.lost(rank)]
        return next((rank for rank in usable if rank not in self._until), usable[0] if usable else None)

    def _make_tables(self) -> None:
        best: dict[tuple[int, ...], int] = {}
        self._tables: dict[int, Tensor] = {}
        for layer in self._placement.moe_layers:
            hosts_E = self._placement.hosts_of(layer)
            for hosts in set(hosts_E) - best.keys():
                found = self._best(hosts)
                best[hosts] = self.nobody if found is None else found
            self._tables[layer] = torch.tensor([best[hosts] for hosts in hosts_E], dtype=torch.int32)
        self.num_destinations = self._num_ranks + (self.nobody in best.values())
