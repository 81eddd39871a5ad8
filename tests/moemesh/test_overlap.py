"""How many micro-batches a step has: what was measured decides, and is measured again."""

from __future__ import annotations

from moemesh.overlap import ENOUGH, LOYALTY, SAMPLES, OverlapRule

ROWS = 32


def _steps(rule: OverlapRule, count: int, *, one: float, two: float, waited: float, rows: int = ROWS) -> list[int]:
    """Run steps that take `one` seconds in one micro-batch and `two` in two; the parts of each."""
    done = []
    for _ in range(count):
        parts = rule.num_parts(rows)
        rule.note(rows, parts, seconds=one if parts == 1 else two, waited=waited if parts == 1 else 0.0)
        done.append(parts)
    return done


def test_one_micro_batch_while_waiting_is_short() -> None:
    rule = OverlapRule((1, 2))
    assert set(_steps(rule, 3 * LOYALTY, one=1.0, two=0.5, waited=0.04)) == {1}


def test_two_are_tried_where_waiting_is_long_and_kept_where_quicker() -> None:
    rule = OverlapRule((1, 2))
    parts = _steps(rule, 3 * SAMPLES, one=1.0, two=0.9, waited=0.3)
    assert parts == [1] * SAMPLES + [2] * 2 * SAMPLES


def test_what_is_not_quicker_is_given_up_for_a_while() -> None:
    rule = OverlapRule((1, 2))
    parts = _steps(rule, LOYALTY, one=1.0, two=1.1, waited=0.3)
    assert parts == [1] * SAMPLES + [2] * ENOUGH + [1] * (LOYALTY - SAMPLES - ENOUGH)


def test_a_choice_is_looked_at_again() -> None:
    rule = OverlapRule((1, 2))
    _steps(rule, LOYALTY, one=1.0, two=0.9, waited=0.3)
    later = _steps(rule, LOYALTY, one=0.8, two=0.9, waited=0.3)
    assert later[0] == 2
    assert later[-1] == 1


def test_one_slow_step_decides_nothing() -> None:
    rule = OverlapRule((1, 2))
    _steps(rule, SAMPLES, one=1.0, two=0.9, waited=0.3)
    rule.note(ROWS, 2, seconds=50.0, waited=0.0)
    assert _steps(rule, LOYALTY // 2, one=1.0, two=0.9, waited=0.3)[-1] == 2


def test_classes_of_rows_are_apart() -> None:
    rule = OverlapRule((1, 2))
    _steps(rule, 3 * SAMPLES, one=1.0, two=0.9, waited=0.3)
    assert rule.num_parts(ROWS) == 2
    assert rule.num_parts(8 * ROWS) == 1


def test_what_was_fixed_stays() -> None:
    for fixed in (1, 2):
        rule = OverlapRule((fixed,))
        assert set(_steps(rule, 3 * SAMPLES, one=1.0, two=0.5, waited=0.5)) == {fixed}
