"""The feed-forward networks of all experts that a rank hosts in one layer, computed in one call.

Legend: T rows, S slots = (row, expert) pairs, H hidden, W width of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from kernels import panels, reference
from kernels.reserved import ReservedMemory
from kernels.runtime import Arithmetic, native, native_available, require

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PackedExperts:
    """Room for num_experts experts of one shape, filled one by one with `load`. The object owns its memory; on the CPU
    a slot that is not loaded takes none. One thread may load a slot while another computes with others.

    gate and up are [W, H], down is [H, W]; all have one dtype. float8_e4m3fn and int8 come with scales per block.
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
        arithmetic: Arithmetic = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        panels.check_weight_dtype(dtype)
        if min(num_experts, hidden, width) < 1:
            raise ValueError(f"{num_experts} experts of hidden {hidden} and width {width}: all must be at least 1")
        if (dtype in panels.SCALED) != (block is not None):
            raise ValueError(
                f"dtype {dtype} with block {block}; float8_e4m3fn and int8 need a block size, others have none"
            )
        self.num_experts, self.hidden, self.width = num_experts, hidden, width
        self.dtype, self.block, self.device = dtype, block, torch.device(device)
        self.is_native = self.device.type == "cpu" and native_available()
        self._shapes = ((width, hidden), (width, hidden), (hidden, width))
        self._in_pairs = [panels.lies_in_pairs(dtype, num_in, arithmetic) for _, num_in in self._shapes]
        self._scale_shapes = [_blocks(shape, block) for shape in self._shapes] if block else []
        if self.is_native:
            self._allocate_panels()
        else:
            self._weights = [torch.empty((num_experts, *s), dtype=dtype, device=device) for s in self._shapes]
            self._scales = [torch.empty((num_experts, *shape), device=device) for shape in self._scale_shapes]

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden: int,
        width: int,
        *,
        dtype: torch.dtype,
        block: tuple[int, int] | None = None,
        arithmetic: Arithmetic = "float32",
        device: torch.device | str = "cpu",
    ) -> PackedExperts:
        """Uninitialised experts; every slot must be loaded before it is used."""
        return cls(num_experts, hidden, width, dtype=dtype, block=block, arithmetic=arithmetic, device=device)

    def _allocate_panels(self) -> None:
        """Per expert: [panel of gate, panel of up] for each 32 of the width, then the panels of down."""
        size = panels.panel_bytes(self.hidden, self.dtype)
        down_size = panels.panel_bytes(self.width, self.dtype)
        self._starts = (0, size, panels.num_panels(self.width) * 2 * size)
        self._strides = (2 * size, 2 * size, down_size)
        self._expert_bytes = self._starts[2] + panels.num_panels(self.hidden) * down_size
        self._memory = ReservedMemory(self.num_experts * self._expert_bytes)
        self._data = self._memory.data.view(self.num_experts, -1)
        self._data_at = self._data.data_ptr()
        self._panel_scales = self._allocate_panel_scales()
        words: list[int] = []
        for i in range(3):
            at, scale = self._data.data_ptr() + self._starts[i], self._panel_scale(0, i)
            stride = self._strides[i]
            words += panels.matrix_fields(
                at, self.dtype, self._shapes[i], scale=scale, panel_stride=stride, in_pairs=self._in_pairs[i]
            )
        words += [self.num_experts, self._expert_bytes, self._panel_scales.shape[1]]
        self._struct = torch.tensor(words, dtype=torch.int64)  # struct Experts of csrc/kernels.h
        self.address = self._struct.data_ptr()

    def _allocate_panel_scales(self) -> torch.Tensor:
        """Room for the scales of gate, up and down as the kernel reads them: [E, floats of one expert]."""
        samples = [
            self._block_scale(torch.ones(shape)).for_panels(self._shapes[i][0])
            for i, shape in enumerate(self._scale_shapes)
        ]
        self._scale_samples = samples
        self._scale_starts = (0, *accumulate(sample.scales_PBW.numel() for sample in samples))
        floats = self._scale_starts[-1]
        self._scale_memory = ReservedMemory(self.num_experts * floats * 4)
        return self._scale_memory.data.view(torch.float32).view(self.num_experts, floats)

    def _panel_scale(self, slot: int, i: int) -> panels.PanelScale | None:
        """The scales of matrix i of one expert, a view."""
        if self.block is None:
            return None
        sample = self._scale_samples[i]
        flat = self._panel_scales[slot, self._scale_starts[i] : self._scale_starts[i + 1]]
        return replace(sample, scales_PBW=flat.view(sample.scales_PBW.shape))

    def _block_scale(self, scale_inv: torch.Tensor) -> panels.BlockScale:
        assert self.block is not None
        return panels.BlockScale(scale_inv=scale_inv, rows=self.block[0], cols=self.block[1])

    @property
    def expert_bytes(self) -> int:
        """Bytes that weights and scales of one expert occupy."""
        stored = [self._data, self._panel_scales] if self.is_native else [*self._weights, *self._scales]
        return sum(tensor.nbytes for tensor in stored) // self.num_experts

    def unload(self, slot: int) -> None:
        """The expert in this slot is needed no longer: the slot takes no memory again."""
        if self.is_native:
            self._memory.give_back(slot * self._expert_bytes, (slot + 1) * self._expert_bytes)
            floats = self._scale_starts[-1] * 4
            self._scale_memory.give_back(slot * floats, (slot + 1) * floats)

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
                data = self._data[slot, self._starts[i] :]
                panels.pack_into(data, weight, self._strides[i], in_pairs=self._in_pairs[i])
            else:
                self._weights[i][slot].copy_(weight)

    def load_files(
        self, slots: Sequence[int], places: Sequence[panels.FileWeight], scales: Sequence[Weights] | None = None
    ) -> list[int]:
        """Experts straight from files into their slots, without Python in between: `places` of gate, up and down of
        one after the other, as their dtype is held; `scales` as for `load`. Returns the weights' checksums. CPU only.

        Raises UnreadableWeight, and MemoryError.
        """
        assert self.is_native
        assert len(places) == 3 * len(slots)
        assert (scales is None) == (self.block is None)
        if scales is not None:
            for slot, of_expert in zip(slots, scales, strict=True):
                for i, scale_inv in enumerate(of_expert):
                    self._load_scale(slot, i, scale_inv)
        start = self._data_at
        wanted = []
        for i, place in enumerate(places):
            slot, which = slots[i // 3], i % 3
            at = start + slot * self._expert_bytes + self._starts[which]
            wanted.append((place, self._shapes[which], self._in_pairs[which], at, self._strides[which]))
        return panels.load_files(wanted, self.dtype)

    def _load_scale(self, slot: int, i: int, scale_inv: torch.Tensor) -> None:
        scale = self._block_scale(scale_inv.float())
        scale.check(*self._shapes[i])
        if not self.is_native:
            self._scales[i][slot].copy_(scale_inv)
            return
        place = self._panel_scale(slot, i)
        assert place is not None
        place.scales_PBW.copy_(scale.for_panels(self._shapes[i][0]).scales_PBW)

    def dense(self, slot: int) -> Weights:
        """gate, up and down of one expert as float32 copies."""
        gate, up, down = (self._dense(slot, i) for i in range(3))
        return gate, up, down

    def _dense(self, slot: int, i: int) -> torch.Tensor:
        if not self.is_native:
            scale = self._block_scale(self._scales[i][slot]) if self.block else None
            return panels.dequantize(self._weights[i][slot], scale)
        data, stride, in_pairs = self._data[slot, self._starts[i] :], self._strides[i], self._in_pairs[i]
        weight = panels.unpack(data, *self._shapes[i], dtype=self.dtype, panel_stride=stride, in_pairs=in_pairs)
        return panels.dequantize(weight, self._panel_scale(slot, i))


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
