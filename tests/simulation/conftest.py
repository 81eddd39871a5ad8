"""The simulation's model, written and loaded once."""

from __future__ import annotations

import pytest

from tests.simulation.run import Expected, expectations
from tests.simulation.tiny_model import Model, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_model(tmp_path_factory.mktemp("simulated") / "model"))


@pytest.fixture(scope="session")
def expected(tiny_model: Model) -> Expected:
    return expectations(tiny_model)
