"""Weights in panels: the memory layout that the C kernels read (csrc/kernels.h, Matrix).

Legend: N rows of a weight (outputs), K columns (inputs), P panels = ceil(N / 32).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.runtime import Arithmetic, native

PANEL = 32
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.int8: 4}
PAIRS_KIND, PAIR_STEP = 5, 32
SCALED = (torch.float8_e4m3fn, torch.int8)
_INTERLEAVED = (torch.bfloat16, torch.float8_e4m3fn)
HUGE_PAGE = 2 << 20
_OUTCOME, _FILE_WEIGHT_WORDS = 9, 11


def check_weight_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernels read weights of this dtype."""
    if dtype not in KINDS:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in KINDS)
        raise ValueError(f"weights of dtype {dtype} are not supported; convert them to one of {known}")


def lies_in_pairs(dtype: torch.dtype, piece: int, arithmetic: Arithmetic) -> bool:
    """Whether a weight is stored, and multiplied, in pairs of inputs; `piece`: inputs that are summed in one go."""
    return arithmetic == "bf16x3" and dtype == torch.bfloat16 and piece % PAIR_STEP == 0


def num_panels(num_out: int) -> int:
    return -(-num_out // PANEL)


def panel_bytes(num_in: int, dtype: torch.dtype) -> int:
    """Bytes of one panel of a matrix with num_in columns."""
    return num_in * PANEL * dtype.itemsize


def allocate(num_bytes: int) -> torch.Tensor:
    """Uninitialised bytes, aligned and on huge pages where that is worth it (fewer TLB misses when streaming)."""
    if num_bytes < 2 * HUGE_PAGE or native is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    whole = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    data = whole[start : start + num_bytes]
    native.advise_huge_pages(data.data_ptr(), num_bytes)
    return data


def _elements(num_in: int, dtype: torch.dtype, in_pairs: bool) -> tuple[int, int, int, int]:
    """What packing is told of a row: number and bytes of its elements, whether panels interleave them, whether NaN is
    refused. A pair is one element."""
    if in_pairs:
        return num_in // 2, 2 * dtype.itemsize, 0, 0
    return num_in, dtype.itemsize, int(dtype in _INTERLEAVED), int(dtype == torch.float8_e4m3fn)


def pack_into(panels: torch.Tensor, weight_NK: torch.Tensor, panel_stride: int, *, in_pairs: bool) -> None:
    """Copy a weight (CPU, last dim contiguous) to panels that begin at panels[0], panel_stride bytes apart."""
    if weight_NK.stride(1) != 1:
        weight_NK = weight_NK.contiguous()
    num_out, num_in = weight_NK.shape
    native.pack(
        weight_NK.data_ptr(),
        weight_NK.stride(0) * weight_NK.element_size(),
        num_out,
        *_elements(num_in, weight_NK.dtype, in_pairs),
        panels.data_ptr(),
        panel_stride,
    )


@dataclass(frozen=True, slots=True)
class FileWeight:
    """Where a whole matrix lies, row by row, in an open file."""

    file: int
    offset: int


class UnreadableWeight(Exception):
    """The weight at `index` of those that were to be loaded cannot be: `reason`."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"weight {index} {reason}")
        self.index = index
        self.reason = reason


FileTarget = tuple[FileWeight, tuple[int, int], bool, int, int]


def load_files(weights: Sequence[FileTarget], dtype: torch.dtype) -> list[int]:
    """Matrices from files to panels, and their checksums: of each its place, its shape [N, K], whether it lies in
    pairs, the address of its panels and the bytes between two. One call for all of them, which needs no Python in
    between.

    Raises UnreadableWeight, and MemoryError.
    """
    jobs = array("q")  # struct FileWeight of csrc/ops.h; made without torch, whose every operation lets go of the GIL
    for place, (num_out, num_in), in_pairs, address, stride in weights:
        elements = _elements(num_in, dtype, in_pairs)
        jobs.extend((place.file, place.offset, num_out, *elements, address, stride, 0, 0))
    native.load(jobs.buffer_info()[0], len(weights))
    for index, outcome in enumerate(jobs[_OUTCOME::_FILE_WEIGHT_WORDS]):
        if outcome == -1:
            raise UnreadableWeight(index, "is truncated: its file ends before it does")
        if outcome == -2:
            raise UnreadableWeight(index, "contains NaN, which no fp8 weight may")
        if outcome == -3:
            raise MemoryError("there is no memory for a weight")
        if outcome:
            raise UnreadableWeight(index, f"cannot be read: {os.strerror(outcome)}")
    return [checksum & (2**64 - 1) for checksum in jobs[_OUTCOME + 1 :: _FILE_WEIGHT_WORDS]]


def unpack(
    panels: torch.Tensor, num_out: int, num_in: int, *, dtype: torch.dtype, panel_stride: int, in_pairs: bool
) -> torch.Tensor:
    """The weight [N, K] that pack_into was given."""
    count, size, interleaved, _ = _elements(num_in, dtype, in_pairs)
    rows = panels.as_strided((num_panels(num_out), count * PANEL * size), (panel_stride, 1))
    stored_PKC = rows.reshape(-1, count, PANEL, size)
    column = torch.arange(PANEL)
    place = torch.where(column < 16, 2 * column, 2 * column - 31) if interleaved else column
    weight = stored_PKC[:, :, place].transpose(1, 2).reshape(-1, count, size)[:num_out]
    return weight.contiguous().view(dtype).view(num_out, num_in)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScale:
    """Scales of an fp8 or int8 weight [N, K], one for each block of `rows` by `cols` elements.

    Element (n, k) is worth weight * scale_inv[(n + row_phase) // rows, (k + col_phase) // cols]; the phases say where
    the weight lies in its first block when it is a slice of a larger matrix.
    """

    scale_inv: torch.Tensor
    rows: int
    cols: int
    row_phase: int = 0
    col_phase: int = 0

    def check(self, num_out: int, num_in: int) -> None:
        """Raise ValueError unless the scales cover exactly the blocks that a weight [num_out, num_in] touches."""
        want = (-(-(num_out + self.row_phase) // self.rows), -(-(num_in + self.col_phase) // self.cols))
        have = tuple(self.scale_inv.shape)
        if have != want:
            raise ValueError(
                f"scale_inv has shape {have}, must be {want} for a weight of ({num_out}, {num_in}) at offset "
                f"({self.row_phase}, {self.col_phase}) of its block of ({self.rows}, {self.cols}); "
                "pass the scales of exactly the blocks that the weight touches"
            )

    @property
    def nbytes(self) -> int:
        return self.scale_inv.nbytes

    def to(self, device: torch.device) -> BlockScale:
        """The same scales on another device."""
        return replace(self, scale_inv=self.scale_inv.to(device))

    def transposed(self) -> BlockScale:
        """The scales of the transposed weight [K, N]."""
        return BlockScale(
            scale_inv=self.scale_inv.T,
            rows=self.cols,
            cols=self.rows,
            row_phase=self.col_phase,
            col_phase=self.row_phase,
        )

    def expand(self, num_out: int, num_in: int) -> torch.Tensor:
        """The scale of each element, [N, K]."""
        device = self.scale_inv.device
        row = (torch.arange(num_out, device=device) + self.row_phase) // self.rows
        col = (torch.arange(num_in, device=device) + self.col_phase) // self.cols
        return self.scale_inv.float()[row][:, col]

    def scale_width(self) -> int:
        """1 when all columns of any panel share their scale, else 32."""
        return 1 if self.rows % PANEL == 0 and self.row_phase % PANEL == 0 else PANEL

    def for_panels(self, num_out: int) -> PanelScale:
        """The same scales as the kernel reads them."""
        width = self.scale_width()
        first = torch.arange(num_panels(num_out) * width) * (PANEL // width)
        row = (first.clamp(max=num_out - 1) + self.row_phase) // self.rows
        scales = self.scale_inv.float()[row]
        scales_PBW = scales.view(-1, width, scales.shape[1]).transpose(1, 2).contiguous()
        return PanelScale(scales_PBW=scales_PBW, cols=self.cols, col_phase=self.col_phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelScale:
    """Scales in the order of panels: P panels, B blocks along K, W = 1 where a panel's columns share them, else 32."""

    scales_PBW: torch.Tensor
    cols: int
    col_phase: int

    @property
    def nbytes(self) -> int:
        return self.scales_PBW.nbytes

    def expand(self, num_out: int, num_in: int) -> torch.Tensor:
        """The scale of each element, [N, K]."""
        row, col = torch.arange(num_out), (torch.arange(num_in) + self.col_phase) // self.cols
        return self.scales_PBW[row // PANEL, :, row % self.scales_PBW.shape[2]][:, col]


def dequantize(weight_NK: torch.Tensor, scale: BlockScale | PanelScale | None) -> torch.Tensor:
    """The weight in float32, fp8 and int8 elements multiplied with their block's scale."""
    dense = weight_NK.float()
    return dense if scale is None else dense * scale.expand(*weight_NK.shape)


def matrix_fields(
    panels_at: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
    *,
    scale: PanelScale | None = None,
    num_shards: int = 1,
    panel_stride: int,
    in_pairs: bool,
) -> list[int]:
    """The struct Matrix of a weight [N, K] = shape, as int64 words in the order of csrc/kernels.h."""
    scale_words = (0, 0, 0, 0, 1)
    if scale is not None:
        num_blocks, width = scale.scales_PBW.shape[1:]
        scale_words = (scale.scales_PBW.data_ptr(), num_blocks * width, scale.cols, scale.col_phase, width)
    kind = PAIRS_KIND if in_pairs else KINDS[dtype]
    return [panels_at, scale_words[0], kind, *shape, num_shards, panel_stride, *scale_words[1:]]
