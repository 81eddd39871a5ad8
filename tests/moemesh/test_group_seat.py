"""A rank's seat in its attention group: what is asked of a generation is done in that one, or never."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mesh_config.model_config import ModelConfig
from moemesh import group_seat
from moemesh.group_member import GroupMember
from moemesh.group_seat import GroupSeat
from moemesh.kept_cache import KeptCache
from transport import messages
from transport.frame import Frame, Header, Kind
from transport.mailbox import Mailbox

RANK = 1


class FakeMember:
    """Notes what it is told; leaves with what it knows of the cache."""

    scheduler = None

    def __init__(self, generation: int, members: tuple[int, ...], *, goes_on: bool, kept: KeptCache | None) -> None:
        self.generation, self.members, self.goes_on, self.kept = generation, members, goes_on, kept
        self.told: list[Any] = []
        self.num_sequences = 0

    def cancel(self, request_id: int) -> None:
        self.told.append(request_id)

    def receive_plan(self, frame: Frame) -> None:
        self.told.append(frame.header.step)

    def resume(self) -> None:
        self.told.append("resume")

    def leave(self) -> KeptCache | None:
        return KeptCache(self.generation)


@pytest.fixture(autouse=True)
def counted_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_seat, "member_counters", lambda member: {"steps": 1})


class Seat:
    """The seat of rank 1 in the group of ranks 0 to 2, and all members that were made for it."""

    def __init__(self) -> None:
        self.made: list[FakeMember] = []
        self.mailbox = Mailbox()
        self.seat = GroupSeat(
            self._make, (0, 1, 2), group=0, rank=RANK, config=cast(ModelConfig, None), mailbox=self.mailbox, send=print
        )

    def _make(self, generation: int, members: tuple[int, ...], *, goes_on: bool, kept: KeptCache | None) -> GroupMember:
        self.made.append(FakeMember(generation, members, goes_on=goes_on, kept=kept))
        return cast(GroupMember, self.made[-1])

    def view(self, generation: int, *members: int, since: int = 0, reborn: bool = False) -> None:
        group = messages.GroupMembers(generation, list(members), since)
        view = messages.View(epoch=1, incarnations=[0] * 3, states=["up"] * 3, born=[0] * 3, groups=[group])
        self.seat.follow(view, reborn=reborn)


def plan(generation: int, step: int) -> Frame:
    return Frame(Header(Kind.PLAN, 0, generation=generation, step=step), (torch.zeros(1, dtype=torch.uint8),))


def test_a_generation_begins_when_all_its_members_have_been_met_and_then_hears_what_was_asked_of_it() -> None:
    world = Seat()
    world.view(1, 0, 1)
    world.seat.hear(messages.Cancel(7))
    world.seat.begin_generation(met={1})
    assert [member.generation for member in world.made] == [0]
    world.seat.begin_generation(met={0, 1})
    first, second = world.made
    assert first.told == []
    assert (second.generation, second.members, second.goes_on, second.kept) == (1, (0, 1), True, KeptCache(0))
    assert second.told == [7]


def test_what_was_asked_of_a_generation_that_never_began_here_is_forgotten() -> None:
    world = Seat()
    world.view(1, 0, 1)
    world.seat.hear(messages.Cancel(7))
    world.view(2, 1)
    world.seat.begin_generation(met={0, 1})
    assert world.made[-1].generation == 2
    assert world.made[-1].told == []


def test_plans_of_a_later_generation_wait_and_those_of_an_earlier_one_are_dropped() -> None:
    world = Seat()
    world.seat.receive_plan(plan(1, 5))
    world.view(1, 0, 1)
    world.seat.begin_generation(met={0, 1})
    world.seat.receive_plan(plan(0, 6))
    assert world.made[-1].told == [5]


@pytest.mark.parametrize(("since", "reborn", "members"), [(1, False, (0, 1)), (0, True, (0, 1)), (0, False, (0, 2))])
def test_an_empty_cache_another_life_or_no_part_in_it_forget_what_was_cached(
    since: int, reborn: bool, members: tuple[int, ...]
) -> None:
    world = Seat()
    world.view(1, *members, since=since, reborn=reborn)
    world.seat.begin_generation(met={0, 1, 2})
    assert world.made[-1].kept is None
    assert world.made[-1].members == (members if RANK in members else ())


def test_a_regroup_of_another_generation_is_left_to_the_one_that_will_come() -> None:
    world = Seat()
    world.seat.hear(messages.Regroup(generation=1, sequences=[]))
    world.seat.hear(messages.Regroup(generation=0, sequences=[]))
    assert world.made[0].told == ["resume"]


def test_in_another_life_nothing_is_held_for_the_view_of_the_one_before() -> None:
    world = Seat()
    world.view(1, 0, 1)
    world.seat.forget_view()
    world.seat.hear(messages.Cancel(7))
    assert world.made[0].told == [7]


def test_counters_go_on_over_generations() -> None:
    world = Seat()
    world.view(1, 0, 1)
    world.seat.begin_generation(met={0, 1})
    assert world.seat.counters() == {"steps": 2}
