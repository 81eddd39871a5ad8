"""The header of a safetensors file, read before any of it is mapped, and checked against the file's real size.

Format: 8 bytes little-endian header length, a JSON header of {name: {dtype, shape, data_offsets}}, then the data. A
shard that was cut short in a download is found here, by name, and not as a bus error when its last page is touched.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; `problems` has one line per finding, each naming file or tensor."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        self.problems = problems
        shown = "\n  ".join(problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        super().__init__(shown + more)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` in the format's spelling (F32, BF16, F16, F8_E4M3, ...)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    end: int  # of its bytes, counted from the start of the data

    @property
    def begin(self) -> int:
        """Of its bytes, counted as `end`."""
        return self.end - self.nbytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


def read_shard_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. CheckpointError where it is missing, truncated or no such file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            text = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise CheckpointError((f"{path}: cannot be read: {error.strerror}",)) from error
    if not 0 < length <= MAX_HEADER_BYTES:
        raise CheckpointError((f"{path}: is no safetensors file, or is empty ({size} bytes)",))
    if len(text) < length:
        raise CheckpointError((f"{path}: is truncated: its header takes {length + 8} bytes, the file has {size}",))
    try:
        header = json.loads(text)
        tensors = {name: _entry(path, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError((f"{path}: its safetensors header is malformed: {error}",)) from error
    _check_size(path, tensors, size - 8 - length)
    return tensors


def _entry(path: Path, entry: dict[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    info = TensorInfo(path=path, dtype=entry["dtype"], shape=tuple(int(n) for n in entry["shape"]), end=int(end))
    if info.dtype not in DTYPE_BYTES or min(info.shape, default=0) < 0 or end - begin != info.nbytes:
        raise ValueError(f"entry {entry}")
    return info


def _check_size(path: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    declared = max((info.end for info in tensors.values()), default=0)
    if data_bytes < declared:
        first = min((name for name in tensors if tensors[name].end > data_bytes), key=lambda name: tensors[name].end)
        raise CheckpointError(
            (
                f"{path}: is truncated: its header declares {declared} bytes of data, {data_bytes} are there; "
                f"the first tensor that is not whole is {first}: download the file again",
            )
        )
    if data_bytes > declared:
        raise CheckpointError((f"{path}: has {data_bytes} bytes of data where its header declares {declared}",))
