from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_config import ConfigError, Placement, even_placement


def sizes(placement: Placement, layer: int, ranks: list[int]) -> list[int]:
    return [len(placement.experts_on(layer, rank)) for rank in ranks]


def test_ten_experts_on_four_ranks() -> None:
    placement = even_placement(10, (1, 2, 3), (0, 1, 2, 3), 4)
    assert sizes(placement, 1, [0, 1, 2, 3]) == [3, 3, 2, 2]
    assert sizes(placement, 2, [0, 1, 2, 3]) == [2, 2, 3, 3]
    assert placement.experts_on(1, 0) == (0, 1, 2)
    assert placement.ranks_of(1) == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)


@given(
    num_experts=st.integers(1, 60),
    num_layers=st.integers(1, 9),
    ranks=st.sets(st.integers(0, 15), min_size=1).map(sorted),
)
def test_every_expert_once_and_even(num_experts: int, num_layers: int, ranks: list[int]) -> None:
    layers = tuple(range(3, 3 + num_layers))
    placement = even_placement(num_experts, layers, ranks, 16)
    assert placement.moe_layers == layers
    totals = [0] * len(ranks)
    for layer in layers:
        hosted = [placement.experts_on(layer, rank) for rank in ranks]
        assert sorted(expert for part in hosted for expert in part) == list(range(num_experts))
        assert all(part == tuple(range(part[0], part[-1] + 1)) for part in hosted if part)
        counts = [len(part) for part in hosted]
        assert max(counts) - min(counts) <= 1
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    assert max(totals) - min(totals) <= 1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        even_placement(4, (0,), (), 2)
    with pytest.raises(ConfigError, match="only once"):
        even_placement(4, (0,), (1, 1), 2)
    with pytest.raises(ConfigError, match=r"rank 2 is not among 0\.\.1"):
        even_placement(4, (0,), (1, 2), 2)
