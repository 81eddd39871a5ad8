"""Where the rows of an attention call stand: from spans of sequences to the tables that the kernels read.

Legend: T rows, S sequences, P positions, R rotary width.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from kernels import reference
from kernels.runtime import native, require, runs_native

_STRUCT_BYTES = 80  # struct MlaBatch of csrc/kernels.h


class Span(NamedTuple):
    """Positions from `start` on, `num_rows` of them, of one sequence, whose cache blocks are `blocks`.

    Rows at positions before `expanded_until` take the expanded form.
    """

    start: int
    num_rows: int
    blocks: Sequence[int]
    expanded_until: int = 0


@dataclass(frozen=True, eq=False)
class Angles:
    """Cosines and sines float32 [P, R/2] of every position; checked once, here. Raises ValueError."""

    cos: torch.Tensor
    sin: torch.Tensor
    words: tuple[int, int, int, int] | None = field(init=False)  # for the C kernels: both addresses, both sizes

    def __post_init__(self) -> None:
        require(self.cos, "cos", (None, None))
        require(self.sin, "sin", tuple(self.cos.shape))
        words = (self.cos.data_ptr(), self.sin.data_ptr(), *self.cos.shape) if runs_native(self.cos) else None
        object.__setattr__(self, "words", words)


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRows:
    """An attention batch as tensors, over T rows or the S sequences in it.

    positions int32 [T] and their angles, cos and sin float32 [T, R/2]; slots int64 [T] (cache rows to write: block *
    32 + offset); row_sequence int32 [T] (row of block_tables); block_tables int32 [S, blocks].
    expanded_until int32 [S]: rows at positions before it take the expanded form; None: no row does.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    row_sequence: torch.Tensor
    block_tables: torch.Tensor
    expanded_until: torch.Tensor | None = None


class AttentionBatch:
    """Where the rows of one micro-batch stand. Made of tensors, which are checked once, here, or by `lay_out`.

    `expands`: some rows may take the expanded form. `address`: of struct MlaBatch of csrc/kernels.h.
    """

    __slots__ = ("_laid_out", "_rows", "_struct", "address", "expands", "half_rope", "num_rows")

    def __init__(self, rows: BatchRows | LaidOut) -> None:
        self._rows: BatchRows | None = None
        self._laid_out: LaidOut | None = None
        if isinstance(rows, LaidOut):
            self._laid_out = rows
            self.num_rows, self.half_rope, self.expands = rows.num_rows, rows.half_rope, rows.expands
            self.address = rows.memory.buffer_info()[0]
        else:
            self._rows = rows
            self.num_rows, self.half_rope = int(rows.positions.shape[0]), int(rows.cos.shape[1])
            self.expands = rows.expanded_until is not None
            self._struct = _struct_of(rows, self.num_rows)
            self.address = self._struct.data_ptr()

    @property
    def rows(self) -> BatchRows:
        """The batch as tensors."""
        if self._rows is None:
            assert self._laid_out is not None
            self._rows = self._laid_out.tensors()
        return self._rows


class LaidOut(NamedTuple):
    """What op_lay_out of csrc/ops_layers.c writes: struct MlaBatch and, behind it, what it points at."""

    memory: array[int]
    num_rows: int
    num_sequences: int
    max_blocks: int
    half_rope: int
    expands: bool

    def tensors(self) -> BatchRows:
        """Views of the memory."""
        tables, angles = self.num_sequences * self.max_blocks, self.num_rows * self.half_rope
        data = torch.frombuffer(self.memory, dtype=torch.uint8)[_STRUCT_BYTES:]
        slots, rest = data[: 8 * self.num_rows].view(torch.int64), data[8 * self.num_rows :]
        sizes = [self.num_rows, self.num_rows, tables, self.num_sequences, angles, angles]
        pieces = rest[: 4 * sum(sizes)].view(torch.int32).split_with_sizes(sizes)
        positions, row_sequence, block_tables, until, cos, sin = pieces
        return BatchRows(
            positions=positions,
            cos=cos.view(torch.float32).view(self.num_rows, self.half_rope),
            sin=sin.view(torch.float32).view(self.num_rows, self.half_rope),
            slots=slots,
            row_sequence=row_sequence,
            block_tables=block_tables.view(self.num_sequences, self.max_blocks),
            expanded_until=until if self.expands else None,
        )


def lay_out(spans: Sequence[Span], angles: Angles) -> AttentionBatch:
    """The positions of all spans as rows, span after span. Nothing is expanded where no row is before its span's
    `expanded_until`. Raises ValueError on a position outside its blocks (native only).
    """
    if angles.words is None:
        return AttentionBatch(_lay_out_by_torch(spans, angles))
    described = array("i")
    num_rows, max_blocks, expands = 0, 1, False
    for start, count, blocks, until in spans:
        num_blocks = len(blocks)
        described.extend((start, count, until, num_blocks))
        described.extend(blocks)
        num_rows += count
        max_blocks = max(max_blocks, num_blocks)
        expands |= start < until
    num_spans, half = len(spans), angles.words[3]
    words = 2 * num_rows + num_spans * (max_blocks + 1) + 2 * num_rows * half
    memory = array("q", bytes((_STRUCT_BYTES + 8 * num_rows + 4 * words + 7) // 8 * 8))
    native.lay_out(
        described.buffer_info()[0],
        num_spans,
        max_blocks,
        num_rows,
        int(expands),
        *angles.words,
        memory.buffer_info()[0],
    )
    return AttentionBatch(LaidOut(memory, num_rows, num_spans, max_blocks, half, expands))


def _lay_out_by_torch(spans: Sequence[Span], angles: Angles) -> BatchRows:
    until = None
    if any(span.start < span.expanded_until for span in spans):
        lengths = [span.expanded_until for span in spans]
        until = torch.tensor(lengths, dtype=torch.int32, device=angles.cos.device)
    return BatchRows(**reference.lay_out(spans, angles), expanded_until=until)


def _struct_of(rows: BatchRows, num_rows: int) -> torch.Tensor:
    """The struct that points at the tensors; ValueError where one does not fit the others."""
    until = rows.expanded_until
    require(rows.positions, "positions", (num_rows,), torch.int32)
    require(rows.cos, "cos", (num_rows, None))
    require(rows.sin, "sin", tuple(rows.cos.shape))
    require(rows.slots, "slots", (num_rows,), torch.int64)
    require(rows.row_sequence, "row_sequence", (num_rows,), torch.int32)
    require(rows.block_tables, "block_tables", (None, None), torch.int32)
    if until is not None:
        require(until, "expanded_until", (rows.block_tables.shape[0],), torch.int32)
    tensors = (rows.positions, rows.cos, rows.sin, rows.slots, rows.row_sequence, rows.block_tables)
    addresses = [tensor.data_ptr() for tensor in tensors]
    words = [*addresses, 0 if until is None else until.data_ptr(), num_rows, *rows.block_tables.shape]
    return torch.tensor(words, dtype=torch.int64)
