"""Membership: who is believed, suspected, fenced and brought back, event by event."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from mesh_config import MeshConfig, even_placement
from moemesh.expert_homes import RETRY_SECONDS
from moemesh.membership import Membership
from moemesh.membership_records import (
    TICK_SECONDS,
    Event,
    FailMesh,
    Heartbeat,
    HelloSeen,
    HostingSeen,
    Instruction,
    Kill,
    Look,
    MembershipSettings,
    Note,
    PeerLate,
    PeerLost,
    ProcessBegan,
    ProcessEnded,
    ProcessSeen,
    PublishView,
    RankFailed,
    Readmit,
    ReadySeen,
    Regroup,
    Respawn,
    RestartGroup,
    SpawnFailed,
    Tick,
    TookOver,
    Transition,
    UnfitSeen,
)
from transport.life import Life

T = TypeVar("T")


class Mesh:
    """A membership with a clock, and hearts that beat unless they are `silent`."""

    def __init__(
        self,
        num_ranks: int = 4,
        *,
        attention_ranks: int | None = 2,
        tp: int = 1,
        redundant: int = 0,
        **settings: Any,
    ) -> None:
        mesh = MeshConfig(num_ranks=num_ranks, attention_ranks=attention_ranks, attention_tp=tp, max_model_len=64)
        placement = even_placement(4, (1,), mesh.expert_ranks, num_ranks, redundant=redundant)
        self.num_ranks = num_ranks
        self.now = 100.0
        self.silent: set[int] = set()
        self.working: set[int] = set()
        self.stuck: set[int] = set()
        self.progress = 0
        self.membership = Membership(mesh, placement, MembershipSettings(**settings))

    def tell(self, *events: Event) -> list[Instruction]:
        return [instruction for event in events for instruction in self.membership.handle(event, self.now)]

    def start(self) -> Mesh:
        for rank in range(self.num_ranks):
            self.tell(HelloSeen(Life(rank)), ReadySeen(Life(rank)))
        return self

    def wait(self, seconds: float, *also: Event) -> list[Instruction]:
        """Beats and ticks for a while, `also` before each tick."""
        out: list[Instruction] = []
        for _ in range(round(seconds / TICK_SECONDS)):
            self.now += TICK_SECONDS
            self.progress += 1
            for rank in range(self.num_ranks):
                if rank not in self.silent:
                    progress = 0 if rank in self.stuck else self.progress
                    out += self.tell(Heartbeat(self.membership.present(rank), progress, rank in self.working))
            out += self.tell(*also, Tick())
        return out

    def states(self) -> list[str]:
        return [record.state for record in self.membership.view.ranks]


def of(kind: type[T], instructions: list[Instruction]) -> list[T]:
    return [instruction for instruction in instructions if isinstance(instruction, kind)]


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


def test_late_is_suspect_and_suspicion_passes() -> None:
    mesh = Mesh().start()
    out = mesh.tell(PeerLate(Life(0), Life(3)))
    assert of(Transition, out) == [Transition(Life(3), "up", "suspect", "late for rank 0")]
    assert mesh.membership.believes(Life(3))
    assert mesh.membership.serving_groups() == (0, 1)
    out = mesh.wait(2.0)
    assert of(Transition, out) == [Transition(Life(3), "suspect", "up", "")]
    assert mesh.membership.view.groups[0].generation == 0


def test_a_silent_heart_is_suspect_then_dead() -> None:
    mesh = Mesh(respawn=False).start()
    mesh.silent = {0}
    out = mesh.wait(0.5)
    assert mesh.states()[0] == "suspect"
    assert Look(Life(0)) in out
    out = mesh.wait(1.5)
    assert mesh.states() == ["dead", "up", "up", "up"]
    assert of(RestartGroup, out)[0].group == 0


def test_a_stopped_process_is_dead_as_soon_as_it_is_suspect() -> None:
    mesh = Mesh().start()
    assert mesh.tell(ProcessSeen(Life(0), True)) == [], "nobody misses it yet"
    mesh.silent = {0}
    mesh.wait(0.5)
    mesh.tell(ProcessSeen(Life(0), True))
    assert mesh.states()[0] == "dead"


def test_a_process_that_is_seen_running_is_given_time() -> None:
    mesh = Mesh(respawn=False).start()
    mesh.silent = {0}
    mesh.wait(9.0, ProcessSeen(Life(0), False))
    assert mesh.states()[0] == "suspect"
    mesh.wait(2.0, ProcessSeen(Life(0), False))
    assert mesh.states()[0] == "dead"


def test_long_work_kills_nobody_while_it_makes_progress() -> None:
    mesh = Mesh().start()
    mesh.working = {0, 1, 2, 3}
    assert mesh.wait(60.0) == []


def test_work_that_stands_still_is_suspect_and_dead_when_peers_wait_for_it() -> None:
    mesh = Mesh(respawn=False, slow_dead=1e9).start()
    mesh.working = mesh.stuck = {3}
    mesh.wait(60.0)
    assert mesh.states()[3] == "suspect", "nobody waits for it"
    out = mesh.wait(11.0, PeerLate(Life(0), Life(3)))
    assert mesh.states()[3] == "dead"
    assert of(Kill, out) == [Kill(Life(3))], "it may never end by itself"


def test_who_is_late_for_long_for_most_of_its_callers_is_too_slow() -> None:
    mesh = Mesh(respawn=False).start()
    mesh.working = {0, 1, 3}
    mesh.wait(4.5, PeerLate(Life(0), Life(3)))
    assert mesh.states()[3] == "suspect"
    out = mesh.wait(1.0, PeerLate(Life(0), Life(3)))
    assert mesh.states()[3] == "dead"
    assert "slow" in of(Transition, out)[-1].reason
    assert of(Kill, out) == [Kill(Life(3))], "nothing says that it would be faster later"


def test_one_of_many_callers_is_not_believed_alone() -> None:
    mesh = Mesh(6, attention_ranks=4).start()
    mesh.working = {0, 1, 2, 3}
    mesh.wait(20.0, PeerLate(Life(0), Life(5)))
    assert mesh.states()[5] == "suspect"


def test_an_idle_rank_has_no_progress_to_show() -> None:
    mesh = Mesh().start()
    mesh.stuck = {0, 1, 2, 3}
    mesh.wait(60.0)
    mesh.working = {0}
    mesh.wait(1.0)
    assert mesh.states() == ["up"] * 4


def test_when_most_are_suspect_the_controller_doubts_itself_first() -> None:
    mesh = Mesh(respawn=False).start()
    mesh.silent = {0, 1, 2}
    mesh.wait(2.5)
    assert mesh.states() == ["suspect", "suspect", "suspect", "up"]
    mesh.tell(ProcessEnded(Life(1)))
    assert mesh.states()[1] == "dead", "evidence needs no doubt"
    mesh.wait(2.0)
    assert mesh.states() == ["dead", "dead", "dead", "up"]


def test_the_controllers_own_lateness_is_not_held_against_anybody() -> None:
    mesh = Mesh().start()
    mesh.wait(0.1)
    mesh.now += 30.0
    out = mesh.tell(Tick())
    assert [type(instruction) for instruction in out] == [Note]
    assert mesh.tell(Tick()) == []
    assert mesh.states() == ["up"] * 4
    assert mesh.wait(5.0) == []


def test_a_controller_that_is_always_late_finds_the_dead_all_the_same() -> None:
    mesh = Mesh(respawn=False).start()
    mesh.silent = {0}
    for _ in range(100):
        mesh.now += 0.3
        mesh.wait(TICK_SECONDS)
    assert mesh.states() == ["dead", "up", "up", "up"]


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
    mesh.wait(6.0)
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


def test_the_last_group_without_respawn_ends_the_mesh() -> None:
    mesh = Mesh(respawn=False).start()
    assert not of(FailMesh, mesh.tell(ProcessEnded(Life(0))))
    (failed,) = of(FailMesh, mesh.tell(ProcessEnded(Life(1))))
    assert failed.reason == "rank 0, with the last attention group: its process has ended"


def test_with_respawn_there_is_hope_while_anybody_lives() -> None:
    mesh = Mesh().start()
    for rank in (3, 2, 1):
        assert not of(FailMesh, mesh.tell(ProcessEnded(Life(rank))))
    assert of(FailMesh, mesh.tell(ProcessEnded(Life(0))))


def test_a_fenced_rank_may_come_back_so_there_is_hope() -> None:
    mesh = Mesh(3, respawn=False, stop_grace=5.0).start()
    mesh.silent = {2}
    assert not of(FailMesh, mesh.wait(6.0))
    assert mesh.states()[2] == "dead"
    out = mesh.wait(2.0)
    assert of(Kill, out)
    assert of(FailMesh, out)


def test_the_only_rank_is_restarted_by_the_frontend() -> None:
    mesh = Mesh(1, attention_ranks=None).start()
    out = mesh.tell(ProcessEnded(Life(0)))
    assert of(RestartGroup, out)[0].group == 0
    assert of(Respawn, mesh.wait(TICK_SECONDS)) == [Respawn(Life(0, 1), None)]
    mesh.tell(ReadySeen(Life(0, 1)))
    assert mesh.membership.serving_groups() == (0,)


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


def test_without_fault_tolerance_a_loss_is_the_end_and_nobody_is_suspected() -> None:
    mesh = Mesh(fault_tolerance=False).start()
    mesh.silent = {0, 1}
    assert mesh.wait(60.0) == []
    assert of(FailMesh, mesh.tell(ProcessEnded(Life(0))))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="stop_grace must not be negative, is -1"):
        MembershipSettings(stop_grace=-1)


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
