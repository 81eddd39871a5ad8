from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.round_trips import FIRST_DEADLINE, LONGEST_DEADLINE, PATIENCE, SHORTEST_DEADLINE, RoundTrips


def test_before_anything_was_seen_a_peer_has_time() -> None:
    assert RoundTrips().deadline(5) == pytest.approx(FIRST_DEADLINE)


def test_a_steady_peer_is_late_after_three_round_trips() -> None:
    trips = RoundTrips()
    for _ in range(100):
        trips.observe(100, 0.2)
    assert trips.deadline(100) == pytest.approx(PATIENCE * 0.2, rel=0.01)


def test_larger_calls_take_longer() -> None:
    trips = RoundTrips()
    for _ in range(100):
        trips.observe(64, 0.05)
    assert trips.deadline(64) == pytest.approx(0.15, rel=0.01)
    assert trips.deadline(512) == pytest.approx(8 * 0.15, rel=0.01)
    assert trips.deadline(1) == pytest.approx(0.15, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 100)), max_size=30), st.integers(1, 10_000))
def test_deadlines_are_bounded(seen: list[tuple[int, float]], num_slots: int) -> None:
    trips = RoundTrips()
    for slots, seconds in seen:
        trips.observe(slots, seconds)
    assert SHORTEST_DEADLINE <= trips.deadline(num_slots) <= LONGEST_DEADLINE
