"""Membership: who computes together when ranks are lost and come back."""

from __future__ import annotations

from moemesh.membership_records import (
    TICK_SECONDS,
    Kill,
    ProcessEnded,
    ProcessSeen,
    ReadySeen,
    Regroup,
    Respawn,
    RestartGroup,
    UnfitSeen,
)
from tests.moemesh.membership_world import Mesh, of
from transport.life import Life


def groups(mesh: Mesh) -> list[tuple[int, tuple[int, ...], int]]:
    return [(group.generation, group.members, group.since) for group in mesh.membership.view.groups]


def test_a_group_goes_on_with_who_is_left_and_is_lost_with_the_last() -> None:
    mesh = Mesh(6, attention_ranks=4, tp=2, respawn=False).start()
    out = mesh.tell(ProcessEnded(Life(0)))
    assert of(Regroup, out) == [Regroup(0, "rank 0: its process has ended", lost=True)]
    assert not of(RestartGroup, out)
    assert groups(mesh) == [(1, (1,), 0), (0, (2, 3), 0)]
    assert mesh.membership.leader(0) == Life(1)
    assert mesh.membership.serving_groups() == (0, 1)
    out = mesh.tell(ProcessEnded(Life(1)))
    assert [restart.group for restart in of(RestartGroup, out)] == [0]
    assert groups(mesh) == [(2, (), 2), (0, (2, 3), 0)]
    assert mesh.membership.leader(0) is None


def test_who_comes_back_follows_those_who_have_the_cache() -> None:
    mesh = Mesh(6, attention_ranks=4, tp=4).start()
    mesh.tell(ProcessEnded(Life(0)))
    assert of(Respawn, mesh.wait(TICK_SECONDS))
    out = mesh.tell(ReadySeen(Life(0, 1)))
    assert of(Regroup, out) == [Regroup(0, "rank 0 (life 1) has come", lost=False)]
    assert groups(mesh) == [(2, (1, 2, 3, 0), 0)]
    assert mesh.membership.leader(0) == Life(1)


def test_a_group_that_was_lost_waits_for_all_who_may_come() -> None:
    mesh = Mesh(6, attention_ranks=4, tp=2).start()
    for rank in (0, 1):
        mesh.tell(ProcessEnded(Life(rank)))
    mesh.wait(TICK_SECONDS)
    mesh.tell(ReadySeen(Life(1, 1)))
    assert groups(mesh)[0] == (2, (), 2)
    mesh.tell(ReadySeen(Life(0, 1)))
    assert groups(mesh)[0] == (3, (0, 1), 3)


def test_a_group_that_was_lost_waits_for_nobody_who_is_gone_for_good() -> None:
    mesh = Mesh(6, attention_ranks=4, tp=2, respawn=False).start()
    mesh.tell(ProcessEnded(Life(0)))
    mesh.tell(ProcessSeen(Life(1), stopped=True))
    mesh.silent = {0, 1}
    mesh.wait(1.0)
    mesh.tell(ProcessSeen(Life(1), stopped=True))
    assert groups(mesh)[0] == (2, (), 2)
    mesh.silent = {0}
    mesh.wait(0.2)
    mesh.tell(ReadySeen(Life(1, 1)))
    assert groups(mesh)[0] == (3, (1,), 3)


def test_a_rank_that_cannot_have_more_heads_makes_its_group_begin_anew() -> None:
    mesh = Mesh(6, attention_ranks=4, tp=2, respawn=False).start()
    mesh.tell(ProcessEnded(Life(0)))
    assert mesh.tell(UnfitSeen(Life(1), 0, "no memory")) == [], "that was long ago"
    out = mesh.tell(UnfitSeen(Life(1), 1, "no memory"))
    assert of(RestartGroup, out) == [RestartGroup(0, "rank 1: no memory")]
    assert groups(mesh)[0] == (3, (1,), 3), "there is nobody to wait for"
    out = mesh.tell(UnfitSeen(Life(1), 3, "no memory"))
    assert mesh.states()[1] == "dead"
    assert of(Kill, out)


def test_a_group_whose_members_wait_for_each_other_runs_its_step_again() -> None:
    mesh = Mesh(2, attention_ranks=None, tp=2).start()
    mesh.waits = {0: [1], 1: [0]}
    (again,) = of(Regroup, mesh.wait(1.5))
    assert not again.lost
    assert "a frame was lost" in again.reason
    assert groups(mesh) == [(1, (0, 1), 0)]
    assert of(Regroup, mesh.wait(1.5)) == [], "twice as patient"
    assert mesh.states() == ["up", "up"]


def test_a_link_that_loses_everything_is_the_end_of_a_member() -> None:
    mesh = Mesh(2, attention_ranks=None, tp=2).start()
    mesh.waits = {0: [1], 1: [0]}
    out = mesh.wait(16.0)
    assert len(of(Regroup, out)) == 4
    assert of(Kill, out) == [Kill(Life(1))]
    assert mesh.states() == ["up", "dead"]
    assert "its group cannot work with it" in mesh.membership.view.ranks[1].reason


def test_a_frontend_that_was_away_lets_a_group_take_its_time() -> None:
    mesh = Mesh(2, attention_ranks=None, tp=2).start()
    mesh.waits = {0: [1], 1: [0]}
    mesh.wait(0.5)
    mesh.now += 3.0
    assert of(Regroup, mesh.wait(0.8)) == []
