"""Shards, subtrees and rows: every split covers, and no split changes a bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transport.shards import Range, maximal_subtrees, owned_shards, row_split, tree_sum

POWERS = st.sampled_from([1, 2, 4, 8, 16])


@given(st.integers(0, 1000), st.integers(1, 20))
def test_rows_are_split_evenly_and_in_order(num_rows: int, num_members: int) -> None:
    split = row_split(num_rows, num_members)
    assert [split[0][0], *(stop for _, stop in split)] == [*(start for start, _ in split), num_rows]
    sizes = [stop - start for start, stop in split]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(POWERS, st.data())
def test_subtrees_are_aligned_maximal_and_cover(num_shards: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, num_shards))
    high = data.draw(st.integers(low, num_shards))
    subtrees = maximal_subtrees(low, high, num_shards)
    assert [shard for a, b in subtrees for shard in range(a, b)] == list(range(low, high))
    for a, b in subtrees:
        size = b - a
        assert size & (size - 1) == 0
        assert a % size == 0
        parent = a - a % (2 * size)
        assert size == num_shards or parent < low or parent + 2 * size > high


@given(POWERS, st.integers(0, 2**31), st.integers(1, 3))
def test_sum_has_the_same_bits_for_every_degree(num_shards: int, seed: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = {(i, i + 1): torch.randn(num_rows, 7, generator=generator) for i in range(num_shards)}
    truth = tree_sum(leaves, num_shards)
    for tp in range(1, num_shards + 1):
        parts: dict[Range, torch.Tensor] = {}
        for member in range(tp):
            for low, high in maximal_subtrees(*owned_shards(num_shards, tp, member), num_shards):
                below = {(a - low, b - low): leaf for (a, b), leaf in leaves.items() if low <= a < high}
                parts[low, high] = tree_sum(below, high - low)
        assert torch.equal(tree_sum(parts, num_shards), truth)
    assert torch.allclose(truth, torch.stack(list(leaves.values())).sum(0), atol=1e-4)


def test_inputs_are_left_alone() -> None:
    parts = {(0, 1): torch.ones(2), (1, 2): torch.ones(2)}
    tree_sum(parts, 2)
    assert all(torch.equal(part, torch.ones(2)) for part in parts.values())


def test_worked_example() -> None:
    owned = [maximal_subtrees(*owned_shards(8, 3, member), 8) for member in range(3)]
    assert owned == [[(0, 2)], [(2, 4), (4, 5)], [(5, 6), (6, 8)]]


def test_missing_shards_and_impossible_degrees_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shard 1 of 2 is in none of the subtrees \[\(0, 1\)\]"):
        tree_sum({(0, 1): torch.ones(1)}, 2)
    with pytest.raises(ValueError, match=r"member 0 of 5 cannot share 4 logical shards"):
        owned_shards(4, 5, 0)
    for low, high, num_shards in ((0, 1, 6), (2, 1, 4), (0, 5, 4), (0, 0, 0)):
        with pytest.raises(ValueError, match="not a range of a tree"):
            maximal_subtrees(low, high, num_shards)
