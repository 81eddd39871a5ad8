"""A checkpoint: a folder of safetensors files, indexed by their headers and read by slices.

Opening it closes the first book (see checkpoint_index). `LoadLedger` closes the second, a rank's own: it read exactly
what it hosts and filled every parameter.
Shapes: N x K matrices, N rows out, K columns in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from mesh_config import Fp8BlockConfig, ModelConfig
from moemesh.checkpoint_index import read_index
from moemesh.checksums import Checksums
from moemesh.shard_file import CheckpointError, TensorInfo
from moemesh.tensor_file import TensorFile
from moemesh.weight_names import EMBEDDING, HEAD, SCALE_SUFFIX

__all__ = ["Checkpoint", "CheckpointError", "LoadLedger", "StoredWeight", "TensorInfo"]

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A matrix, or a slice of one, as stored.

    float8_e4m3fn values come with `scale_inv`, the float32 factors of exactly the blocks (`block` rows by columns) that
    they touch; others have None. `offset` is the (row, column) of the first element in the whole matrix.
    """

    values: torch.Tensor
    scale_inv: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)


class Checkpoint:
    """The tensors of a model folder, read when asked for, by rows; a returned tensor belongs to the caller.

    Attributes: `tensors` (name -> TensorInfo of all that is served, scales included), `set_aside` (names recognised
    and not served), `bytes_read` (so far, by slices).
    """

    def __init__(self, folder: str | Path, config: ModelConfig, checksums: Checksums | None = None) -> None:
        """Reads the headers, and a head that should be tied. CheckpointError names file and tensor of what is wrong.

        What is read is compared with `checksums`.
        """
        self.folder = Path(folder)
        self._checksums = checksums
        self.config = config
        self.bytes_read = 0
        self._files: dict[Path, TensorFile] = {}
        index = read_index(self.folder, config)
        self.tensors = index.tensors
        self.set_aside = index.set_aside
        if index.tied_head is not None:
            self._check_tied_head(index.tied_head, self._info(EMBEDDING))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are served."""
        return sum(info.nbytes for info in self.tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        return self._read(self._info(name), name, None, None)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._read(self._info(name), name, (start, stop), None)

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._read(self._info(name), name, None, (start, stop))

    def weight(
        self, name: str, *, rows: Range | None = None, columns: Range | None = None, unit: int | None = None
    ) -> StoredWeight:
        """A matrix or a slice of it, in the format it has. `unit`: others may read other multiples of so many rows."""
        values = self._read(self._info(name), name, rows, columns, unit)
        offset = ((rows or (0, 0))[0], (columns or (0, 0))[0])
        scale_info = self.tensors.get(name + SCALE_SUFFIX)
        if scale_info is None:
            return StoredWeight(values=values, offset=offset)
        block = self._block()
        scale_rows, scale_columns = _blocks(rows, block.block_rows), _blocks(columns, block.block_cols)
        scale = self._read(scale_info, name + SCALE_SUFFIX, scale_rows, scale_columns)
        sizes = (block.block_rows, block.block_cols)
        return StoredWeight(values=values, scale_inv=scale.float(), block=sizes, offset=offset)

    def scale_inv(self, name: str) -> torch.Tensor:
        """The scales alone of a whole FP8 matrix, float32."""
        return self.tensor(name + SCALE_SUFFIX).float()

    def float32(self, name: str, *, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        """Any slice of a tensor in float32; FP8 values times the scale of their block."""
        stored = self.weight(name, rows=rows, columns=columns)
        values = stored.values.float()
        if stored.scale_inv is None:
            return values
        row_blocks, column_blocks = (
            (torch.arange(size) + offset % block) // block
            for size, offset, block in zip(values.shape, stored.offset, stored.block, strict=True)
        )
        return values * stored.scale_inv[row_blocks][:, column_blocks]

    def open_all(self) -> None:
        """Open every file now: what is unlinked afterwards can still be read."""
        for info in self.tensors.values():
            self._file(info.path)

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]

    def place(self, name: str) -> kernels.FileWeight:
        """Where a tensor lies, for whoever reads it without us; `was_read` is to be called then."""
        info = self._info(name)
        return self._file(info.path).place(info)

    def was_read(self, name: str, checksum: int) -> None:
        """A whole tensor was read from its `place`. CheckpointError where it is not what was read before."""
        info = self._info(name)
        self.bytes_read += info.nbytes
        if self._checksums is not None:
            self._checksums.compare(info, name, checksum)

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _block(self) -> Fp8BlockConfig:
        assert self.config.quantization is not None, "FP8 tensors are refused without quantization_config"
        return self.config.quantization

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError((f"{self.folder}: {name} is not among the tensors served",))
        return self.tensors[name]

    def _read(
        self, info: TensorInfo, name: str, rows: Range | None, columns: Range | None, unit: int | None = None
    ) -> torch.Tensor:
        for axis, part in enumerate((rows, columns)):
            if part is not None and not 0 <= part[0] <= part[1] <= info.shape[axis]:
                raise CheckpointError((f"{info.path}: {name} has shape {list(info.shape)}, no {part} on axis {axis}",))
        tensor = self._file(info.path).read(info, rows)
        if self._checksums is not None:
            self._checksums.check(info, name, rows, tensor, unit)
        if columns is not None:
            tensor = tensor[:, columns[0] : columns[1]]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _check_tied_head(self, head: TensorInfo, embedding: TensorInfo) -> None:
        if head.shape == embedding.shape:
            values = self._read(head, HEAD, None, None)
            if torch.equal(values, self._read(embedding, EMBEDDING, None, None).to(values.dtype)):
                return
        raise CheckpointError(
            (f"{head.path}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings = true",)
        )


class LoadLedger:
    """The books of one rank: what it is to read of a checkpoint, what it has read, and what it has filled.

    Reads go through it, with the checkpoint's own methods; a tensor that is not the rank's is refused. `close` raises
    where a tensor was to be read and was not, or a parameter filled and was not. `progress` is (tensors read, tensors
    to read).
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str], parameters: Collection[str] = ()) -> None:
        wanted = frozenset(names)
        scales = {name + SCALE_SUFFIX for name in wanted if name + SCALE_SUFFIX in checkpoint.tensors}
        self._checkpoint = checkpoint
        self._wanted = wanted | scales
        self._read: set[str] = set()
        self._unfilled = set(parameters)
        self._filled: set[str] = set()

    @property
    def progress(self) -> tuple[int, int]:
        return len(self._read), len(self._wanted)

    def tensor(self, name: str) -> torch.Tensor:
        self._note(name)
        return self._checkpoint.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self._note(name)
        return self._checkpoint.rows(name, start, stop)

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        self._note(name)
        return self._checkpoint.columns(name, start, stop)

    def weight(
        self, name: str, *, rows: Range | None = None, columns: Range | None = None, unit: int | None = None
    ) -> StoredWeight:
        self._note(name)
        return self._checkpoint.weight(name, rows=rows, columns=columns, unit=unit)

    def float32(self, name: str, *, rows: Range | None = None, columns: Range | None = None) -> torch.Tensor:
        self._note(name)
        return self._checkpoint.float32(name, rows=rows, columns=columns)

    def place(self, name: str) -> kernels.FileWeight:
        self._note(name)
        return self._checkpoint.place(name)

    def was_read(self, name: str, checksum: int) -> None:
        self._checkpoint.was_read(name, checksum)

    def scale_inv(self, name: str) -> torch.Tensor:
        self._note(name)
        return self._checkpoint.scale_inv(name)

    def fill(self, parameter: str) -> None:
        """Notes that a parameter has its values. Each is filled once."""
        if parameter not in self._unfilled:
            state = "was already filled" if parameter in self._filled else "is none of this rank's parameters"
            raise CheckpointError((f"parameter {parameter} {state}",))
        self._unfilled.remove(parameter)
        self._filled.add(parameter)

    def close(self) -> None:
        """CheckpointError where the books do not balance."""
        problems = [f"{name}: was to be read and was not" for name in sorted(self._wanted - self._read)]
        problems += [f"parameter {name}: was to be filled and was not" for name in sorted(self._unfilled)]
        if problems:
            raise CheckpointError(tuple(problems))

    def _note(self, name: str) -> None:
        if name not in self._wanted:
            raise CheckpointError((f"{name}: is read by a rank that does not host it",))
        self._read.add(name)
        if name + SCALE_SUFFIX in self._wanted:
            self._read.add(name + SCALE_SUFFIX)


def _blocks(part: Range | None, size: int) -> Range | None:
    return None if part is None else (part[0] // size, -(-part[1] // size))
