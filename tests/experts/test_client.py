"""A call for experts outlives whom it asked, and never changes a bit for it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.client import AWAY_SECONDS, RETRY_SECONDS
from experts.round_trips import FIRST_DEADLINE, SHORTEST_DEADLINE
from mesh_config import take_over
from tests.experts.expert_world import LAYER, NUM_EXPERTS, NUM_RANKS, World, expected
from transport.frame import Frame, Kind
from transport.tasks import Task

LATE = FIRST_DEADLINE + 0.01
ALL_TWICE = NUM_EXPERTS


def _finish(world: World, task: Task[torch.Tensor], *, step: int = 0, compact: bool = False) -> None:
    pending = world.client.pending
    assert task.advance()
    assert torch.equal(task.result, expected(step=step, compact=compact))
    assert world.client.pending == pending - 1


def test_a_call_without_trouble_asks_everybody_once() -> None:
    world = World()
    task = world.begin()
    assert sorted(rank for rank, _ in world.collect()) == [1, 2, 3]
    assert not task.advance()
    world.deliver_all()
    _finish(world, task)
    assert (world.client.stats.hedged, world.client.stats.rerouted, world.client.stats.late_answers) == (0, 0, 0)
    assert world.pass_time(10.0) == []


@pytest.mark.parametrize("compact", [False, True])
def test_a_late_answer_is_asked_of_replicas(compact: bool) -> None:
    world = World(redundant=ALL_TWICE, compact=compact)
    task = world.begin()
    held = [entry for entry in world.collect() if entry[0] == 2]
    world.drop(2)
    world.deliver_all()
    assert world.pass_time(LATE) == [2]
    assert {rank for rank, _ in world.link.posted} <= {1, 3}
    world.deliver_all()
    _finish(world, task, compact=compact)
    world.wire += held  # the slow one answers after all
    world.deliver_all()
    assert world.client.stats.late_answers == 1


def test_the_slow_one_may_still_be_first() -> None:
    world = World(redundant=ALL_TWICE)
    task = world.begin()
    held = [entry for entry in world.collect() if entry[0] == 2]
    world.drop(2)
    world.deliver_all()
    world.pass_time(LATE)
    hedges = list(world.link.posted)
    world.link.posted, world.wire = [], held
    world.deliver_all()
    _finish(world, task)
    world.wire = hedges
    world.deliver_all()
    assert world.client.stats.late_answers + world.services[0].stats.calls >= len(hedges)


def test_without_a_replica_the_same_rank_is_asked_again_and_again() -> None:
    world = World()
    task = world.begin()
    times = []
    for _ in range(3):
        world.drop(2)
        world.deliver_all()
        while not world.pass_time(0.01):
            pass
        times.append(world.time)
        assert [rank for rank, _ in world.link.posted] == [2]
    assert times[2] - times[1] > 1.5 * (times[1] - times[0])
    world.deliver_all()
    _finish(world, task)


def test_a_lost_rank_is_not_waited_for() -> None:
    world = World(redundant=ALL_TWICE)
    task = world.begin()
    world.drop(1)
    world.client.suspect(1)
    assert 1 not in {rank for rank, _ in world.link.posted}
    world.deliver_all()
    _finish(world, task)
    task = world.begin(step=1)
    assert 1 not in {rank for rank, _ in world.collect()}
    world.deliver_all()
    _finish(world, task, step=1)


def test_without_any_host_a_call_waits_for_a_placement() -> None:
    world = World()
    task = world.begin()
    world.lose(2)
    world.client.suspect(2)
    world.deliver_all()
    world.publish()
    other = world.begin(step=1)  # part of it is asked of nobody
    world.deliver_all()
    for _ in range(50):
        assert world.pass_time(0.2) == []
        world.deliver_all()
        assert not task.advance()
    world.load(take_over(world.placement, world.living))
    world.publish()
    world.deliver_all()
    _finish(world, task)
    _finish(world, other, step=1)
    assert world.client.stats.rerouted > 0


def test_a_new_life_of_a_rank_is_asked_again() -> None:
    world = World()
    task = world.begin()
    world.drop(3)
    world.living = {**world.living, 3: 1}
    world.publish()
    assert [rank for rank, _ in world.link.posted] == [3]
    world.deliver_all()
    _finish(world, task)


def test_who_does_not_host_it_yet_is_asked_again_in_a_moment() -> None:
    world = World()
    world.lose(2)
    plan = take_over(world.placement, world.living)
    world.load({0: plan[0]})
    for rank, experts in plan.items():
        world.placement = world.placement.hosting(rank, experts)
    world.publish()
    task = world.begin()
    world.deliver_all()
    assert not task.advance()
    world.load({rank: experts for rank, experts in plan.items() if rank != 0})
    world.pass_time(RETRY_SECONDS)
    world.deliver_all()
    _finish(world, task)


def test_a_full_link_is_tried_again() -> None:
    world = World()
    world.link.full = True
    task = world.begin()
    world.link.full = False
    world.pass_time(RETRY_SECONDS)
    assert sorted(rank for rank, _ in world.link.posted) == [1, 2, 3]
    world.deliver_all()
    _finish(world, task)


def test_an_answer_that_does_not_fit_is_dropped() -> None:
    world = World(redundant=ALL_TWICE)
    task = world.begin()
    rank, frame = world.collect()[0]
    world.client.receive(
        Frame(type(frame.header)(Kind.ANSWER, rank, layer=LAYER), (torch.zeros(1, 1),)),
    )
    assert world.client.stats.malformed_answers == 1
    world.drop(rank)
    world.deliver_all()
    assert not task.advance()
    assert world.pass_time(RETRY_SECONDS) == []
    world.deliver_all()
    _finish(world, task)


def test_who_was_away_itself_judges_nobody() -> None:
    world = World(redundant=ALL_TWICE)
    task = world.begin()
    assert world.pass_time(FIRST_DEADLINE + AWAY_SECONDS + 0.1) == []
    assert not world.link.posted[3:]
    world.deliver_all()
    _finish(world, task)


def test_deadlines_follow_what_was_seen() -> None:
    world = World(redundant=ALL_TWICE)
    for step in range(30):
        task = world.begin(step=step)
        world.collect()
        world.time += 0.001
        world.deliver_all()
        _finish(world, task, step=step)
    task = world.begin()
    assert world.client.due() == pytest.approx(world.time + SHORTEST_DEADLINE)
    world.deliver_all()
    _finish(world, task)
    assert world.client.due() == float("inf")


def test_a_call_that_is_given_up_leaves_nothing() -> None:
    world = World()
    task = world.begin()
    task._steps.close()
    assert world.client.pending == 0
    world.deliver_all()
    assert world.client.stats.late_answers == 3


@settings(max_examples=150, deadline=None)
@given(
    script=st.integers(0, 2**32),
    redundant=st.sampled_from([0, 5, ALL_TWICE, 2 * NUM_EXPERTS]),
    compact=st.booleans(),
    dead=st.sets(st.integers(1, NUM_RANKS - 1), max_size=2),
)
def test_whatever_happens_on_the_wire_the_bits_are_the_same(
    script: int, redundant: int, compact: bool, dead: set[int]
) -> None:
    """Frames are dropped, doubled, delayed and overtake each other; ranks die and their experts are taken over."""
    chance = random.Random(script)
    world = World(redundant=redundant, compact=compact)
    calls = {step: world.begin(step=step) for step in range(2)}
    to_lose = sorted(dead)
    for _ in range(60):
        wire = world.collect()
        event = chance.random()
        if wire and event < 0.3:
            world.deliver(chance.randrange(len(wire)))
        elif wire and event < 0.5:
            world.deliver(chance.randrange(len(wire)), keep=True)
        elif wire and event < 0.6:
            wire.pop(chance.randrange(len(wire)))
        elif event < 0.8:
            world.pass_time(chance.choice([0.01, 0.1, 1.0]))
        elif event < 0.85 and to_lose:
            rank = to_lose.pop()
            world.lose(rank)
            if chance.random() < 0.5:
                world.client.suspect(rank)
            world.publish()
        elif event < 0.9:
            world.load(take_over(world.placement, world.living))
            world.publish()
        else:
            world.answer(0)
    world.load(take_over(world.placement, world.living))
    world.publish()
    while world.client.pending and world.time < 1e4:
        world.deliver_all()
        world.pass_time(0.1)
        for task in calls.values():
            task.advance()
    for step, task in calls.items():
        assert task.done
        assert torch.equal(task.result, expected(step=step, compact=compact, redundant=0))
    assert world.client.pending == 0
