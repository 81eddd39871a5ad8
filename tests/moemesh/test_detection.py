"""Membership: who is suspect, and for whom suspicion is the end."""

from __future__ import annotations

from moemesh.membership_records import (
    TICK_SECONDS,
    GaveUpSlow,
    HelloSeen,
    HostingSeen,
    Instruction,
    Kill,
    Look,
    Note,
    PeerLate,
    ProcessEnded,
    ProcessSeen,
    ReadySeen,
    Respawn,
    RestartGroup,
    Tick,
    Transition,
)
from tests.moemesh.membership_world import Mesh, of
from transport.life import Life


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


def starve(mesh: Mesh, rank: int, seconds: float) -> list[Instruction]:
    """The rank has hardly any of the processor time that it needs, for so long; everybody waits for it."""
    mesh.starved = {rank}
    return mesh.wait(seconds)


def test_a_starved_rank_is_suspect_then_replaced() -> None:
    mesh = Mesh().start()
    mesh.wait(2.0)
    out = starve(mesh, 3, 2.0)
    (change,) = of(Transition, out)
    assert change.reason.startswith("slow: it had a processor for ")
    assert mesh.states()[3] == "suspect"
    out = mesh.wait(3.0)
    assert of(Transition, out)[0].after == "dead"
    assert of(Kill, out) == [Kill(Life(3))]
    assert of(GaveUpSlow, out) == [GaveUpSlow(Life(3))]
    assert mesh.states()[3] == "dead"
    assert of(Respawn, mesh.tell(ProcessEnded(Life(3))) + mesh.wait(0.1))


def test_nobody_is_compared_while_one_is_lost_or_loads() -> None:
    mesh = Mesh().start()
    mesh.tell(ProcessEnded(Life(2)))
    starve(mesh, 3, 20.0)
    assert mesh.states()[3] == "up"
    mesh.tell(HelloSeen(Life(2, 1)), HostingSeen(Life(2, 1), {1: [0, 1]}), ReadySeen(Life(2, 1)))
    assert mesh.membership.homes.orders == {}
    mesh.wait(5.0)
    assert mesh.states()[3] == "dead"


def test_a_slow_rank_that_nobody_can_replace_is_kept_and_said_so() -> None:
    mesh = Mesh(attention_ranks=3, respawn=False).start()  # only rank 3 hosts experts
    starve(mesh, 3, 20.0)
    record = mesh.membership.view.ranks[3]
    assert record.state == "suspect"
    assert record.reason.endswith("; kept: the mesh cannot serve without it")


def test_a_rank_that_is_late_and_slow_is_called_slow() -> None:
    mesh = Mesh().start()
    mesh.wait(1.0)
    mesh.tell(PeerLate(Life(0), Life(3)))
    mesh.starved = {3}
    notes = of(Note, mesh.wait(1.5, PeerLate(Life(0), Life(3))))
    assert [note.text.partition(":")[0] for note in notes] == ["rank 3 is suspect"]
    assert mesh.membership.view.ranks[3].reason.startswith("slow: ")


def test_without_fault_tolerance_nobody_is_too_slow() -> None:
    mesh = Mesh(fault_tolerance=False).start()
    assert starve(mesh, 3, 20.0) == []
