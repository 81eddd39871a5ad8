"""From spans of sequences to the tables that an attention call reads."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import needs_native, normal

HALF = 8


@pytest.mark.parametrize("until", [(0, 0), (32, 0), (0, 96), (30, 95)], ids=str)
def test_rows_laid_out_know_their_positions_slots_and_angles(until: tuple[int, int]) -> None:
    angles = kernels.Angles(normal(128, HALF), normal(128, HALF, seed=1))
    spans = [kernels.Span(30, 5, [5, 2], until[0]), kernels.Span(95, 1, [1, 7, 3], until[1])]
    batch = kernels.lay_out(spans, angles)
    rows, positions = batch.rows, [*range(30, 35), 95]
    assert (batch.num_rows, batch.half_rope) == (6, HALF)
    assert rows.positions.tolist() == positions
    assert rows.row_sequence.tolist() == [0] * 5 + [1]
    assert rows.slots.tolist() == [190, 191, 64, 65, 66, 127]
    assert rows.block_tables.tolist() == [[5, 2, 0], [1, 7, 3]]
    assert torch.equal(rows.cos, angles.cos[positions])
    assert torch.equal(rows.sin, angles.sin[positions])
    expands = until[0] > 30 or until[1] > 95
    assert batch.expands == expands
    assert (None if rows.expanded_until is None else rows.expanded_until.tolist()) == (list(until) if expands else None)
    twin = reference.lay_out(spans, angles)
    assert all(torch.equal(getattr(rows, name), tensor) for name, tensor in twin.items())


def test_a_batch_of_tensors_is_one_that_was_laid_out() -> None:
    angles = kernels.Angles(normal(128, HALF), normal(128, HALF, seed=1))
    rows = kernels.lay_out([kernels.Span(30, 5, [5, 2], 32)], angles).rows
    batch = kernels.AttentionBatch(rows)
    assert (batch.num_rows, batch.half_rope, batch.expands) == (5, HALF, True)
    assert batch.rows is rows
    with pytest.raises(ValueError, match=r"slots has shape \(4,\), must be \(5,\)"):
        kernels.AttentionBatch(dataclasses.replace(rows, slots=rows.slots[:4]))


@needs_native
def test_positions_without_a_block_or_an_angle_are_refused() -> None:
    for num_positions, start in ((128, 96), (64, 64), (64, -1)):
        angles = kernels.Angles(normal(num_positions, HALF), normal(num_positions, HALF))
        with pytest.raises(ValueError, match="outside its block table"):
            kernels.lay_out([kernels.Span(start, 1, [0, 0, 0])], angles)
