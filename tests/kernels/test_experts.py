"""The grouped feed-forward network against torch."""

import gc
import mmap

import psutil
import pytest
import torch

import kernels
from kernels import reference
from kernels.reserved import ReservedMemory
from tests.kernels.weights import DTYPES, experts, needs_native, normal, relative_error, seeded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "width", "block"), [(96, 40, (16, 32)), (61, 7, (128, 128)), (256, 160, (128, 128))]
)
def test_grouped_ffn_agrees_with_torch(dtype: torch.dtype, hidden: int, width: int, block: tuple[int, int]) -> None:
    bank = experts(5, hidden, width, dtype, block=block)
    x, slot_rows = normal(9, hidden), torch.randint(0, 9, (210,), generator=seeded(), dtype=torch.int32)
    slot_experts = torch.tensor([0] * 3 + [2] * 200 + [3] + [4] * 6, dtype=torch.int32)
    slot_experts = slot_experts[torch.randperm(210, generator=seeded(1))]
    got = kernels.grouped_ffn(x, bank, slot_rows, slot_experts)
    assert relative_error(got, reference.grouped_ffn(x, bank, slot_rows, slot_experts)) < 3e-6
    places = torch.tensor([-1, 4, 3, 2, 1, 0], dtype=torch.int32)
    assert torch.equal(got, kernels.grouped_ffn(x, bank, slot_rows, 5 - slot_experts, place_of=places))


def test_ffn_is_a_bank_of_one() -> None:
    bank, x = experts(1, 61, 40, torch.bfloat16), normal(130, 61)
    rows = torch.arange(130, dtype=torch.int32)
    assert torch.equal(kernels.ffn(x, bank), kernels.grouped_ffn(x, bank, rows, torch.zeros_like(rows)))
    with pytest.raises(ValueError, match="this one has 2"):
        kernels.ffn(x, experts(2, 61, 40, torch.float32))


def test_an_expert_comes_back_as_it_was_loaded() -> None:
    bank = kernels.PackedExperts.empty(3, 40, 50, dtype=torch.bfloat16)
    gate, up, down = normal(50, 40).bfloat16(), normal(50, 40, seed=1).bfloat16(), normal(40, 50, seed=2).bfloat16()
    bank.load(2, gate, up, down)
    for got, want in zip(bank.dense(2), (gate, up, down), strict=True):
        assert torch.equal(got, want.float())
    assert bank.expert_bytes >= 3 * 40 * 50 * 2


def test_no_slots_give_no_rows() -> None:
    bank = experts(2, 8, 8, torch.float32)
    empty = torch.empty(0, dtype=torch.int32)
    assert kernels.grouped_ffn(torch.ones(3, 8), bank, empty, empty).shape == (0, 8)


@needs_native
def test_wrong_indices_are_refused() -> None:
    bank, x = experts(2, 8, 8, torch.float32), torch.ones(3, 8)
    slots, chosen = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="outside the rows"):
        kernels.grouped_ffn(x, bank, slots + 1, chosen)
    for wrong in (chosen + 1, chosen - 1):
        with pytest.raises(ValueError, match="not here"):
            kernels.grouped_ffn(x, bank, slots, wrong)
    for places in ([0], [0, -1], [0, 2]):
        with pytest.raises(ValueError, match="not here"):
            kernels.grouped_ffn(x, bank, slots, chosen, place_of=torch.tensor(places, dtype=torch.int32))


def test_wrong_weights_are_refused() -> None:
    bank = kernels.PackedExperts.empty(2, 8, 4, dtype=torch.float32)
    gate, down = torch.ones(4, 8), torch.ones(8, 4)
    with pytest.raises(ValueError, match="slot 2 does not exist; there are 2"):
        bank.load(2, gate, gate, down)
    with pytest.raises(ValueError, match=r"down of expert slot 0 is torch.float32 \(4, 8\), must be .*\(8, 4\)"):
        bank.load(0, gate, gate, gate)
    with pytest.raises(ValueError, match="not expected"):
        bank.load(0, gate, gate, down, (gate, gate, down))
    with pytest.raises(ValueError, match="need a block size"):
        kernels.PackedExperts.empty(2, 8, 4, dtype=torch.float8_e4m3fn)


@needs_native
def test_a_slot_that_is_not_loaded_takes_no_memory() -> None:
    hidden, width, loaded = 1024, 512, 8
    bank = kernels.PackedExperts.empty(100_000, hidden, width, dtype=torch.float32)  # 600 GB
    gate, up, down = normal(width, hidden), normal(width, hidden), normal(hidden, width)
    before = _resident_bytes()
    for slot in range(loaded):
        bank.load(50_000 + slot, gate, up, down)
    grown = _resident_bytes() - before
    assert loaded * bank.expert_bytes <= grown < 2 * loaded * bank.expert_bytes
    for slot in range(loaded):
        bank.unload(50_000 + slot)
    assert _resident_bytes() - before < grown / 2


def _resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@needs_native
def test_reserved_memory_is_given_back_by_whole_pages() -> None:
    memory = ReservedMemory(10 * mmap.PAGESIZE)
    memory.data.fill_(7)
    memory.give_back(mmap.PAGESIZE + 1, 5 * mmap.PAGESIZE - 1)
    kept = memory.data.view(10, -1).amin(1)
    assert kept.tolist() == [7, 7, 0, 0, 7, 7, 7, 7, 7, 7]
    with pytest.raises(MemoryError, match="address space"):
        ReservedMemory(1 << 62)
