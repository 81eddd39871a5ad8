"""Who is struck, and that the table is sound."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.chaos.scenario import Load, Role, candidates, choose
from tests.chaos.scenarios import IN_CI, SCENARIOS


def mesh(groups: list[list[int]], experts: list[int], *, dead: tuple[int, ...] = ()) -> dict[str, Any]:
    """The JSON of /mesh, as far as it matters."""
    members = {rank for group in groups for rank in group}
    ranks = sorted(members | set(experts))
    roles = {rank: ["attention"] * (rank in members) + ["expert"] * (rank in experts) for rank in ranks}
    states = {rank: "dead" if rank in dead else "up" for rank in ranks}
    shown = [{"rank": rank, "roles": roles[rank], "state": states[rank]} for rank in ranks]
    return {"attention_groups": groups, "ranks": shown}


TWO_GROUPS = mesh([[0, 1], [2, 3]], [0, 1, 2, 3])
APART = mesh([[0, 1]], [2, 3])


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Role.EXPERTS, [1, 3]),
        (Role.EXPERTS_ONLY, []),
        (Role.LEADER, [0, 2]),
        (Role.PEER, [1, 3]),
        (Role.FIRST, [0]),
        (Role.ANY, [0, 1, 2, 3]),
    ],
)
def test_roles_in_two_groups(role: Role, expected: list[int]) -> None:
    assert candidates(role, TWO_GROUPS) == expected


@pytest.mark.parametrize(("role", "expected"), [(Role.EXPERTS_ONLY, [2, 3]), (Role.LEADER, [0]), (Role.PEER, [1])])
def test_roles_where_experts_are_apart(role: Role, expected: list[int]) -> None:
    assert candidates(role, APART) == expected


def test_the_dead_are_not_struck_again() -> None:
    assert candidates(Role.ANY, mesh([[0, 1]], [2, 3], dead=(2,))) == [0, 1, 3]


def test_the_seed_chooses() -> None:
    chosen = [choose(Role.ANY, TWO_GROUPS, 2, random.Random(seed)) for seed in range(20)]
    assert chosen == [choose(Role.ANY, TWO_GROUPS, 2, random.Random(seed)) for seed in range(20)]
    assert len({tuple(ranks) for ranks in chosen}) > 3
    assert all(len(set(ranks)) == 2 for ranks in chosen)


def test_nobody_of_that_role() -> None:
    with pytest.raises(LookupError, match="2 wanted"):
        choose(Role.LEADER, APART, 2, random.Random(0))


def test_requests_are_half_greedy_half_seeded_and_always_the_same() -> None:
    requests = Load().requests()
    assert requests == Load().requests()
    assert len(requests) == 16
    assert sum(request["temperature"] == 0 for request in requests) == 8
    assert all("seed" in request for request in requests if request["temperature"])
    assert len({len(request["prompt"]) for request in requests}) > 2


def test_what_ci_runs_is_declared() -> None:
    assert set(IN_CI) <= set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_judges_something_after_its_events(name: str) -> None:
    scenario = SCENARIOS[name]
    assert scenario.all_checks()
    assert scenario.rival is not None or scenario.checks["recovered"]
