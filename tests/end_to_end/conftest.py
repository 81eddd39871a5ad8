"""Meshes that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.harness import Mesh, running_server


@pytest.fixture(scope="session")
def demo() -> Iterator[Mesh]:
    """The bundled demo model on one rank with a large cache: the reference of all other shapes."""
    with running_server("--num-gpu-blocks-override", "2048") as mesh:
        yield mesh
