"""Who is many times slower than its peers, and who only has more to do."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest

from moemesh.slowness import (
    BACKOFF_SECONDS,
    FORGIVEN_SECONDS,
    MOST_REPLACED,
    PERIOD_SECONDS,
    PERIODS,
    Effort,
    Slow,
    Slowness,
    slowest,
)

# (awake, share of that with a processor) of each rank, per second. From a mesh of four ranks on two cores.
HEALTHY = {0: (0.55, 0.74), 1: (0.50, 0.79), 2: (0.53, 0.77), 3: (0.47, 0.83)}
QUOTA = {0: (0.05, 2.0), 1: (0.05, 2.1), 2: (0.04, 2.4), 3: (0.67, 0.03)}
SLOW = "slow: it had a processor for 3.0% of the time that it needed one, its peers for 100%"


class Ranks:
    """Ranks that go on as they are told to."""

    def __init__(self) -> None:
        self.slowness = Slowness()
        self.now = 100.0
        self.efforts: dict[int, Effort] = {}

    def go_on(self, periods: float, rates: Mapping[int, tuple[float, float]]) -> list[Slow | None]:
        """What is said after each period."""
        said = []
        for _ in range(round(periods)):
            for rank, (awake, share) in rates.items():
                before = self.efforts.get(rank, Effort(0, 0))
                added = awake * PERIOD_SECONDS
                self.efforts[rank] = Effort(before.awake + added, before.processor + added * share)
                self.slowness.note(rank, self.efforts[rank])
            self.now += PERIOD_SECONDS
            said.append(self.slowness.look(self.now))
        return said


def ranks() -> Ranks:
    there = Ranks()
    there.go_on(1, HEALTHY)
    return there


def test_nobody_is_slow_in_a_healthy_mesh() -> None:
    assert ranks().go_on(100, HEALTHY) == [None] * 100


def test_a_starved_rank_is_watched_then_replaced() -> None:
    said = ranks().go_on(PERIODS, QUOTA)
    assert said == [Slow(3, SLOW, "watch")] * (PERIODS - 1) + [Slow(3, SLOW, "replace")]


def test_slowness_that_passes_is_forgotten() -> None:
    there = ranks()
    there.go_on(PERIODS - 1, QUOTA)
    assert there.go_on(1, HEALTHY) == [None]
    assert there.go_on(1, QUOTA) == [Slow(3, SLOW, "watch")]


def test_a_period_that_tells_nothing_does_not_count() -> None:
    there = ranks()
    said = []
    for _ in range(PERIODS):
        said += there.go_on(1, QUOTA) + there.go_on(1, QUOTA | {3: (0.1, 0.2)})
    assert None not in said
    assert [one.action for one in said if one].index("replace") == 2 * PERIODS - 2


def test_a_long_turn_is_heard_of_late() -> None:
    there = ranks()
    unheard = QUOTA | {3: (0.0, 0.0)}
    said = []
    for _ in range(PERIODS):
        said += there.go_on(1, QUOTA | {3: (2.0, 0.03)}) + there.go_on(2, unheard)
    assert None not in said
    assert said[-1] is not None
    assert said[-1].action == "replace"


def test_who_is_not_heard_of_for_long_is_not_slow() -> None:
    there = ranks()
    there.go_on(1, QUOTA)
    assert there.go_on(2 * PERIODS, QUOTA | {3: (0.0, 0.0)})[-1] is None


@pytest.mark.parametrize(
    ("rates", "why"),
    [
        (dict.fromkeys(range(16), (1.0, 0.12)), "16 ranks on two cores, all busy"),
        ({rank: (1.0 if rank < 5 else 0.05, 0.1 if rank < 5 else 0.9) for rank in range(16)}, "a third of them busy"),
        ({0: (1.0, 0.95), 1: (0.05, 1.0), 2: (0.04, 1.0), 3: (0.05, 1.0)}, "a chunk of a long prompt"),
        ({0: (1.0, 0.4), 1: (0.05, 1.0), 2: (0.04, 1.0), 3: (0.05, 1.0)}, "a load beside it"),
        ({0: (0.9, 0.9), 1: (0.3, 0.9), 2: (0.3, 0.9), 3: (0.3, 0.9)}, "hot experts"),
        ({0: (0.08, 0.01), 1: (0.3, 0.9), 2: (0.3, 0.9), 3: (0.3, 0.9)}, "it has little to do"),
        ({0: (0.9, 0.01), 1: (0.001, 0.9), 2: (0.001, 0.9)}, "nobody to compare with"),
        ({0: (0.9, 0.01)}, "alone"),
    ],
)
def test_who_has_more_to_do_or_a_busy_host_is_not_slow(rates: dict[int, tuple[float, float]], why: str) -> None:
    assert slowest({rank: Effort(awake, awake * share) for rank, (awake, share) in rates.items()}, 1.0) is None, why


def test_one_block_is_not_slowness_however_long() -> None:
    there = ranks()
    (said,) = there.go_on(1, HEALTHY | {3: (10.0, 0.001)})
    assert said is not None
    assert said.action == "watch"
    assert there.go_on(PERIODS, HEALTHY) == [None] * PERIODS


def test_only_who_is_slow_in_a_row_is_replaced() -> None:
    there = ranks()
    other = {0: QUOTA[3], 1: QUOTA[1], 2: QUOTA[2], 3: QUOTA[0]}
    said = [one for _ in range(PERIODS) for one in there.go_on(2, QUOTA) + there.go_on(2, other)]
    assert {one.action for one in said if one is not None} == {"watch"}


def test_what_was_before_a_change_does_not_count() -> None:
    there = ranks()
    there.go_on(PERIODS - 1, QUOTA)
    there.slowness.begin_anew()
    said = there.go_on(PERIODS + 1, QUOTA)
    assert said[0] is None, "a period begins"
    assert [one.action for one in said[1:] if one] == ["watch"] * (PERIODS - 1) + ["replace"]


def test_a_controller_that_was_away_counts_on() -> None:
    there = ranks()
    for _ in range(PERIODS - 1):
        there.go_on(1, QUOTA)
        there.slowness.pass_over()
        there.go_on(1, HEALTHY)  # all at once: nobody knows when it was
    (said,) = there.go_on(1, QUOTA)
    assert said == Slow(3, SLOW, "replace")


def test_a_rank_that_stays_slow_is_replaced_later_each_time_and_then_kept() -> None:
    there = ranks()
    began, times = there.now, []
    while len(times) < MOST_REPLACED:
        (said,) = there.go_on(1, QUOTA)
        if said is not None and said.action == "replace":
            times.append(there.now - began)
            there.slowness.replaced(3, there.now)
            there.slowness.begin_anew()
            there.go_on(1, QUOTA)
    waits = [after - before for before, after in pairwise(times)]
    assert waits == [pytest.approx(BACKOFF_SECONDS * 2**n, abs=PERIOD_SECONDS) for n in range(MOST_REPLACED - 1)]
    said = there.go_on(FORGIVEN_SECONDS / PERIOD_SECONDS + 100, QUOTA)[PERIODS:]
    assert [one.action for one in said if one] == ["keep"] * len(said)


def test_a_rank_that_is_kept_says_why_and_is_forgiven_in_the_end() -> None:
    there = ranks()
    for _ in range(MOST_REPLACED):
        there.slowness.replaced(3, there.now)
    said = there.go_on(PERIODS, QUOTA)[-1]
    assert said == Slow(3, f"{SLOW}; kept: replacing it {MOST_REPLACED} times has not helped", "keep")
    there.go_on(FORGIVEN_SECONDS / PERIOD_SECONDS + 1, HEALTHY)
    said = there.go_on(PERIODS, QUOTA)[-1]
    assert said == Slow(3, SLOW, "replace")
