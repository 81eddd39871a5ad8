from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_config import ConfigError, Placement, even_placement, take_over
from mesh_config.placement import NOWHERE


def sizes(placement: Placement, layer: int, ranks: list[int]) -> list[int]:
    return [len(placement.experts_on(layer, rank)) for rank in ranks]


def test_ten_experts_on_four_ranks() -> None:
    placement = even_placement(10, (1, 2, 3), (0, 1, 2, 3), 4)
    assert sizes(placement, 1, [0, 1, 2, 3]) == [3, 3, 2, 2]
    assert sizes(placement, 2, [0, 1, 2, 3]) == [2, 2, 3, 3]
    assert placement.experts_on(1, 0) == (0, 1, 2)
    assert placement.ranks_of(1) == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)


def test_copies_of_a_rank_go_to_all_others() -> None:
    """Six experts on three ranks, each twice: the loss of one rank falls on both others alike."""
    placement = even_placement(6, (1,), (0, 1, 2), 3, redundant=6)
    assert placement.hosts_of(1) == ((0, 2), (0, 1), (1, 0), (1, 2), (2, 1), (2, 0))
    assert placement.without({0}).hosts_of(1) == ((2,), (1,), (1,), (1, 2), (2, 1), (2,))


def test_what_was_taken_over_goes_home() -> None:
    home = even_placement(6, (1, 2), (0, 1, 2), 3)
    alone = home.without({0}).hosting(1, {1: (0,), 2: (0, 1)}).hosting(2, {1: (1,)})
    assert alone.missing == {}
    assert alone.hosts_of(1) == ((1,), (2,), (1,), (1,), (2,), (2,))
    assert alone.at_home(home) is alone, "nobody is back"
    back = alone.hosting(0, {1: (0, 1), 2: (1,)}).at_home(home)
    assert back.hosts_of(1) == home.hosts_of(1)
    assert back.hosts_of(2) == ((1,), (0,), (1,), (1,), (2,), (2,))
    assert back.version > alone.version


def test_first_hosts_come_back_one_by_one_and_in_order() -> None:
    home = even_placement(2, (1,), (0, 1), 3, redundant=2)
    assert home.hosts_of(1) == ((0, 1), (1, 0))
    nobody = home.without({0, 1})
    assert nobody.missing == {1: {0, 1}}
    taken = nobody.hosting(2, {1: (0, 1)})
    first = taken.hosting(1, {1: (0, 1)}).at_home(home)
    assert first.hosts_of(1) == ((1,), (1,))
    assert first.hosting(0, {1: (0, 1)}).at_home(home).hosts_of(1) == home.hosts_of(1)


def test_hosting_what_is_hosted_changes_nothing() -> None:
    home = even_placement(4, (1, 2), (0, 1), 2)
    assert home.hosting(1, {1: (2, 3), 7: (1,)}) is home


@given(
    num_experts=st.integers(1, 60),
    num_layers=st.integers(1, 9),
    ranks=st.sets(st.integers(0, 15), min_size=1).map(sorted),
)
def test_every_expert_once_and_even(num_experts: int, num_layers: int, ranks: list[int]) -> None:
    layers = tuple(range(3, 3 + num_layers))
    placement = even_placement(num_experts, layers, ranks, 16)
    assert placement.moe_layers == layers
    totals = [0] * len(ranks)
    for layer in layers:
        hosted = [placement.experts_on(layer, rank) for rank in ranks]
        assert sorted(expert for part in hosted for expert in part) == list(range(num_experts))
        assert all(part == tuple(range(part[0], part[-1] + 1)) for part in hosted if part)
        counts = [len(part) for part in hosted]
        assert max(counts) - min(counts) <= 1
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    assert max(totals) - min(totals) <= 1


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_experts, num_layers = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    ranks = sorted(draw(st.sets(st.integers(0, 9), min_size=1)))
    redundant = draw(st.integers(0, num_experts * (len(ranks) - 1)))
    machine_of = draw(st.none() | st.fixed_dictionaries({rank: st.sampled_from("ab") for rank in ranks}))
    layers = tuple(range(1, 1 + num_layers))
    return even_placement(num_experts, layers, ranks, 10, redundant=redundant, machine_of=machine_of)


@given(placements())
def test_copies_are_spread(placement: Placement) -> None:
    ranks = sorted({rank for layer in placement.moe_layers for hosts in placement.hosts_of(layer) for rank in hosts})
    for layer in placement.moe_layers:
        hosts = placement.hosts_of(layer)
        assert all(len(set(copies)) == len(copies) > 0 for copies in hosts)
        for counts in ([len(copies) for copies in hosts], sizes(placement, layer, ranks)):
            assert max(counts) - min(counts) <= 1
        first = [placement.ranks_of(layer).count(rank) for rank in ranks]
        assert max(first) - min(first) <= 1
    totals = [sum(map(len, placement.experts_of(rank).values())) for rank in ranks]
    assert max(totals) - min(totals) <= 1


@given(half=st.integers(1, 4), per_rank=st.integers(1, 5), more=st.data())
def test_copies_lie_on_different_machines(half: int, per_rank: int, more: st.DataObject) -> None:
    num_ranks = 2 * half
    num_experts = per_rank * num_ranks
    redundant = num_ranks * more.draw(st.integers(0, per_rank))
    machine_of = {rank: "ab"[rank // half] for rank in range(num_ranks)}
    placement = even_placement(
        num_experts, (1, 2, 3), range(num_ranks), num_ranks, redundant=redundant, machine_of=machine_of
    )
    for layer in placement.moe_layers:
        for hosts in placement.hosts_of(layer):
            assert len({machine_of[rank] for rank in hosts}) == len(hosts)


@given(placement=placements(), dead=st.sets(st.integers(0, 9)))
def test_without_the_dead_nobody_else_moves(placement: Placement, dead: set[int]) -> None:
    left = placement.without(dead)
    assert left.version == placement.version + bool(dead)
    for layer in placement.moe_layers:
        for before, after in zip(placement.hosts_of(layer), left.hosts_of(layer), strict=True):
            assert after == tuple(rank for rank in before if rank not in dead)
        assert [rank == NOWHERE for rank in left.ranks_of(layer)] == [not hosts for hosts in left.hosts_of(layer)]


@given(placement=placements(), living=st.sets(st.integers(0, 9), min_size=1))
def test_taken_over_every_expert_is_hosted_again(placement: Placement, living: set[int]) -> None:
    plan = take_over(placement, sorted(living, reverse=True))
    assert plan == take_over(placement, living)
    after = placement.without(set(range(10)) - living)
    before = {rank: after.experts_of(rank) for rank in living}
    for rank, experts in plan.items():
        assert rank in living
        after = after.hosting(rank, experts)
    for layer in placement.moe_layers:
        assert all(hosts and set(hosts) <= living for hosts in after.hosts_of(layer))
        loaded = {rank: len(plan.get(rank, {}).get(layer, ())) for rank in living}
        least = min(len(after.experts_on(layer, rank)) for rank in living)
        for rank in living:
            # Nobody takes one more while another hosts fewer.
            assert not loaded[rank] or len(after.experts_on(layer, rank)) <= least + 1
            assert set(after.experts_on(layer, rank)) == {
                *before[rank].get(layer, ()),
                *plan.get(rank, {}).get(layer, ()),
            }


@given(placement=placements(), room=st.dictionaries(st.integers(0, 9), st.integers(0, 9), min_size=1))
def test_nobody_takes_over_more_than_there_is_room_for(placement: Placement, room: dict[int, int]) -> None:
    plan = take_over(placement, room, room=room)
    taken = {rank: sum(map(len, layers.values())) for rank, layers in plan.items()}
    assert all(taken[rank] <= room[rank] for rank in taken)
    unhosted = sum(
        not set(hosts) & room.keys() for layer in placement.moe_layers for hosts in placement.hosts_of(layer)
    )
    assert sum(taken.values()) == min(unhosted, sum(room.values()))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        even_placement(4, (0,), (), 2)
    with pytest.raises(ConfigError, match="only once"):
        even_placement(4, (0,), (1, 1), 2)
    with pytest.raises(ConfigError, match=r"rank 2 is not among 0\.\.1"):
        even_placement(4, (0,), (1, 2), 2)
    with pytest.raises(ConfigError, match="host one expert twice"):
        Placement(version=0, num_ranks=2, hosts={1: ((1, 1),)})
