"""When a layer is held back for callers that are about to come, and when not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from experts.hold import FEWEST_SAMPLES, LONGEST, PATIENCE, HoldRule

LAYERS = (1, 2)
SKEW = 0.5
SLOTS = 6


@pytest.fixture
def rule() -> HoldRule:
    return _after_some_steps(HoldRule(LAYERS, 8))


def _after_some_steps(rule: HoldRule) -> HoldRule:
    """Callers 7 and 8, the second SKEW behind the first; a batch takes a second. Step i is at 10 i, layers 5 apart."""
    for step in range(FEWEST_SAMPLES + 1):
        for place, layer in enumerate(LAYERS):
            _both(rule, layer, 10.0 * step + 5 * place)
    return rule


def _both(rule: HoldRule, layer: int, now: float) -> None:
    rule.came(layer, (7, 0), SLOTS, now)
    rule.came(layer, (8, 0), SLOTS, now + SKEW)
    rule.computed(layer, 2 * SLOTS, 1.0)


def test_nothing_is_held_before_enough_was_seen() -> None:
    rule = HoldRule(LAYERS, 8)
    _both(rule, 1, 0.0)
    rule.came(2, (7, 0), SLOTS, 5.0)
    assert rule.until(2, SLOTS) <= 5.0


def test_a_layer_waits_for_the_median_skew_at_most(rule: HoldRule) -> None:
    rule.came(1, (7, 0), 1000, 100.0)
    assert rule.until(1, 1000) == pytest.approx(100.0 + SKEW)


def test_a_layer_waits_no_longer_than_reading_the_weights_twice_takes(rule: HoldRule) -> None:
    rule.came(1, (7, 0), 1, 100.0)
    held = rule.until(1, 1) - 100.0
    assert 0 < held < SKEW


def test_nobody_is_waited_for_when_all_are_there(rule: HoldRule) -> None:
    rule.came(1, (8, 0), SLOTS, 100.0)
    rule.came(1, (7, 0), SLOTS, 100.1)
    assert rule.until(1, 2 * SLOTS) <= 100.1


def test_who_did_not_come_is_not_waited_for_again(rule: HoldRule) -> None:
    rule.came(1, (7, 0), SLOTS, 100.0)
    rule.computed(1, SLOTS, 1.0)
    rule.came(2, (7, 0), SLOTS, 105.0)
    assert rule.until(2, SLOTS) <= 105.0
    rule.came(2, (8, 0), SLOTS, 106.0)
    rule.came(1, (7, 0), SLOTS, 110.0)
    assert rule.until(1, SLOTS) > 110.0


def test_a_model_with_one_layer_of_experts() -> None:
    rule = HoldRule([3], 8)
    for step in range(FEWEST_SAMPLES + 2):
        rule.came(3, (7, 0), SLOTS, 10.0 * step)
        rule.came(3, (8, 0), SLOTS, 10.0 * step + SKEW)
        rule.computed(3, 2 * SLOTS, 1.0)
    rule.came(3, (8, 0), SLOTS, 100.0)
    assert 100.0 < rule.until(3, SLOTS) <= 100.0 + SKEW


def test_where_waiting_is_free_a_layer_waits_for_whom_is_a_layer_behind() -> None:
    rule = _after_some_steps(HoldRule(LAYERS, 8, patient=True))
    rule.came(1, (7, 0), 30, 100.0)
    held = rule.until(1, 30) - 100.0
    assert SKEW < held <= PATIENCE * 5
    rule.came(1, (8, 0), SLOTS, 104.0)
    assert rule.until(1, 30 + SLOTS) <= 104.0


def test_free_waiting_is_bounded_by_the_computation() -> None:
    rule = _after_some_steps(HoldRule(LAYERS, 8, patient=True))
    rule.came(1, (7, 0), 1, 100.0)
    one_expert = 1.0 / (8 * (1 - (7 / 8) ** (2 * SLOTS)))
    assert rule.until(1, 1) == pytest.approx(100.0 + LONGEST * one_expert)


def test_many_rows_an_expert_are_not_waited_for_patiently() -> None:
    rule = _after_some_steps(HoldRule(LAYERS, 8, patient=True))
    rule.came(1, (7, 0), 1000, 100.0)
    assert rule.until(1, 1000) == pytest.approx(100.0 + SKEW)


def test_patience_in_vain_is_given_up_for_longer_each_time() -> None:
    rule = _after_some_steps(HoldRule(LAYERS, 8, patient=True))
    patient = []
    now = 100.0
    for _ in range(40):
        for layer in LAYERS:
            rule.came(layer, (7, 0), 30, now)
            patient.append(rule.until(layer, 30) > now + 3.5)  # beyond any skew there was
            rule.computed(layer, 30, 1.0)
            rule.came(layer, (8, 0), SLOTS, now + 3)
            rule.computed(layer, SLOTS, 1.0)
            now += 5
    waits = [place for place, was in enumerate(patient) if was]
    gaps = [later - before for before, later in pairwise(waits)]
    assert len(waits) < 12
    assert gaps == sorted(gaps)
