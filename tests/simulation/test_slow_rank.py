"""One rank crawls for long: it is replaced, whatever its part; nobody else is, and nobody who only has more to do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.run import Expected, Outcome, play
from tests.simulation.scenario import Ask, Fault, Scenario
from tests.simulation.tiny_model import Model, requests

LONG = 30.0
TWO_GROUPS = {"num_ranks": 4, "attention_tp": 2, "num_cache_blocks": 32}
EXPERTS_APART = {"num_ranks": 4, "attention_tp": 2, "attention_ranks": 2, "num_cache_blocks": 32}
LEADERS_APART = {"num_ranks": 4, "attention_tp": 1, "attention_ranks": 2, "num_cache_blocks": 32}


def asks() -> tuple[Ask, ...]:
    """Enough to do for as long as it takes."""
    return tuple(Ask(request=number % len(requests()), at=0.1 * number) for number in range(120))


def played(model: Model, expected: Expected, fields: dict[str, Any], rank: int, strength: float) -> Outcome:
    slow = Fault(kind="slow", at=0.5, seconds=LONG, rank=rank, strength=strength)
    scenario = Scenario(seed=1, mesh_fields=fields, asks=asks(), faults=(slow,), respawn=True)
    outcome = play(model, scenario, expected)
    assert not outcome.complaints, str(outcome)
    return outcome


def dead(outcome: Outcome) -> list[str]:
    """Who was given up, but for new processes that did not come."""
    return [event for _, event in outcome.history.story if "suspect -> dead" in event]


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        pytest.param(TWO_GROUPS, 2, id="leader"),
        pytest.param(TWO_GROUPS, 1, id="peer"),
        pytest.param(EXPERTS_APART, 0, id="leader-without-experts"),
        pytest.param(EXPERTS_APART, 1, id="peer-without-experts"),
        pytest.param(EXPERTS_APART, 3, id="experts-alone"),
        pytest.param(LEADERS_APART, 1, id="group-of-one"),
    ],
)
def test_a_rank_that_crawls_is_replaced(
    tiny_model: Model, expected: Expected, fields: dict[str, Any], rank: int
) -> None:
    (death,) = dead(played(tiny_model, expected, fields, rank, 20.0))
    assert f"rank {rank}: suspect -> dead: slow: it had a processor for 5.0% of the time" in death


@pytest.mark.parametrize("rank", range(4))
def test_three_times_slower_is_no_reason(tiny_model: Model, expected: Expected, rank: int) -> None:
    assert dead(played(tiny_model, expected, TWO_GROUPS, rank, 3.0)) == []
