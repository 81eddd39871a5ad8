"""Files come to memory whole, with and without the native pool, or not at all."""

from pathlib import Path

import pytest
import torch

import kernels
from kernels import files


@pytest.mark.parametrize("native", [True, False])
def test_any_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    if not native:
        monkeypatch.setattr(files, "native_available", lambda: False)
    content = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8)
    path = tmp_path / "file"
    path.write_bytes(bytes(content.tolist()))
    with path.open("rb") as file:
        for start, count in ((0, 1_000_003), (7, 131_072), (131_071, 400_000), (9, 0), (1_000_002, 1)):
            target = torch.zeros(count, dtype=torch.uint8)
            kernels.read_into(file.fileno(), start, target)
            assert torch.equal(target, content[start : start + count])
        with pytest.raises(EOFError, match="3 of 4 bytes are there"):
            kernels.read_into(file.fileno(), 1_000_000, torch.empty(1))
    with path.open("ab") as file, pytest.raises(OSError, match="Bad file descriptor"):  # cannot be read
        kernels.read_into(file.fileno(), 0, torch.empty(1))
