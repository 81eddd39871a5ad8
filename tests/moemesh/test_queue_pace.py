"""How long a full queue is said to take."""

from __future__ import annotations

from moemesh.queue_pace import LONGEST, SAMPLES, SHORTEST, QueuePace


def test_without_any_knowledge_it_is_short() -> None:
    assert QueuePace().seconds(100, 5.0) == SHORTEST


def test_as_long_as_those_that_wait_take_at_the_pace_of_those_that_left() -> None:
    pace = QueuePace()
    pace.begin(10.0)
    for number in range(1, 5):
        pace.left(10.0 + number / 2)
    assert pace.seconds(20, 12.0) == 10.0
    assert pace.seconds(20, 14.0) == 20.0, "nobody has left since"
    assert pace.seconds(1, 12.0) == SHORTEST
    assert pace.seconds(1000, 12.0) == LONGEST


def test_only_the_last_ones_count() -> None:
    pace = QueuePace()
    pace.begin(0.0)
    pace.left(1000.0)
    for number in range(SAMPLES):
        pace.left(1000.0 + (number + 1) / 4)
    assert pace.seconds(12, 1000.0 + SAMPLES / 4) == 3.0


def test_an_empty_queue_is_no_slow_one() -> None:
    pace = QueuePace()
    pace.begin(0.0)
    pace.left(0.5)
    pace.begin(1000.0)
    pace.left(1000.0)
    pace.begin(5000.0)
    assert pace.seconds(8, 5000.0) == 4.0, "as before"
    assert pace.seconds(8, 5002.0) == 16.0, "nobody has left for two seconds"
    pace.left(5002.0)
    pace.left(5002.0)
    assert pace.seconds(8, 5002.0) == 8.0
