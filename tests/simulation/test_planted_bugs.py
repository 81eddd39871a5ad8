"""Bugs planted in the production classes, one at a time: the simulation must find each within a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from experts import ExpertClient
from moemesh import standstill
from moemesh.expert_homes import ExpertHomes
from moemesh.group_member import GroupMember
from moemesh.heart import Heart
from moemesh.membership import Membership
from moemesh.scheduler import Scheduler
from moemesh.sequence import LOGITS_NOT_FINITE
from moemesh.standstill import Standstill
from tests.simulation.control_plane import Weather
from tests.simulation.run import Expected, play
from tests.simulation.scenario import Fault, Scenario, draw
from tests.simulation.tiny_model import Model
from transport.flow_control import CreditWindow
from transport.frame import Frame
from transport.local_wire import FaultRates

ENOUGH_SEEDS = 150
Shape = Callable[[Scenario], None]


@pytest.fixture(autouse=True)
def unplanted(expected: Expected) -> None:
    """What is expected is computed before anything is planted."""


def assert_found(model: Model, expected: Expected, complaint: str, shape: Shape = lambda scenario: None) -> None:
    """Some seed brings it to light; `shape` gives the scenarios what the bug needs."""
    for seed in range(ENOUGH_SEEDS):
        scenario = draw(seed)
        shape(scenario)
        complaints = play(model, scenario, expected).complaints
        if any(complaint in each for each in complaints):
            return
    raise AssertionError(f"{ENOUGH_SEEDS} seeds have not found it")


def test_a_stale_answer_accepted(tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    receive = ExpertClient.receive

    def receive_anything(self: ExpertClient, frame: Frame) -> None:
        """Whatever call of the layer has asked the sender for as many rows."""
        header = frame.header
        for (generation, step, layer, part), call in self._calls.items():
            for (rank, attempt), asked in call.asked.items():
                if (layer, rank) == (header.layer, header.sender) and call.fits(asked, frame.tensors):
                    names = {"generation": generation, "step": step, "micro_batch": part, "attempt": attempt}
                    frame = Frame(replace(header, **names), frame.tensors)
        receive(self, frame)

    monkeypatch.setattr(ExpertClient, "receive", receive_anything)
    assert_found(tiny_model, expected, "expected")


def test_a_lost_credit(tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = CreditWindow.tell

    def tell_what_came(self: CreditWindow[Any]) -> int:
        return tell(self) - len(self._missing)

    monkeypatch.setattr(CreditWindow, "tell", tell_what_came)
    assert_found(tiny_model, expected, "keeps")


def test_a_block_not_freed(tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    free_blocks = Scheduler._free_blocks

    def free_some_blocks(self: Scheduler, entry: Any) -> None:
        if len(entry.sequence.block_table) > 1:
            entry.sequence.block_table.pop()
        free_blocks(self, entry)

    monkeypatch.setattr(Scheduler, "_free_blocks", free_some_blocks)
    assert_found(tiny_model, expected, "'blocks': ")


def test_a_step_run_twice(tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    step = GroupMember._step

    def step_twice(self: GroupMember, plan: Any) -> Any:
        yield from step(self, plan)
        if plan.step % 7 == 6:
            yield from step(self, plan)

    monkeypatch.setattr(GroupMember, "_step", step_twice)
    assert_found(tiny_model, expected, "has crashed")


def test_a_placement_published_before_its_load(
    tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign = ExpertHomes.assign

    def assign_and_promise(self: ExpertHomes, able: Any, now: float) -> dict[int, int]:
        assigned = assign(self, able, now)
        for rank, order in self.orders.items():
            self.placement = self.placement.hosting(rank, order)
        return assigned

    monkeypatch.setattr(ExpertHomes, "assign", assign_and_promise)
    assert_found(tiny_model, expected, "which it has not loaded")


def test_words_of_another_generation_believed(
    tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that stood still goes on with what it had, as another life, until the view reaches it."""

    def stop_twice(scenario: Scenario) -> None:
        scenario.faults = tuple(Fault(kind="stop", at=at, seconds=0.6, rank=0) for at in (0.1, 1.2))
        scenario.weather = Weather(usual=0.03)
        scenario.calm = False

    monkeypatch.setattr(Membership, "believes_of", lambda self, life, group, generation: self.believes(life))
    assert_found(tiny_model, expected, "is believed of", stop_twice)


def one_group(scenario: Scenario) -> None:
    """All ranks are one attention group, on links that lose frames."""
    scenario.mesh_fields |= {"num_ranks": 2, "attention_tp": 2, "attention_ranks": None}
    scenario.faults, scenario.remote, scenario.ending = (), frozenset(), None
    scenario.rates = FaultRates(drop=0.03, reorder=0.2)
    scenario.calm, scenario.dies_loading = False, None


def test_a_group_that_stands_still_unseen(
    tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Standstill, "found", lambda self, groups: [])
    assert_found(tiny_model, expected, "ended 0 times", one_group)


def test_a_group_that_is_restarted_for_being_slow(
    tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames may not even travel."""

    def calm(scenario: Scenario) -> None:
        one_group(scenario)
        scenario.calm, scenario.rates = True, FaultRates(delay=0.5, max_delay=0.03)

    monkeypatch.setattr(standstill, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(standstill, "LEAST_TURNS", 0)
    assert_found(tiny_model, expected, "was run again in vain", calm)


def test_no_numbers_given_out(tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that has none takes a neighbour with it."""
    apply = Scheduler.apply

    def spread(self: Scheduler, plan: Any, sampled: Any, rows: Any = None) -> Any:
        if LOGITS_NOT_FINITE in sampled.values():
            sampled = dict.fromkeys(sampled, LOGITS_NOT_FINITE)
        return apply(self, plan, sampled, rows)

    monkeypatch.setattr(Scheduler, "apply", spread)
    assert_found(tiny_model, expected, "its neighbours have done it")


def test_a_rank_that_outlives_its_frontend(
    tiny_model: Model, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Heart, "listen", lambda self, control: control.receive_all())
    assert_found(tiny_model, expected, "is left behind")
