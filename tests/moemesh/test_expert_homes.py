"""Whatever ranks do, every expert is hosted, ordered from one who lives, or refused by all of them."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mesh_config import even_placement
from moemesh.expert_homes import LONGEST_RETRY_SECONDS, ExpertHomes

RANKS = 4
ranks = st.integers(0, RANKS - 1)


class Story(RuleBasedStateMachine):
    """Ranks die, come back, load and refuse in any order."""

    @initialize(num_experts=st.integers(1, 9), data=st.data())
    def begin(self, num_experts: int, data: st.DataObject) -> None:
        redundant = data.draw(st.integers(0, num_experts * (RANKS - 1)))
        self.home = even_placement(num_experts, (1, 2), range(RANKS), RANKS, redundant=redundant)
        self.homes = ExpertHomes(self.home)
        self.living = set(range(RANKS))
        self.has = {rank: _pairs(self.home.experts_of(rank)) for rank in self.living}
        self.refused: set[tuple[int, int, int]] = set()
        self.now = 0.0

    @rule(rank=ranks)
    def dies(self, rank: int) -> None:
        self.homes.lose(rank)
        self.living.discard(rank)
        self.has[rank] = set()
        self.refused = {refusal for refusal in self.refused if refusal[0] != rank}
        self.assign()

    @rule(rank=ranks, with_all=st.booleans())
    def comes_back(self, rank: int, with_all: bool) -> None:
        if rank not in self.living:
            self.living.add(rank)
            self.has[rank] = _pairs(self.home.experts_of(rank)) if with_all else set()
            self.homes.host(rank, self.home.experts_of(rank) if with_all else {})
            self.assign()

    @rule(rank=ranks, data=st.data())
    def answers(self, rank: int, data: st.DataObject) -> None:
        """To its order, or to one of before."""
        if rank not in self.living:
            return
        order = _pairs(self.homes.orders.get(rank, {}))
        loaded = data.draw(st.sets(st.sampled_from(sorted(order)))) if order else set()
        refused = data.draw(st.sets(st.sampled_from(sorted(order - loaded)))) if order - loaded else set()
        self.has[rank] |= loaded
        self.homes.host(rank, _by_layer(loaded))
        if refused:
            self.refused |= {(rank, *pair) for pair in refused}
            self.homes.refuse(rank, _by_layer(refused), "no", self.now)
        self.assign()

    @rule()
    def time_passes(self) -> None:
        self.now += LONGEST_RETRY_SECONDS
        if self.homes.stranded:
            self.refused.clear()
        self.assign()

    def assign(self) -> None:
        self.homes.assign(self.living, self.now)
        if not self.homes.missing:
            self.refused.clear()

    @invariant()
    def only_what_is_there_is_placed(self) -> None:
        for rank in range(RANKS):
            assert _pairs(self.homes.placement.experts_of(rank)) <= self.has[rank]

    @invariant()
    def nothing_is_forgotten(self) -> None:
        ordered = [pair for order in self.homes.orders.values() for pair in _pairs(order)]
        assert len(set(ordered)) == len(ordered), "one is enough"
        assert set(self.homes.orders) <= self.living
        missing = _pairs(self.homes.placement.missing)
        assert set(ordered) <= missing
        for pair in missing - set(ordered):
            assert all((rank, *pair) in self.refused for rank in self.living)
        assert self.homes.stranded == (set(ordered) != missing)

    @invariant()
    def who_is_at_home_is_asked(self) -> None:
        for layer in (1, 2):
            for hosts, home in zip(self.homes.placement.hosts_of(layer), self.home.hosts_of(layer), strict=True):
                back = tuple(rank for rank in home if rank in hosts)
                assert hosts == (back or hosts)


def _pairs(experts: object) -> set[tuple[int, int]]:
    assert isinstance(experts, dict)
    return {(layer, expert) for layer, some in experts.items() for expert in some}


def _by_layer(pairs: set[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted(e for of, e in pairs if of == layer)) for layer in {layer for layer, _ in pairs}}


Story.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStory = Story.TestCase
