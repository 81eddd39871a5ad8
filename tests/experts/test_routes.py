from __future__ import annotations

import pytest

from experts.routes import LONGEST_SUSPICION, Routes
from mesh_config import Placement

PLACEMENT = Placement(version=1, num_ranks=3, hosts={1: ((0, 1), (1,), (2, 0))})
LIVING = {0: 0, 1: 0, 2: 0}


@pytest.fixture
def routes() -> Routes:
    return Routes(PLACEMENT, LIVING)


def _table(routes: Routes) -> list[int]:
    table: list[int] = routes.table(1).tolist()
    return table


def test_the_first_host_is_asked(routes: Routes) -> None:
    assert _table(routes) == [0, 1, 2]
    assert routes.num_destinations == 3
    assert [routes.host(1, 0, besides=tried) for tried in ((), (0,), (0, 1))] == [0, 1, None]


def test_suspects_are_asked_only_where_there_is_no_other(routes: Routes) -> None:
    routes.suspect(0, 10.0)
    routes.suspect(1, 10.0)
    assert _table(routes) == [0, 1, 2]
    routes.suspect(2, 10.0)
    routes.forgive(10.5)
    assert routes.host(1, 2) == 2
    routes.forgive(11.0)
    assert _table(routes) == [0, 1, 2]


def test_suspicion_lasts_longer_each_time_it_comes_back(routes: Routes) -> None:
    now, lasted = 0.0, []
    for _ in range(9):
        routes.suspect(2, now)
        began = now
        while _table(routes)[2] != 2:
            now += 0.5
            routes.forgive(now)
        lasted.append(now - began)
    assert lasted[:4] == [1.0, 2.0, 4.0, 8.0]
    assert lasted[-1] == LONGEST_SUSPICION
    now += 2 * LONGEST_SUSPICION
    routes.suspect(2, now)
    routes.forgive(now + 1.0)
    assert _table(routes)[2] == 2


def test_what_is_lost_is_never_asked(routes: Routes) -> None:
    routes.suspect(1, None)
    assert _table(routes) == [0, routes.nobody, 2]
    assert routes.num_destinations == 4
    routes.suspect(1, 5.0)
    routes.forgive(1e9)
    assert routes.lost(1)
    routes.follow(PLACEMENT.without({1}), {0: 0, 2: 0})
    assert _table(routes) == [0, routes.nobody, 2]
    routes.follow(PLACEMENT, {**LIVING, 1: 1})
    assert _table(routes) == [0, 1, 2]
    assert not routes.lost(1)


def test_a_new_life_is_no_suspect(routes: Routes) -> None:
    routes.suspect(2, 0.0)
    routes.follow(PLACEMENT, {**LIVING, 2: 1})
    assert _table(routes) == [0, 1, 2]
