"""The feed-forward networks of all experts that a rank hosts in one layer, computed in one call.

Legend: T rows, S slots = (row, expert) pairs, H hidden, W width of an expert, E experts.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from kernels import panels, reference
from kernels.runtime import native, native_available, require

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PackedExperts:
    """Memory for num_experts experts of one shape, filled one by one with `load`. The object owns its memory.

    gate and up are [W, H], down is [H, W]; all have one dtype. float8_e4m3fn comes with scales per block.
    A dense or shared feed-forward network is the case of one expert.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        width: int,
        *,
        dtype: torch.dtype,
        block: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        panels.check_weight_dtype(dtype)
        if min(num_experts, hidden, width) < 1:
            raise ValueError(f"{num_experts} experts of hidden {hidden} and width {width}: all must be at least 1")
        if (dtype == torch.float8_e4m3fn) != (block is not None):
            raise ValueError(f"dtype {dtype} with block {block}; float8_e4m3fn needs a block size, others have none")
        self.num_experts, self.hidden, self.width = num_experts, hidden, width
        self.dtype, self.block, self.device = dtype, block, torch.device(device)
        self.is_native = self.device.type == "cpu" and native_available()
        self._shapes = ((width, hidden), (width, hidden), (hidden, width))
        self._scale_shapes = [_blocks(shape, block) for shape in self._shapes] if block else []
        if self.is_native:
            self._allocate_panels()
        else:
            self._weights = [torch.empty((num_experts, *s), dtype=dtype, device=device) for s in self._shapes]
        scales = [torch.ones((num_experts, *shape), device=self.device) for shape in self._scale_shapes]
        self._scales = scales  # as the checkpoint has them

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden: int,
        width: int,
        *,
        dtype: torch.dtype,
        block: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedExperts:
        """Uninitialised experts; every slot must be loaded before it is used."""
        return cls(num_experts, hidden, width, dtype=dtype, block=block, device=device)

    def _allocate_panels(self) -> None:
        """Per expert: [panel of gate, panel of up] for each 32 of the width, then the panels of down."""
        size = panels.panel_bytes(self.hidden, self.dtype)
        down_size = panels.panel_bytes(self.width, self.dtype)
        self._starts = (0, size, panels.num_panels(self.width) * 2 * size)
        self._strides = (2 * size, 2 * size, down_size)
        self._expert_bytes = self._starts[2] + panels.num_panels(self.hidden) * down_size
        self._data = panels.allocate(self.num_experts * self._expert_bytes).view(self.num_experts, -1)
        fields = [
            panels.matrix_fields(
                self._data.data_ptr() + self._starts[i], self.dtype, *self._shapes[i], panel_stride=self._strides[i]
            )
            for i in range(3)
        ]
        expert_scales = self._allocate_panel_scales(fields) if self.block else 0
        words = [*fields[0], *fields[1], *fields[2], self.num_experts, self._expert_bytes, expert_scales]
        self._struct = torch.tensor(words, dtype=torch.int64)  # struct Experts of csrc/kernels.h
        self.address = self._struct.data_ptr()

    def _allocate_panel_scales(self, fields: list[list[int]]) -> int:
        """Lay out the scales of an expert (gate, up, down); returns floats per expert."""
        patterns = [self._block_scale(torch.ones(shape)) for shape in self._scale_shapes]
        samples = [scale.for_panels(shape[0]) for scale, shape in zip(patterns, self._shapes, strict=True)]
        starts = [0, *accumulate(sample.numel() for sample in samples)]
        self._panel_scales = torch.ones((self.num_experts, starts[-1]))
        self._scale_starts = starts
        for i, sample in enumerate(samples):
            at = self._panel_scales.data_ptr() + 4 * starts[i]
            panels.set_scale_fields(fields[i], at, sample[0].numel(), patterns[i])
        return starts[-1]

    def _block_scale(self, scale_inv: torch.Tensor) -> panels.BlockScale:
        assert self.block is not None
        return panels.BlockScale(scale_inv=scale_inv, rows=self.block[0], cols=self.block[1])

    @property
    def nbytes(self) -> int:
        """Bytes that weights and scales occupy."""
        stored = [self._data, *([self._panel_scales] if self.block else [])] if self.is_native else self._weights
        return sum(tensor.nbytes for tensor in [*stored, *self._scales])

    def load(
        self, slot: int, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scales: Weights | None = None
    ) -> None:
        """Copy one expert in; `scales` are the scale_inv of gate, up and down. Raises ValueError on a wrong shape."""
        if not 0 <= slot < self.num_experts:
            raise ValueError(f"expert slot {slot} does not exist; there are {self.num_experts}")
        if (scales is None) != (self.block is None):
            raise ValueError(f"experts of dtype {self.dtype}: scales are {'missing' if self.block else 'not expected'}")
        for i, (name, weight) in enumerate(zip(("gate", "up", "down"), (gate, up, down), strict=True)):
            if weight.dtype != self.dtype or tuple(weight.shape) != self._shapes[i]:
                have, want = f"{weight.dtype} {tuple(weight.shape)}", f"{self.dtype} {self._shapes[i]}"
                raise ValueError(f"{name} of expert slot {slot} is {have}, must be {want}")
            if scales is not None:
                self._load_scale(slot, i, scales[i])
            if self.is_native:
                panels.pack_into(self._data[slot, self._starts[i] :], weight, self._strides[i])
            else:
                self._weights[i][slot].copy_(weight)

    def _load_scale(self, slot: int, i: int, scale_inv: torch.Tensor) -> None:
        scale = self._block_scale(scale_inv.float())
        scale.check(*self._shapes[i])
        self._scales[i][slot].copy_(scale_inv)
        if self.is_native:
            flat = scale.for_panels(self._shapes[i][0]).view(-1)
            start = self._scale_starts[i]
            self._panel_scales[slot, start : start + flat.numel()] = flat

    def dense(self, slot: int) -> Weights:
        """gate, up and down of one expert as float32 copies."""
        result = []
        for i, (num_out, num_in) in enumerate(self._shapes):
            if self.is_native:
                data, stride = self._data[slot, self._starts[i] :], self._strides[i]
                weight = panels.unpack(data, num_out, num_in, dtype=self.dtype, panel_stride=stride)
            else:
                weight = self._weights[i][slot]
            scale = self._block_scale(self._scales[i][slot]) if self.block else None
            result.append(panels.dequantize(weight, scale))
        return result[0], result[1], result[2]


def grouped_ffn(
    x_TH: torch.Tensor,
    experts: PackedExperts,
    slot_rows_S: torch.Tensor,
    slot_experts_S: torch.Tensor,
    *,
    place_of: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_SH: slot s is down(silu(gate(x)) * up(x)) of row slot_rows[s] by expert slot_experts[s], in any order.

    The indices are int32. With `place_of` (int32, on the CPU) slot_experts are names, and expert e is the one at
    place_of[e]. Each slot's bits depend on its row and expert alone; each expert that has slots is read once. Raises
    ValueError on indices out of range (native only).
    """
    require(x_TH, "x", (None, experts.hidden))
    require(slot_rows_S, "slot_rows", (None,), torch.int32)
    num_slots = slot_rows_S.shape[0]
    require(slot_experts_S, "slot_experts", (num_slots,), torch.int32)
    if not experts.is_native:
        return reference.grouped_ffn(x_TH, experts, slot_rows_S, _places(slot_experts_S, place_of))
    y_SH = torch.empty((num_slots, experts.hidden))
    native.grouped_ffn(
        experts.address,
        x_TH.data_ptr(),
        x_TH.shape[0],
        slot_rows_S.data_ptr(),
        slot_experts_S.data_ptr(),
        0 if place_of is None else place_of.data_ptr(),
        0 if place_of is None else place_of.shape[0],
        num_slots,
        y_SH.data_ptr(),
    )
    return y_SH


def ffn(x_TH: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """y_TH: every row through the only expert of a bank of one, a dense or shared feed-forward network."""
    require(x_TH, "x", (None, experts.hidden))
    if experts.num_experts != 1:
        raise ValueError(f"a plain feed-forward network is a bank of 1 expert, this one has {experts.num_experts}")
    num_rows = x_TH.shape[0]
    if not experts.is_native:
        return reference.ffn(x_TH, experts)
    y_TH = torch.empty((num_rows, experts.hidden))
    native.grouped_ffn(experts.address, x_TH.data_ptr(), num_rows, 0, 0, 0, 0, num_rows, y_TH.data_ptr())
    return y_TH


def _places(experts: torch.Tensor, place_of: torch.Tensor | None) -> torch.Tensor:
    return experts if place_of is None else place_of.to(experts.device)[experts.long()]


def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
