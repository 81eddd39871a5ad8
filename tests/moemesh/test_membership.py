"""Membership: who is believed, whose word counts, and when the mesh is at its end."""

from __future__ import annotations

import pytest

from moemesh.membership_records import (
    TICK_SECONDS,
    Event,
    FailMesh,
    HelloSeen,
    Kill,
    MembershipSettings,
    PeerLate,
    PeerLost,
    ProcessEnded,
    PublishView,
    RankFailed,
    Readmit,
    ReadySeen,
    Respawn,
    RestartGroup,
    Transition,
)
from tests.moemesh.membership_world import Mesh, of
from transport.life import Life


def test_ranks_come_up_and_each_change_is_an_epoch() -> None:
    mesh = Mesh(3)
    assert mesh.states() == ["loading"] * 3
    assert mesh.tell(HelloSeen(Life(0))) == []
    (up, published) = mesh.tell(ReadySeen(Life(0)))
    assert up == Transition(Life(0), "loading", "up", "")
    assert isinstance(published, PublishView)
    assert published.view.epoch == 1
    assert mesh.tell(ReadySeen(Life(0))) == [], "once is enough"
    assert not mesh.membership.started
    mesh.tell(ReadySeen(Life(1)), ReadySeen(Life(2)))
    assert mesh.membership.started
    assert not mesh.membership.degraded
    assert mesh.membership.serving_groups() == (0, 1)


def test_loading_takes_as_long_as_it_takes() -> None:
    mesh = Mesh(3)
    mesh.silent = {0, 1, 2}
    assert mesh.wait(100.0) == []


@pytest.mark.parametrize("event", [ProcessEnded(Life(1)), RankFailed(Life(1), "no such file")])
def test_a_rank_that_cannot_start_is_the_end(event: Event) -> None:
    mesh = Mesh(3)
    mesh.tell(ReadySeen(Life(0)))
    (failed,) = of(FailMesh, mesh.tell(event))
    assert failed.reason.startswith("rank 1: ")
    assert of(FailMesh, mesh.wait(1.0)) == [], "said once"


@pytest.mark.parametrize("evidence", [ProcessEnded(Life(0)), PeerLost(Life(2), Life(0)), RankFailed(Life(0), "oh")])
def test_evidence_kills_at_once_and_the_group_restarts(evidence: Event) -> None:
    mesh = Mesh(respawn=False).start()
    out = mesh.tell(evidence)
    assert mesh.states() == ["dead", "up", "up", "up"]
    (restart,) = of(RestartGroup, out)
    assert restart.group == 0
    assert restart.reason.startswith("rank 0: ")
    assert [(group.generation, group.members) for group in mesh.membership.view.groups] == [(1, ()), (0, (1,))]
    assert mesh.membership.serving_groups() == (1,)
    assert mesh.membership.degraded
    assert not of(FailMesh, out)
    assert mesh.tell(evidence) == [], "it dies once"


def test_a_rank_that_gives_itself_up_does_not_come_back() -> None:
    mesh = Mesh().start()
    assert of(Kill, mesh.tell(RankFailed(Life(0), "out of memory"))) == [Kill(Life(0))]
    assert not of(Readmit, mesh.wait(5.0))
    mesh.tell(ProcessEnded(Life(0)))
    assert of(Respawn, mesh.wait(TICK_SECONDS))


def test_only_who_is_believed_may_accuse() -> None:
    mesh = Mesh().start()
    assert mesh.tell(PeerLost(Life(1, 7), Life(0)), PeerLate(Life(1, 7), Life(0))) == []
    mesh.tell(ProcessEnded(Life(1)))
    assert mesh.tell(PeerLost(Life(1), Life(0)), PeerLate(Life(1), Life(0))) == []
    assert mesh.states()[0] == "up"


def test_the_last_group_without_respawn_ends_the_mesh() -> None:
    mesh = Mesh(respawn=False).start()
    assert not of(FailMesh, mesh.tell(ProcessEnded(Life(0))))
    (failed,) = of(FailMesh, mesh.tell(ProcessEnded(Life(1))))
    assert failed.reason == "rank 0, with the last attention group: its process has ended"


def test_without_fault_tolerance_a_loss_is_the_end_and_nobody_is_suspected() -> None:
    mesh = Mesh(fault_tolerance=False).start()
    mesh.silent = {0, 1}
    assert mesh.wait(60.0) == []
    assert of(FailMesh, mesh.tell(ProcessEnded(Life(0))))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="stop_grace must not be negative, is -1"):
        MembershipSettings(stop_grace=-1)
