"""Which processes meet, and who connects to whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from moemesh.neighbours import Failure, MeetingFailed, Neighbours
from transport import messages


class FakeMeetings:
    """Notes what is asked for."""

    def __init__(self) -> None:
        self.spawned: list[tuple[int, int, list[str]]] = []
        self.accepted: list[tuple[int, int]] = []
        self.connected: list[tuple[int, int]] = []
        self.failed: list[Failure] = []

    def spawn(self, rank: int, incarnation: int, command: Sequence[str]) -> None:
        self.spawned.append((rank, incarnation, list(command)))

    def accept(self, rank: int, incarnation: int) -> None:
        self.accepted.append((rank, incarnation))

    def connect(self, lives: Iterable[tuple[int, int]]) -> None:
        self.connected += lives

    def take_failed(self) -> Sequence[Failure]:
        failed, self.failed = self.failed, []
        return failed


def view(born: list[int], **states: str) -> messages.View:
    """Of ranks that serve, each in a process that began as life `born`; `r1="dead"`: but rank 1."""
    return messages.View(
        epoch=1,
        incarnations=born,
        states=[states.get(f"r{rank}", "up") for rank in range(len(born))],
        born=born,
        groups=[],
    )


def veteran(meetings: FakeMeetings | None = None, *, rank: int = 0) -> Neighbours:
    """One of four that were started together."""
    met = {peer: 0 for peer in range(4) if peer != rank}
    return Neighbours(rank, born=0, met=met, meetings=meetings, command=lambda order: ["start", str(order.local_rank)])


def newcomer(meetings: FakeMeetings, born: int, *, rank: int = 3) -> Neighbours:
    neighbours = Neighbours(rank, born=born, met={}, meetings=meetings)
    neighbours.joined([(0, 0)])
    return neighbours


def test_who_was_there_before_accepts_and_a_newcomer_connects() -> None:
    ours, theirs = FakeMeetings(), FakeMeetings()
    neighbours = veteran(ours)
    for _ in range(2):  # views repeat themselves
        neighbours.follow(view([0, 0, 0, 1], r3="joining"))
    assert (ours.accepted, ours.connected) == ([(3, 1)], [])
    newcomer(theirs, 1).follow(view([0, 0, 0, 1], r3="joining"))
    assert (theirs.accepted, theirs.connected) == ([], [(1, 0), (2, 0)])


def test_of_two_newcomers_exactly_one_connects() -> None:
    three, two = FakeMeetings(), FakeMeetings()
    both = view([0, 0, 4, 4], r2="joining", r3="joining")
    newcomer(three, 4, rank=3).follow(both)
    newcomer(two, 4, rank=2).follow(both)
    assert three.connected == [(1, 0), (2, 4)]
    assert (two.connected, two.accepted) == ([(1, 0)], [(3, 4)])


def test_nobody_waits_for_the_dead_nor_for_who_is_not_there_yet() -> None:
    meetings = FakeMeetings()
    neighbours = newcomer(meetings, 1)
    neighbours.follow(view([0, 0, -1, 1], r1="dead", r2="joining"))
    assert (meetings.accepted, meetings.connected) == ([], [])
    neighbours.follow(view([0, 0, 2, 1], r1="joining"))
    assert (meetings.accepted, meetings.connected) == ([(2, 2)], [(1, 0)])


def test_a_process_is_reached_once_it_has_joined() -> None:
    neighbours = veteran(FakeMeetings())
    assert neighbours.reaches(3, 0)
    neighbours.follow(view([0, 0, 0, 2], r3="joining"))
    assert not neighbours.reaches(3, 2)
    neighbours.joined([(3, 2)])
    assert neighbours.reaches(3, 2)
    assert not neighbours.reaches(3, 0)


def test_who_spawns_does_not_accept_as_well() -> None:
    meetings = FakeMeetings()
    neighbours = veteran(meetings)
    neighbours.spawn(messages.Respawn(rank=3, incarnation=1, local_rank=3, ranks_on_host=4))
    neighbours.follow(view([0, 0, 0, 1], r3="joining"))
    assert meetings.spawned == [(3, 1, ["start", "3"])]
    assert meetings.accepted == []


def test_a_spawn_that_fails_is_reported_once() -> None:
    meetings = FakeMeetings()
    neighbours = veteran(meetings)
    neighbours.spawn(messages.Respawn(rank=3, incarnation=1, local_rank=3, ranks_on_host=4))
    meetings.failed = [Failure(3, 1, "no slots")]
    assert neighbours.take_not_spawned() == [messages.NotSpawned(3, 1, "no slots")]
    assert neighbours.take_not_spawned() == []


def test_a_meeting_that_fails_is_begun_anew() -> None:
    meetings = FakeMeetings()
    neighbours = veteran(meetings)
    neighbours.follow(view([0, 0, 0, 1], r3="joining"))
    meetings.failed = [Failure(3, 1, "no hello")]
    assert neighbours.take_not_spawned() == []
    assert meetings.accepted == [(3, 1), (3, 1)]


def test_a_newcomer_gives_up_who_is_there_and_cannot_be_met() -> None:
    meetings = FakeMeetings()
    neighbours = newcomer(meetings, 1)
    neighbours.follow(view([0, 0, 0, 1], r2="dead"))
    for _ in range(2):
        meetings.failed = [Failure(1, 0, "no hello")]
        neighbours.take_not_spawned()
    meetings.failed = [Failure(1, 0, "no hello")]
    with pytest.raises(MeetingFailed, match=r"cannot meet rank 1 \(life 0\): no hello"):
        neighbours.take_not_spawned()


def test_without_meetings_the_link_finds_others_by_itself() -> None:
    neighbours = veteran()
    neighbours.follow(view([0, 0, 0, 1], r3="joining"))
    assert neighbours.take_not_spawned() == []
    neighbours.joined([(3, 1)])
    assert neighbours.reaches(3, 1)
