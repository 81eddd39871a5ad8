"""Membership: experts whose host is lost, and when it comes back."""

from __future__ import annotations

from moemesh.expert_homes import RETRY_SECONDS
from moemesh.membership_records import (
    TICK_SECONDS,
    FailMesh,
    HostingSeen,
    ProcessEnded,
    PublishView,
    Readmit,
    ReadySeen,
    Respawn,
    SpawnFailed,
    TookOver,
)
from tests.moemesh.membership_world import Mesh, of
from transport.life import Life


def test_lost_experts_are_loaded_by_a_survivor_and_placed_only_then() -> None:
    mesh = Mesh(respawn=False).start()
    (published,) = of(PublishView, mesh.tell(ProcessEnded(Life(3))))
    assert published.placement.hosts_of(1) == ((2,), (2,), (), ())
    assert published.orders == {2: {1: (2, 3)}}
    assert mesh.membership.missing_experts() == (3,)
    assert not mesh.membership.stranded, "they are being loaded"
    assert mesh.wait(60.0) == [], "that takes as long as it takes"
    done, published = mesh.tell(HostingSeen(Life(2), {1: (2, 3)}))
    assert done == TookOver(Life(2), 2, 0, "")
    assert isinstance(published, PublishView)
    assert published.placement.hosts_of(1) == ((2,),) * 4
    assert published.orders == {}
    assert mesh.membership.missing_experts() == ()


def test_experts_that_no_rank_can_load_end_the_mesh() -> None:
    mesh = Mesh(respawn=False).start()
    mesh.tell(ProcessEnded(Life(3)))
    (failed,) = of(FailMesh, mesh.tell(ProcessEnded(Life(2))))
    assert failed.reason == "rank 2, with experts that no rank can load: its process has ended"


def test_experts_come_home_when_their_first_host_serves_again() -> None:
    mesh = Mesh().start()
    mesh.silent = {3}
    mesh.wait(3.0)
    mesh.tell(HostingSeen(Life(2), {1: (2, 3)}))
    mesh.silent = set()
    assert of(Readmit, mesh.wait(0.2))
    (published,) = of(PublishView, mesh.tell(HostingSeen(Life(3, 1), {1: (2, 3)})))
    assert published.placement.experts_of(3) == {}, "it does not serve yet"
    (published,) = of(PublishView, mesh.tell(ReadySeen(Life(3, 1))))
    assert published.placement.hosts_of(1) == ((2,), (2,), (3,), (3,))


def test_what_came_home_need_not_be_loaded_any_more() -> None:
    mesh = Mesh().start()
    mesh.silent = {3}
    mesh.wait(3.0)
    assert mesh.membership.homes.orders == {2: {1: (2, 3)}}
    mesh.silent = set()
    mesh.wait(0.2)
    out = mesh.tell(HostingSeen(Life(3, 1), {1: (2, 3)}), ReadySeen(Life(3, 1)))
    assert of(PublishView, out)[-1].orders == {}
    mesh.tell(HostingSeen(Life(2), {1: (2, 3)}))
    assert mesh.membership.placement.hosts_of(1) == ((2,), (2,), (3,), (3,)), "it comes too late, and is let go"


def test_what_one_cannot_load_another_is_asked_for_and_all_again_after_a_while() -> None:
    mesh = Mesh(5, respawn=False).start()  # ranks 2, 3 and 4 host experts: 2, 1 and 1
    assert of(PublishView, mesh.tell(ProcessEnded(Life(2))))[-1].orders == {3: {1: (0,)}, 4: {1: (1,)}}
    out = mesh.tell(HostingSeen(Life(3), {}, {1: (0,)}, "disk on fire"))
    assert of(TookOver, out) == [TookOver(Life(3), 0, 1, "disk on fire")]
    assert of(PublishView, out)[-1].orders == {4: {1: (0, 1)}}
    assert not mesh.membership.stranded
    out = mesh.tell(HostingSeen(Life(4), {1: (1,)}, {1: (0,)}, "no memory"))
    assert of(PublishView, out)[-1].orders == {}
    assert not of(FailMesh, out), "it may go better later"
    told = "1 experts were lost and cannot be loaded again: rank 3: disk on fire; rank 4: no memory"
    assert mesh.membership.stranded == told
    assert not of(PublishView, mesh.wait(RETRY_SECONDS - 0.1))
    assert of(PublishView, mesh.wait(0.2))[-1].orders == {3: {1: (0,)}}
    mesh.tell(HostingSeen(Life(3), {1: (0,)}))
    assert not mesh.membership.stranded
    assert mesh.membership.homes.problems == {}
    assert mesh.membership.placement.hosts_of(1) == ((3,), (4,), (3,), (4,))


def test_who_dies_while_it_loads_is_replaced() -> None:
    mesh = Mesh(5, respawn=False).start()
    mesh.tell(ProcessEnded(Life(2)))
    out = mesh.tell(ProcessEnded(Life(3)))
    assert of(PublishView, out)[-1].orders == {4: {1: (0, 1, 2)}}
    mesh.tell(HostingSeen(Life(4), {1: (1,)}))  # the answer to the first order
    assert mesh.membership.homes.orders == {4: {1: (0, 2)}}
    mesh.tell(HostingSeen(Life(4), {1: (0, 1, 2)}))
    assert mesh.membership.missing_experts() == ()


def test_lost_experts_wait_for_who_may_come_back_where_nobody_can_load_them() -> None:
    mesh = Mesh(respawn=False, stop_grace=5.0).start()
    mesh.silent = {3}
    mesh.wait(3.0)
    mesh.tell(HostingSeen(Life(2), {}, {1: (2, 3)}, "truncated"))
    assert not mesh.membership.stranded
    mesh.wait(5.0)
    assert "2 experts were lost and cannot be loaded again: rank 2: truncated" in mesh.membership.stranded


def test_requests_do_not_wait_for_ever_for_a_rank_that_cannot_start_again() -> None:
    mesh = Mesh().start()
    mesh.tell(ProcessEnded(Life(3)))
    mesh.tell(HostingSeen(Life(2), {}, {1: (2, 3)}, "truncated"))
    tries = 0
    while not mesh.membership.stranded:
        tries += 1
        while mesh.states()[3] != "joining":
            mesh.wait(TICK_SECONDS)
            mesh.tell(HostingSeen(Life(2), {}, {1: (2, 3)}, "truncated"))
        mesh.tell(SpawnFailed(mesh.membership.present(3), "truncated"))
    assert tries == 3
    assert of(Respawn, mesh.wait(10.0)), "it is tried again all the same"
    mesh.tell(HostingSeen(Life(2), {}, {1: (2, 3)}, "truncated"))
    assert "rank 2: truncated" in mesh.membership.stranded


def test_experts_with_replicas_are_served_by_these() -> None:
    mesh = Mesh(respawn=False, redundant=4).start()
    before = mesh.membership.placement
    assert {len(hosts) for hosts in before.hosts_of(1)} == {2}
    out = mesh.tell(ProcessEnded(Life(3)))
    assert not of(FailMesh, out)
    (published,) = of(PublishView, out)
    assert published.placement.hosts_of(1) == ((2,),) * 4
    assert published.placement.version == before.version + 1
    assert mesh.membership.missing_experts() == ()
    assert mesh.membership.serving_groups() == (0, 1)
    (failed,) = of(FailMesh, mesh.tell(ProcessEnded(Life(2))))
    assert "experts that no rank can load" in failed.reason


def test_who_comes_back_hosts_what_it_says() -> None:
    mesh = Mesh(redundant=4).start()
    mesh.silent = {3}
    mesh.wait(3.0)
    assert mesh.membership.placement.experts_of(3) == {}
    mesh.silent = set()
    assert of(Readmit, mesh.wait(0.2))
    assert mesh.tell(HostingSeen(Life(3), {1: [0]})) == [], "that life is over"
    out = mesh.tell(HostingSeen(Life(3, 1), {1: [0, 2]}), ReadySeen(Life(3, 1)))
    assert of(PublishView, out)[-1].placement.hosts_of(1) == ((2, 3), (2,), (3, 2), (2,)), "as at first"
    assert mesh.tell(HostingSeen(Life(7), {1: [0]})) == []
