from __future__ import annotations

import pytest
from hypothesis import given

from mesh_config import Loss, Placement, coverage, even_placement, take_over
from tests.mesh_config.test_placement import placements


def _coverage(redundant: int, room: int | None = None) -> dict[int, Loss]:
    """Four ranks of which the first hosts nothing, six experts of 10 bytes in two layers, 5 bytes a second."""
    placement = even_placement(6, (1, 2), (1, 2, 3), 4, redundant=redundant)
    spare = None if room is None else dict.fromkeys(range(4), room)
    return coverage(placement, (1, 2, 3), expert_bytes=10, read_bandwidth=5, room=spare)


def test_replicas_cover_a_loss() -> None:
    assert set(_coverage(6).values()) == {Loss(cover="replica")}


def test_survivors_share_what_has_no_replica() -> None:
    losses = _coverage(0)
    assert set(losses.values()) == {Loss(cover="reload", alone=4, num_bytes=20, seconds=4.0)}
    assert str(losses[1]) == "covered by reload: 4 experts without a replica, about 4.0 s"


def test_where_nobody_has_room_nothing_covers_it() -> None:
    assert set(_coverage(0, room=1).values()) == {Loss(cover="nothing", alone=4)}
    assert {loss.cover for loss in _coverage(0, room=2).values()} == {"reload"}
    single = coverage(even_placement(2, (1,), (0,), 1), (0,), expert_bytes=1)
    assert single == {0: Loss(cover="nothing", alone=2)}


def test_a_rank_without_experts_costs_none() -> None:
    placement = even_placement(2, (1,), (1,), 2, redundant=0).hosting(0, {1: (0,)})
    losses = coverage(placement, (0, 1), expert_bytes=1)
    assert (losses[0].cover, losses[1].alone) == ("replica", 1)
    assert coverage(even_placement(2, (1,), (1,), 2), (0, 1), expert_bytes=1)[0] == Loss(cover="none needed")


@given(placements())
def test_what_is_said_is_what_a_take_over_loads(placement: Placement) -> None:
    living = range(10)
    for rank, loss in coverage(placement, living, expert_bytes=1.0, read_bandwidth=1.0).items():
        left = placement.without({rank})
        plan = take_over(left, set(living) - {rank})
        loaded = [sum(map(len, layers.values())) for layers in plan.values()]
        assert loss.alone == sum(loaded)
        assert (loss.cover == "reload") == bool(loaded)
        # The plan evens out layers first, so that the rank that loads most may load a little more than its share.
        assert loss.num_bytes == pytest.approx(-(-sum(loaded) // 9))
