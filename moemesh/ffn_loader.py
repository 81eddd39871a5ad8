"""Feed-forward networks from a checkpoint into banks: dense, shared and routed ones alike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

import kernels
from mesh_config import ModelConfig
from moemesh.checkpoint import CheckpointError, StoredWeight
from moemesh.shard_file import TensorInfo
from moemesh.weight_names import expert_prefix

STORED_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_PROJECTIONS = ("gate", "up", "down")


class Reader(Protocol):
    """What weights are read from: a checkpoint, or the books kept on it."""

    def weight(
        self,
        name: str,
        *,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        unit: int | None = None,
    ) -> StoredWeight: ...

    def float32(
        self, name: str, *, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> Tensor: ...

    def place(self, name: str) -> kernels.FileWeight: ...

    def was_read(self, name: str, checksum: int) -> None: ...

    def scale_inv(self, name: str) -> Tensor: ...


class FfnLoader:
    """Makes banks and fills their slots. `weight_dtype` None keeps the format of the checkpoint; `quantized`: int8."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        device: torch.device,
        weight_dtype: torch.dtype | None,
        quantized: bool,
        arithmetic: kernels.Arithmetic,
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._device = device
        self._weight_dtype = weight_dtype
        self._quantized = quantized
        self._arithmetic = arithmetic
        self._expert_dtypes: dict[int, torch.dtype] = {}

    def expert_bank(self, layer: int, num_loaded: int) -> kernels.PackedExperts:
        """An empty bank for experts of a MoE layer: on the CPU with room for all of them."""
        slots = self._config.num_experts if self._device.type == "cpu" else num_loaded
        return self._empty(slots, self._config.moe_intermediate_size, self._expert_dtype(layer))

    def load_experts(
        self, packed: kernels.PackedExperts, slots: Sequence[int], reader: Reader, layer: int, experts: Sequence[int]
    ) -> None:
        """Read routed experts, each into its slot. Raises CheckpointError."""
        self._load(packed, slots, reader, [expert_prefix(layer, expert) for expert in experts])

    def ffn(self, reader: Reader, prefix: str, width: int) -> kernels.PackedExperts:
        """A bank of one: a dense feed-forward network, or the shared experts."""
        packed = self._empty(1, width, self._common_dtype([prefix]))
        self._load(packed, [0], reader, [prefix])
        return packed

    def _empty(self, slots: int, width: int, dtype: torch.dtype) -> kernels.PackedExperts:
        hidden, block = self._config.hidden_size, self._block_of(dtype)
        return kernels.PackedExperts.empty(
            slots, hidden, width, dtype=dtype, block=block, arithmetic=self._arithmetic, device=self._device
        )

    def _load(
        self, packed: kernels.PackedExperts, slots: Sequence[int], reader: Reader, prefixes: Sequence[str]
    ) -> None:
        names = [f"{prefix}{name}_proj.weight" for prefix in prefixes for name in _PROJECTIONS]
        stored = {self._tensors[name].dtype for name in names}
        if packed.is_native and stored == {STORED_NAMES.get(packed.dtype)}:
            self._load_as_stored(packed, slots, reader, names)
            return
        for slot, prefix in zip(slots, prefixes, strict=True):
            self._load_converted(packed, slot, reader, prefix)

    def _load_as_stored(
        self, packed: kernels.PackedExperts, slots: Sequence[int], reader: Reader, names: Sequence[str]
    ) -> None:
        """From the files to the panels, all in one native call."""
        scales: list[tuple[Tensor, Tensor, Tensor]] | None = None
        if packed.block is not None:
            of_name = [reader.scale_inv(name) for name in names]
            scales = [(of_name[i], of_name[i + 1], of_name[i + 2]) for i in range(0, len(names), 3)]
        try:
            checksums = packed.load_files(slots, [reader.place(name) for name in names], scales)
        except kernels.UnreadableWeight as error:
            name = names[error.index]
            raise CheckpointError((f"{self._tensors[name].path}: {name} {error.reason}",)) from error
        for name, checksum in zip(names, checksums, strict=True):
            reader.was_read(name, checksum)

    def _load_converted(self, packed: kernels.PackedExperts, slot: int, reader: Reader, prefix: str) -> None:
        gate, up, down = (self._matrix(reader, f"{prefix}{name}_proj.weight", packed.dtype) for name in _PROJECTIONS)
        scales = None
        if gate.scale_inv is not None and up.scale_inv is not None and down.scale_inv is not None:
            scales = (gate.scale_inv, up.scale_inv, down.scale_inv)
        packed.load(slot, gate.values, up.values, down.values, scales=scales)

    def _block_of(self, dtype: torch.dtype) -> tuple[int, int] | None:
        if dtype is torch.int8:
            return 1, kernels.INT8_BLOCK
        block = self._config.quantization if dtype is torch.float8_e4m3fn else None
        return None if block is None else (block.block_rows, block.block_cols)

    def _expert_dtype(self, layer: int) -> torch.dtype:
        """A bank holds one format. Where the checkpoint mixes them within a layer all of it is held in float32, on
        every rank, so that the arithmetic does not depend on who hosts what."""
        if layer not in self._expert_dtypes:
            every = [expert_prefix(layer, expert) for expert in range(self._config.num_experts)]
            self._expert_dtypes[layer] = self._common_dtype(every)
        return self._expert_dtypes[layer]

    def _common_dtype(self, prefixes: Iterable[str]) -> torch.dtype:
        if self._quantized:
            return torch.int8
        names = [f"{prefix}{name}_proj.weight" for prefix in prefixes for name in _PROJECTIONS]
        stored = {self._tensors[name].dtype for name in names}
        if stored == {STORED_NAMES[torch.float8_e4m3fn]}:
            return torch.float8_e4m3fn
        if self._weight_dtype is not None:
            return self._weight_dtype
        held = [dtype for dtype, name in STORED_NAMES.items() if stored == {name}]
        return held[0] if held else torch.float32

    def _matrix(self, reader: Reader, name: str, dtype: torch.dtype) -> StoredWeight:
        if dtype is torch.int8:
            return read_quantized(reader, name, self._tensors[name].shape[1])
        if self._tensors[name].dtype == STORED_NAMES[dtype]:
            return reader.weight(name)
        return StoredWeight(values=reader.float32(name).to(dtype))


def quantized(weight: Tensor) -> StoredWeight:
    """A matrix as --quantization int8 holds it."""
    values, scale_inv = kernels.quantize(weight)
    return StoredWeight(values=values, scale_inv=scale_inv, block=(1, kernels.INT8_BLOCK))


def read_quantized(reader: Reader, name: str, num_in: int, columns: tuple[int, int] | None = None) -> StoredWeight:
    """A matrix of `num_in` columns, or some of them: then all columns of their blocks are read, which the scales depend
    on."""
    start, stop = columns or (0, num_in)
    block = kernels.INT8_BLOCK
    first = start // block * block
    whole = reader.weight(name, columns=(first, min(num_in, -(-stop // block) * block)))
    converted = quantized(whole.values)
    return replace(converted, values=converted.values[:, start - first : stop - first], offset=(0, start))
