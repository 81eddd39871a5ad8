"""Files come to memory whole, with and without the native pool, or not at all."""

from pathlib import Path

import pytest
import torch

import kernels
from kernels import files, reference


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


@pytest.mark.parametrize("count", [0, 1, 8, 63, 64, 65, 131_072, 131_080, 300_001])
def test_checksum_equals_its_twin(count: int) -> None:
    data = torch.randint(0, 256, (count,), dtype=torch.uint8)
    assert kernels.checksum(data) == reference.checksum(data)


def test_a_checksum_notices_any_change() -> None:
    data = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    found = {kernels.checksum(data)}
    for place in (0, 1, 777, 65_536, 99_999, 100_002):
        changed = data.clone()
        changed[place] ^= 1
        found.add(kernels.checksum(changed))
    found.add(kernels.checksum(data[:-1]))
    found.add(kernels.checksum(torch.cat([data, torch.zeros(1, dtype=torch.uint8)])))
    swapped = data.clone()
    swapped[:8], swapped[8:16] = data[8:16], data[:8]
    found.add(kernels.checksum(swapped))
    assert len(found) == 10
    assert kernels.checksum(torch.arange(6.0).view(2, 3)) == kernels.checksum(torch.arange(6.0))


@pytest.mark.skipif(not kernels.native_available(), reason="only the C kernels load from files to panels")
def test_a_weight_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    hidden, width = 128, 128
    packed = kernels.PackedExperts.empty(1, hidden, width, dtype=torch.float8_e4m3fn, block=(128, 128))
    scales = [tuple(torch.ones(1, 1) for _ in range(3))]
    content = bytearray(3 * hidden * width)
    content[hidden * width + 5] = 0x7F  # NaN, in the second of three
    path = tmp_path / "weights"
    path.write_bytes(content)
    with path.open("rb") as file:
        places = [kernels.FileWeight(file.fileno(), i * hidden * width) for i in range(3)]
        with pytest.raises(kernels.UnreadableWeight, match="contains NaN") as caught:
            packed.load_files([0], places, scales)
        assert caught.value.index == 1
        path.write_bytes(bytes(3 * hidden * width - 1))
        with pytest.raises(kernels.UnreadableWeight, match="is truncated") as caught:
            packed.load_files([0], places, scales)
        assert caught.value.index == 2
