"""The whole mesh under faults drawn from seeds: whatever goes wrong, every request ends once, and rightly."""

from __future__ import annotations

from itertools import product

import pytest

from tests.simulation.run import Expected, play
from tests.simulation.scenario import KINDS, draw
from tests.simulation.soak import soak
from tests.simulation.tiny_model import Model

NUM_SEEDS = 500
CHUNK = 50


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, CHUNK))
def test_nothing_is_to_be_complained_of(tiny_model: Model, expected: Expected, first: int) -> None:
    outcomes = [play(tiny_model, draw(seed), expected) for seed in range(first, first + CHUNK)]
    failed = [outcome for outcome in outcomes if outcome.complaints]
    if failed:
        seeds = " ".join(str(outcome.scenario.seed) for outcome in failed)
        pytest.fail(f"{failed[0]}\n\nto run them again: python -m tests.simulation {seeds}", pytrace=False)


def test_a_seed_tells_the_same_story_each_time(tiny_model: Model, expected: Expected) -> None:
    first, second = (play(tiny_model, draw(5), expected) for _ in range(2))
    assert first.history.story == second.history.story
    assert len(first.history.story) > 5


def test_seeds_draw_every_fault() -> None:
    scenarios = [draw(seed) for seed in range(NUM_SEEDS)]
    kinds = {fault.kind for scenario in scenarios for fault in scenario.faults}
    assert kinds == set(KINDS)
    assert {scenario.variant for scenario in scenarios} == {None, *product(("absorbed", "expanded"), (None, "int8"))}
    assert {scenario.ending.killed for scenario in scenarios if scenario.ending is not None} == {False, True}
    rates = [scenario.rates for scenario in scenarios]
    assert all(
        any(getattr(each, name) for each in rates) for name in ("drop", "duplicate", "corrupt", "reorder", "delay")
    )
    assert sum(scenario.calm for scenario in scenarios) > NUM_SEEDS / 10


def test_a_soak_counts_what_fails(tiny_model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    assert soak(tiny_model.folder, 1000, 0.01)
    assert "seeds from 1000 on" in capfd.readouterr().out
