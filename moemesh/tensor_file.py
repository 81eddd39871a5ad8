"""Tensors of a safetensors file, read by rows into memory of their own.

The file is not mapped: mapped pages count as memory of the process, cost a page fault for each few of them, and a file
that is cut short while it is mapped ends the process.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch

import kernels
from moemesh.shard_file import CheckpointError, TensorInfo

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorFile:
    """An open safetensors file, open until `close` is called or nobody has it. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.close = weakref.finalize(self, os.close, self._file)
            self._data_start = 8 + int.from_bytes(os.pread(self._file, 8, 0), "little")
        except OSError as error:
            raise CheckpointError((f"{path}: cannot be read: {error.strerror}",)) from error

    def place(self, info: TensorInfo) -> kernels.FileWeight:
        """Where a tensor lies; valid until `close`."""
        return kernels.FileWeight(self._file, self._data_start + info.begin)

    def read(self, info: TensorInfo, rows: tuple[int, int] | None) -> torch.Tensor:
        """A tensor, or [start, stop) of its first dimension."""
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError((f"{self._path}: a tensor has dtype {info.dtype}, which torch does not have",))
        shape, skipped = info.shape, 0
        if rows is not None:
            shape = (rows[1] - rows[0], *info.shape[1:])
            skipped = rows[0] * (info.nbytes // max(1, info.shape[0]))
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
        try:
            kernels.read_into(self._file, self._data_start + info.begin + skipped, tensor)
        except (OSError, EOFError) as error:
            what = "is truncated" if isinstance(error, EOFError) else "cannot be read"
            raise CheckpointError((f"{self._path}: {what}: {error}",)) from error
        return tensor
