"""Which groups have lost a frame, and which are only slow."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moemesh.membership_records import BEAT_SECONDS, GroupView
from moemesh.standstill import MOST_TRIES, PATIENCE_SECONDS, Standing, Standstill
from transport.messages import GroupPulse


class Group:
    """Three hearts that beat in turn. `waits` says for whom each member waits, `computing` are in one long turn."""

    def __init__(self) -> None:
        self.standstill = Standstill(1)
        self.generation = 0
        self.now = 50.0
        self.waits: dict[int, list[int]] = {0: [1], 1: [0], 2: [0]}
        self.moves = {0: 9, 1: 8, 2: 8}
        self.steps = {0: 3, 1: 2, 2: 3}
        self.computing: set[int] = set()
        self.silent: set[int] = set()
        self.turns = dict.fromkeys(self.moves, 100)

    @property
    def views(self) -> Sequence[GroupView]:
        return (GroupView(generation=self.generation, members=(0, 1, 2)),)

    def beat(self, seconds: float) -> list[Standing]:
        """What is found within so many seconds of beats."""
        for _ in range(round(seconds / BEAT_SECONDS)):
            self.now += BEAT_SECONDS
            for rank in self.moves.keys() - self.silent:
                self.turns[rank] += 0 if rank in self.computing else 5
                pulse = GroupPulse(self.generation, self.steps[rank], self.moves[rank], self.waits[rank])
                self.standstill.beat(rank, self.turns[rank], pulse, self.now)
            if found := self.standstill.found(self.views):
                return found
        return []


def test_members_that_all_wait_for_each_other_have_lost_a_frame() -> None:
    group = Group()
    assert group.beat(PATIENCE_SECONDS - BEAT_SECONDS) == []
    ((number, reason, broken),) = group.beat(3 * BEAT_SECONDS)
    assert (number, broken) == (0, None)
    assert reason == "its members have waited for each other for 1.0 s: a frame was lost between them"
    assert group.beat(PATIENCE_SECONDS / 2) == [], "said once, and then not before its time is over again"


def test_a_member_that_waits_for_something_else_will_go_on() -> None:
    group = Group()
    group.waits[2] = []
    assert group.beat(100.0) == []


def test_a_member_in_one_long_turn_says_nothing_new() -> None:
    """Its heart repeats what it said before the frame came that it is computing with."""
    group = Group()
    assert group.beat(PATIENCE_SECONDS / 2) == []
    group.computing = {1}
    assert group.beat(100.0) == []
    group.moves[1] += 1
    group.computing = set()
    assert group.beat(PATIENCE_SECONDS - BEAT_SECONDS) == []


def test_who_is_not_heard_may_be_computing() -> None:
    group = Group()
    group.silent = {2}
    assert group.beat(100.0) == []


def test_whatever_moves_begins_the_time_anew() -> None:
    group = Group()
    for rank in (0, 1, 2) * 20:
        group.moves[rank] += 1
        assert group.beat(PATIENCE_SECONDS - BEAT_SECONDS) == []


def test_words_of_another_generation_count_for_nothing() -> None:
    group = Group()
    group.beat(PATIENCE_SECONDS / 2)
    assert group.standstill.found([GroupView(generation=1, members=(0, 1, 2))]) == []
    for _ in range(100):
        group.beat(BEAT_SECONDS)
        assert group.standstill.found([GroupView(generation=1, members=(0, 1, 2))]) == []


def test_a_frontend_that_was_away_knows_nothing_of_what_was_before() -> None:
    group = Group()
    group.beat(PATIENCE_SECONDS - BEAT_SECONDS)
    group.now += 5.0
    group.standstill.forget()
    assert group.beat(PATIENCE_SECONDS - BEAT_SECONDS) == []


def test_a_group_of_nobody_or_of_one_never_stands_still() -> None:
    standstill = Standstill(2)
    for turn in range(100):
        standstill.beat(0, turn, GroupPulse(0, 0, 0, [1]), turn * BEAT_SECONDS)
        assert standstill.found([GroupView(generation=0, members=(0,)), GroupView(generation=0, members=())]) == []


def restart(group: Group, *, after: float, steps: int) -> int | None:
    """The group is found to stand still at that time and not before; who is given up for it."""
    assert group.beat(after - BEAT_SECONDS) == []
    ((_, _, broken),) = group.beat(3 * BEAT_SECONDS)
    group.generation += 1
    group.steps = dict.fromkeys(group.steps, steps)
    return broken


def test_patience_doubles_until_a_step_is_finished() -> None:
    group = Group()
    assert restart(group, after=PATIENCE_SECONDS, steps=0) is None
    assert restart(group, after=2 * PATIENCE_SECONDS, steps=0) is None
    assert restart(group, after=4 * PATIENCE_SECONDS, steps=1) is None
    for _ in range(10):
        assert restart(group, after=PATIENCE_SECONDS, steps=1) is None


@pytest.mark.parametrize(("waits", "broken"), [({0: [1], 1: [0], 2: [0, 1]}, 1), ({0: [1, 2], 1: [0], 2: [0]}, 0)])
def test_who_is_waited_for_again_and_again_is_given_up(waits: dict[int, list[int]], broken: int) -> None:
    group = Group()
    group.waits = waits
    for tries in range(MOST_TRIES):
        assert restart(group, after=PATIENCE_SECONDS * 2**tries, steps=0) is None
    assert restart(group, after=PATIENCE_SECONDS * 2**MOST_TRIES, steps=0) == broken
    assert restart(group, after=PATIENCE_SECONDS, steps=0) is None, "the others begin with fresh patience"
