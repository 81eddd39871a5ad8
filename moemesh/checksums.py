"""What the bytes of a checkpoint's tensors were when a rank first read them: whoever reads them again compares.

Safetensors files carry no checksums, so a checkpoint is trusted once, when the mesh loads it. Each rank leaves the
checksums of what it has read in the run's folder; a rank that takes experts over, or is started anew, refuses other
bytes under the same name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

import kernels
from moemesh.shard_file import CheckpointError, TensorInfo

logger = logging.getLogger(__name__)


class Checksums:
    """By tensor, or range of its rows. `unknown` counts what was read and could not be compared."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._read: dict[str, int] = {}

    @property
    def unknown(self) -> int:
        return len(self._read.keys() - self._known.keys())

    def check(
        self, info: TensorInfo, name: str, rows: tuple[int, int] | None, values: Tensor, unit: int | None = None
    ) -> None:
        """Note what was read, by `unit` rows. CheckpointError where it is not what was read the first time."""
        first, stop = rows or (0, info.shape[0])
        for start in range(first, stop, unit or max(1, stop - first)):
            end = stop if unit is None else min(stop, start + unit)
            part = "" if (start, end) == (0, info.shape[0]) else f"[{start}:{end}]"
            self.compare(info, name, kernels.checksum(values[start - first : end - first]), part=part)

    def compare(self, info: TensorInfo, name: str, found: int, *, part: str = "") -> None:
        """The same for a checksum; `part` says which rows it is of."""
        key = name + part
        expected = self._known.get(key, self._read.get(key, found))
        if found != expected:
            raise CheckpointError(
                (
                    f"{info.path}: {name} is not what the mesh has loaded (checksum {found:016x}, was "
                    f"{expected:016x}): the file was changed or damaged: restore it, or restart the mesh",
                )
            )
        self._read[key] = found

    def learn(self, paths: Iterable[Path]) -> None:
        """What others have read, from what they saved. A file that cannot be read is left out, with a warning."""
        for path in paths:
            try:
                self._known |= {str(key): int(value) for key, value in json.loads(path.read_text()).items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                logger.warning("%s holds no checksums: %s", path, error)

    def save(self, path: Path) -> None:
        """Leave what was read for others. Where there is no room they compare nothing: a warning."""
        try:
            written = path.with_name(f"{path.name}.new")  # each rank its own: they save at the same time
            written.write_text(json.dumps(self._read))
            written.replace(path)
        except OSError as error:
            logger.warning("the checksums of what was loaded cannot be kept in %s: %s", path, error.strerror)
