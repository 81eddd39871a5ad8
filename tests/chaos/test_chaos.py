"""One repetition of every scenario that a mesh must survive by now, on the real thing."""

from __future__ import annotations

import pytest

from tests.chaos.report import story
from tests.chaos.runner import References, run_scenario
from tests.chaos.scenarios import IN_CI, SCENARIOS

SEED = 0


@pytest.fixture(scope="module")
def references() -> References:
    return References()


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_scenario(name: str, references: References) -> None:
    result = run_scenario(SCENARIOS[name], SEED, references)
    assert result.passed, story(result)
