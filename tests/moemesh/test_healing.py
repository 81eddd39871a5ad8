"""Membership: how a lost rank comes back, in its old process or a new one."""

from __future__ import annotations

from moemesh.membership_records import (
    TICK_SECONDS,
    FailMesh,
    HelloSeen,
    HostingSeen,
    Kill,
    ProcessBegan,
    ProcessEnded,
    PublishView,
    RanksEnded,
    Readmit,
    ReadySeen,
    Respawn,
    RestartGroup,
    RestartRanks,
    SpawnFailed,
)
from tests.moemesh.membership_world import Mesh, of
from transport.life import Life


def test_a_stopped_rank_comes_back_under_a_new_life() -> None:
    mesh = Mesh().start()
    mesh.silent = {0}
    out = mesh.wait(5.0)
    assert mesh.states()[0] == "dead"
    assert not of(Kill, out)
    assert not of(Respawn, out), "its process is there"
    mesh.silent = set()
    (readmit,) = of(Readmit, mesh.wait(0.2))
    assert readmit == Readmit(Life(0), 1)
    assert mesh.states()[0] == "joining"
    assert not mesh.membership.believes(Life(0))
    mesh.tell(ReadySeen(Life(0)))
    assert mesh.states()[0] == "joining", "that was its old life"
    mesh.tell(ReadySeen(Life(0, 1)))
    assert mesh.states()[0] == "up"
    assert mesh.membership.view.groups[0].generation == 2
    assert mesh.membership.serving_groups() == (0, 1)


def test_who_does_not_come_back_in_time_is_killed_and_only_then_replaced() -> None:
    mesh = Mesh(stop_grace=5.0).start()
    mesh.silent = {0}
    out = mesh.wait(10.0)
    assert of(Kill, out) == [Kill(Life(0))]
    assert not of(Respawn, out)
    mesh.tell(ProcessEnded(Life(0)))
    out = mesh.wait(TICK_SECONDS)
    assert of(Respawn, out) == [Respawn(Life(0, 1), 1)]
    assert mesh.states()[0] == "joining"
    mesh.silent = set()
    mesh.tell(HelloSeen(Life(0, 1)), ReadySeen(Life(0, 1)))
    assert mesh.states() == ["up"] * 4


def test_a_killed_rank_that_beats_once_more_is_not_readmitted() -> None:
    mesh = Mesh(stop_grace=1.0).start()
    mesh.silent = {0}
    assert of(Kill, mesh.wait(5.0))
    mesh.silent = set()
    assert not of(Readmit, mesh.wait(0.5))


def test_deaths_in_a_row_make_it_wait_twice_as_long_each_time() -> None:
    mesh = Mesh().start()
    waits = []
    for life in range(5):
        mesh.tell(ReadySeen(Life(0, life)), ProcessEnded(Life(0, life)))
        began = mesh.now
        while mesh.states()[0] == "dead":
            mesh.wait(TICK_SECONDS)
        waits.append(round(mesh.now - began))
    assert waits == [0, 1, 2, 4, 8]
    mesh.tell(ReadySeen(Life(0, 5)))
    mesh.wait(20.0)
    mesh.tell(ProcessEnded(Life(0, 5)))
    assert of(Respawn, mesh.wait(TICK_SECONDS)), "it served for long: nothing is held against it"


def test_a_spawn_that_fails_is_tried_again() -> None:
    mesh = Mesh().start()
    mesh.tell(ProcessEnded(Life(0)))
    mesh.wait(TICK_SECONDS)
    mesh.tell(SpawnFailed(Life(0, 1), "no slots"))
    assert mesh.membership.view.ranks[0].reason == "cannot respawn: no slots"
    assert of(Respawn, mesh.wait(2.0)) == [Respawn(Life(0, 2), 2)], "by another rank than before"


def test_a_spawn_is_given_up_with_its_spawner_or_after_long_silence() -> None:
    mesh = Mesh(hello_timeout=5.0).start()
    mesh.silent = {0}
    mesh.tell(ProcessEnded(Life(0)))
    mesh.wait(TICK_SECONDS)
    mesh.tell(ProcessEnded(Life(1)))
    mesh.wait(TICK_SECONDS)
    assert "rank 1, which was to start it, is gone" in mesh.membership.view.ranks[0].reason
    assert of(Respawn, mesh.wait(2.0))[0].by == 3, "rank 2 is busy with rank 1"
    mesh.wait(3.5)
    assert mesh.membership.view.ranks[0].state == "dead"
    assert "has not said hello" in mesh.membership.view.ranks[0].reason


def test_a_newcomer_that_falls_silent_is_dead() -> None:
    mesh = Mesh().start()
    mesh.tell(ProcessEnded(Life(0)))
    mesh.wait(TICK_SECONDS)
    mesh.tell(HelloSeen(Life(0, 1)))
    mesh.silent = {0}
    mesh.wait(9.0)
    assert mesh.states()[0] == "joining"
    mesh.wait(2.0)
    assert mesh.states()[0] == "dead"


def test_with_respawn_there_is_hope_while_anybody_lives() -> None:
    mesh = Mesh().start()
    for rank in (3, 2, 1):
        assert not of(FailMesh, mesh.tell(ProcessEnded(Life(rank))))
    (failed,) = of(FailMesh, mesh.tell(ProcessEnded(Life(0))))
    assert "no rank is left, and those of a user's own mpirun cannot all be started again" in failed.reason


def test_a_fenced_rank_may_come_back_so_there_is_hope() -> None:
    mesh = Mesh(3, respawn=False, stop_grace=5.0).start()
    mesh.silent = {2}
    assert not of(FailMesh, mesh.wait(6.0))
    assert mesh.states()[2] == "dead"
    out = mesh.wait(2.0)
    assert of(Kill, out)
    assert of(FailMesh, out)


def test_the_only_rank_is_restarted_by_the_frontend() -> None:
    mesh = Mesh(1, attention_ranks=None, restarts=True).start()
    out = mesh.tell(ProcessEnded(Life(0)))
    assert of(RestartGroup, out)[0].group == 0
    assert not of(RestartRanks, mesh.wait(1.0)), "its launcher has not ended"
    assert of(RestartRanks, mesh.wait(TICK_SECONDS, RanksEnded("over"))) == [RestartRanks(1)]
    mesh.tell(ReadySeen(Life(0, 1)))
    assert mesh.membership.serving_groups() == (0,)


def test_when_no_rank_is_left_all_are_restarted_as_one_life() -> None:
    mesh = Mesh(restarts=True).start()
    home = mesh.membership.placement
    mesh.silent = {0, 1, 2, 3}
    mesh.tell(ProcessEnded(Life(3)))
    mesh.wait(TICK_SECONDS)
    assert mesh.states() == ["up", "up", "up", "joining"]
    assert not of(FailMesh, mesh.tell(*(ProcessEnded(Life(rank)) for rank in range(3)), RanksEnded("over")))
    out = mesh.wait(TICK_SECONDS)
    assert of(RestartRanks, out) == [RestartRanks(2)]
    assert not of(Respawn, out)
    for life in [Life(rank, 2) for rank in range(4)]:
        mesh.tell(HelloSeen(life), HostingSeen(life, home.experts_of(life.rank)), ReadySeen(life))
        assert not mesh.membership.homes.orders, "what is the others' is not taken over"
    assert mesh.states() == ["up"] * 4
    assert not mesh.membership.missing_experts()
    assert mesh.membership.serving_groups() == (0, 1)


def test_one_that_does_not_come_with_all_others_is_respawned() -> None:
    mesh = Mesh(restarts=True, hello_timeout=5.0).start()
    mesh.tell(RanksEnded("over"))
    mesh.wait(TICK_SECONDS)
    for rank in (0, 1, 2):
        mesh.tell(ProcessBegan(Life(rank, 1)), HelloSeen(Life(rank, 1)), ReadySeen(Life(rank, 1)))
    mesh.tell(ProcessBegan(Life(3, 1)))
    out = mesh.wait(7.0)
    assert of(Kill, out) == [Kill(Life(3, 1))]
    assert of(Respawn, out) == [Respawn(Life(3, 2), 1)]


def test_a_mesh_that_never_starts_again_is_given_up() -> None:
    mesh = Mesh(restarts=True, most_attempts=3).start()
    mesh.silent = {0, 1, 2, 3}
    out = mesh.wait(20.0, RanksEnded("mpirun ended with exit code 1"))
    assert of(RestartRanks, out) == [RestartRanks(1), RestartRanks(2), RestartRanks(3)]
    (failed,) = of(FailMesh, out)
    assert "mpirun ended with exit code 1 (given up after 3 attempts)" in failed.reason


def test_without_respawn_the_end_of_all_is_the_end() -> None:
    mesh = Mesh(restarts=True, respawn=False).start()
    assert of(FailMesh, mesh.tell(*(ProcessEnded(Life(rank)) for rank in range(4))))


def spawned(mesh: Mesh, life: Life) -> Mesh:
    """The rank has died, and its new life is about to be spawned."""
    mesh.tell(ProcessEnded(Life(life.rank, life.incarnation - 1)))
    mesh.wait(TICK_SECONDS)
    return mesh


def test_a_new_process_can_be_met_from_its_hello_on() -> None:
    mesh = spawned(Mesh().start(), Life(0, 1))
    assert mesh.membership.view.ranks[0].born == -1
    assert not of(PublishView, mesh.tell(ProcessBegan(Life(0, 1))))
    (published,) = of(PublishView, mesh.tell(HelloSeen(Life(0, 1))))
    assert [record.born for record in published.view.ranks] == [1, 0, 0, 0]
    assert published.view.listening() == (1, 2, 3, 0)
    mesh.tell(ReadySeen(Life(0, 1)))
    assert mesh.membership.view.living() == (0, 1, 2, 3)


def test_who_comes_back_in_the_same_process_was_born_as_before() -> None:
    mesh = Mesh().start()
    mesh.silent = {0}
    mesh.wait(2.0)
    mesh.silent = set()
    mesh.wait(TICK_SECONDS)
    record = mesh.membership.view.ranks[0]
    assert (record.state, record.incarnation, record.born) == ("joining", 1, 0)


def test_a_process_that_does_not_begin_is_not_waited_for() -> None:
    mesh = spawned(Mesh(begin_timeout=4.0).start(), Life(0, 1))
    mesh.silent = {0}
    mesh.wait(3.5)
    assert mesh.states()[0] == "joining"
    out = mesh.wait(1.0)
    assert of(Kill, out) == [Kill(Life(0, 1))]
    assert of(Respawn, mesh.wait(2.0)) == [Respawn(Life(0, 2), 2)]


def test_a_process_that_begins_too_late_is_killed() -> None:
    mesh = spawned(Mesh(begin_timeout=4.0, backoff=60.0).start(), Life(0, 1))
    mesh.silent = {0}
    mesh.wait(5.0)
    assert mesh.states()[0] == "dead"
    assert of(Kill, mesh.tell(ProcessBegan(Life(0, 1)))) == [Kill(Life(0, 1))]


def test_a_process_that_has_begun_may_take_its_time() -> None:
    mesh = spawned(Mesh(begin_timeout=4.0, hello_timeout=20.0).start(), Life(0, 1))
    mesh.tell(ProcessBegan(Life(0, 1)))
    mesh.wait(15.0)
    assert mesh.states()[0] == "joining"
    assert of(Kill, mesh.wait(6.0)) == [Kill(Life(0, 1))]


def test_a_rank_that_cannot_be_respawned_is_given_up() -> None:
    mesh = Mesh(redundant=4, most_attempts=3).start()
    mesh.tell(ProcessEnded(Life(0)))
    spawners = []
    for incarnation in (1, 2, 3):
        out = mesh.wait(10.0)
        (order,) = of(Respawn, out)
        assert order.life == Life(0, incarnation)
        spawners.append(order.by)
        mesh.tell(SpawnFailed(order.life, "no slots"))
    assert spawners == [1, 2, 3], "each time another one"
    assert not of(Respawn, mesh.wait(100.0))
    record = mesh.membership.view.ranks[0]
    assert (record.state, record.reason) == ("dead", "cannot respawn: no slots (given up after 3 attempts)")
    assert mesh.membership.degraded


def test_a_rank_that_is_given_up_and_was_needed_ends_the_mesh() -> None:
    mesh = Mesh(attention_ranks=1, most_attempts=1).start()
    mesh.tell(ProcessEnded(Life(0)))
    mesh.wait(TICK_SECONDS)
    (failed,) = of(FailMesh, mesh.tell(SpawnFailed(Life(0, 1), "no slots")))
    assert "cannot respawn: no slots" in failed.reason


def test_the_death_of_a_spawner_is_not_held_against_the_newcomer() -> None:
    mesh = Mesh(6, attention_ranks=5, most_attempts=1).start()
    mesh.silent = {0, 1}
    mesh.tell(ProcessEnded(Life(0)))
    assert of(Respawn, mesh.wait(TICK_SECONDS)) == [Respawn(Life(0, 1), 1)]
    mesh.tell(ProcessBegan(Life(0, 1)))
    mesh.tell(ProcessEnded(Life(1)))
    out = mesh.wait(5.0)
    assert Kill(Life(0, 1)) in of(Kill, out), "without its parent it would wait in MPI for ever"
    assert Life(0, 2) in [order.life for order in of(Respawn, out)]


def test_several_are_respawned_at_once_each_by_another() -> None:
    mesh = Mesh().start()
    mesh.tell(ProcessEnded(Life(0)), ProcessEnded(Life(3)))
    orders = of(Respawn, mesh.wait(TICK_SECONDS))
    assert [(order.life.rank, order.by) for order in orders] == [(0, 1), (3, 2)]
    mesh.tell(ProcessEnded(Life(1)))
    assert not of(Respawn, mesh.wait(TICK_SECONDS)), "rank 2 has its hands full"


def test_a_rank_is_respawned_on_the_host_where_it_was() -> None:
    mesh = Mesh(6, attention_ranks=4).start()
    mesh.tell(*(HelloSeen(Life(rank), f"host {rank % 2}") for rank in range(6)))
    mesh.tell(ProcessEnded(Life(0)), ProcessEnded(Life(3)))
    orders = of(Respawn, mesh.wait(TICK_SECONDS))
    assert [(order.life.rank, order.by) for order in orders] == [(0, 2), (3, 1)]
