"""bfloat16 weights in the arithmetic bf16x3: as accurate as float32, the same bits with and without tiles."""

from collections.abc import Iterator

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import experts, heads, needs_native, normal, packed, relative_error

pytestmark = needs_native


def with_every_instruction_set() -> Iterator[str]:
    for isa in ("amx", "avx512", "avx2", "generic"):
        try:
            kernels.force_isa(isa)
        except ValueError:
            continue
        yield isa


def root_mean_square(difference: torch.Tensor) -> float:
    return float(difference.double().pow(2).mean().sqrt())


@pytest.mark.parametrize(("num_out", "num_in", "rows", "shards"), [(7, 32, 3, 1), (61, 256, 1, 4), (300, 1024, 98, 8)])
def test_packing_loses_nothing_and_products_agree_with_torch(num_out: int, num_in: int, rows: int, shards: int) -> None:
    layer = packed(num_out, num_in, torch.bfloat16, num_shards=shards, arithmetic="bf16x3")
    assert layer.in_pairs
    assert torch.equal(layer.dense(), packed(num_out, num_in, torch.bfloat16).dense())
    x = normal(rows, num_in)
    want = x.double() @ layer.dense().double().T
    assert relative_error(kernels.linear(x, layer), want) < 1e-6
    assert relative_error(reference.linear(x, layer), want) < 2e-6


def test_experts_and_heads_lose_nothing() -> None:
    bank, plain = (experts(2, 96, 45, torch.bfloat16, arithmetic=name) for name in ("bf16x3", "float32"))
    for ours, theirs in zip(bank.dense(1), plain.dense(1), strict=True):  # down, of 45 inputs, is not in pairs
        assert torch.equal(ours, theirs)
    ours, theirs = (heads(3, 61, 64, torch.bfloat16, arithmetic=name).dense() for name in ("bf16x3", "float32"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_cannot_be_paired_stays_in_float32(dtype: torch.dtype) -> None:
    assert not packed(33, 64, dtype, arithmetic="bf16x3").in_pairs
    assert not packed(33, 48, torch.bfloat16, arithmetic="bf16x3").in_pairs
    assert not packed(33, 64, torch.bfloat16, num_shards=4, arithmetic="bf16x3").in_pairs


@pytest.mark.parametrize("num_in", [64, 512, 4160])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_errors_are_not_larger_than_those_of_float32(num_in: int, spread: float) -> None:
    x = normal(40, num_in) * torch.exp(spread * normal(40, num_in, seed=1))
    pairs, plain = (packed(96, num_in, torch.bfloat16, arithmetic=name) for name in ("bf16x3", "float32"))
    want = x.double() @ plain.dense().double().T
    ours, theirs = (kernels.linear(x, layer) - want for layer in (pairs, plain))
    size = want.pow(2).mean(1, keepdim=True).sqrt()
    assert root_mean_square(ours / size) < 1.1 * root_mean_square(theirs / size)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 40])
def test_long_sums_of_odd_numbers_are_the_same_with_every_instruction_set(num_rows: int) -> None:
    """Beyond one slice of the rows, with activations and weights down to subnormal ones."""
    x = normal(num_rows, 4160) * torch.exp(30 * normal(num_rows, 4160, seed=1)).clamp(max=1e10)
    x[:, ::7] = 1e-39
    x[:, 1::7] *= 1e-30
    weight = normal(45, 4160, seed=2) * torch.exp(20 * normal(45, 4160, seed=3)).clamp(max=1e10)
    weight[:, 3::5] = 1e-39
    layer = kernels.pack_linear(weight.bfloat16(), num_shards=2, arithmetic="bf16x3")
    found = {isa: kernels.linear(x, layer) for isa in with_every_instruction_set()}
    first = next(iter(found.values()))
    assert first.isfinite().all()
    for isa, other in found.items():
        assert torch.equal(first.view(torch.int32), other.view(torch.int32)), isa


@pytest.mark.parametrize("num_rows", [1, 5, 33])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_in_its_row(num_rows: int, value: float) -> None:
    x = normal(num_rows, 96)
    layer = packed(45, 96, torch.bfloat16, arithmetic="bf16x3")
    want = kernels.linear(x, layer)
    x[num_rows // 2, 37] = value
    x[num_rows // 2, 38] = value
    others = [row for row in range(num_rows) if row != num_rows // 2]
    for isa in with_every_instruction_set():
        got = kernels.linear(x, layer)
        assert torch.equal(got[others], want[others]), isa
        assert not got[num_rows // 2].isfinite().all(), isa


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shards_on_any_number_of_ranks_give_the_bits_of_one(ranks: int) -> None:
    weight, x = (normal(70, 1024) / 32).bfloat16(), normal(13, 1024, seed=1)
    whole = kernels.pack_linear(weight, num_shards=8, arithmetic="bf16x3")
    size = 1024 // ranks
    parts = []
    for start in range(0, 1024, size):
        piece = weight[:, start : start + size]
        layer = kernels.pack_linear(piece, num_shards=8 // ranks, arithmetic="bf16x3")
        parts.append(kernels.linear(x[:, start : start + size].contiguous(), layer))
    assert torch.equal(kernels.tree_add(parts), kernels.linear(x, whole))


def test_rows_of_a_weight_alone_give_their_bits_of_the_whole() -> None:
    weight, x = normal(300, 256).bfloat16(), normal(5, 256, seed=1)
    whole = kernels.linear(x, kernels.pack_linear(weight, arithmetic="bf16x3"))
    part = kernels.pack_linear(weight[37:250], arithmetic="bf16x3")
    assert torch.equal(kernels.linear(x, part), whole[:, 37:250])
