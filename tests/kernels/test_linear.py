"""Linear layers and per-head products against torch; shards and slices to the bit."""

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import DTYPES, SCALED, heads, needs_native, normal, packed, relative_error, stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_out", "num_in", "rows", "shards"), [(7, 7, 3, 1), (61, 64, 1, 4), (300, 1000, 98, 8)])
def test_linear_agrees_with_torch(dtype: torch.dtype, num_out: int, num_in: int, rows: int, shards: int) -> None:
    layer, x = packed(num_out, num_in, dtype, num_shards=shards), normal(rows, num_in)
    want = x.double() @ layer.dense().double().T
    assert relative_error(kernels.linear(x, layer), want) < 2e-6
    assert relative_error(reference.linear(x, layer), want) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (32, 48), (16, 100)])
def test_packing_loses_nothing(dtype: torch.dtype, block: tuple[int, int]) -> None:
    weight, scale = stored(77, 130, dtype, block=block)
    layer = kernels.pack_linear(weight, scale_inv=scale, block=block)
    block_scale = scale if scale is None else kernels.BlockScale(scale_inv=scale, rows=block[0], cols=block[1])
    assert torch.equal(layer.dense(), kernels.dequantize(weight, block_scale))
    assert layer.nbytes >= weight.nbytes


@needs_native
def test_every_fp8_code_is_read_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    for isa in ("amx", "avx512", "avx2", "generic"):
        try:
            kernels.force_isa(isa)
        except ValueError:
            continue
        layer = kernels.pack_linear(codes[:, None].clone(), scale_inv=torch.ones(2, 1))
        assert torch.equal(kernels.linear(torch.ones(1, 1), layer)[0], codes.float())


@needs_native
def test_every_f16_code_is_read_exactly_by_the_generic_variant() -> None:
    codes = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
    codes = codes[~codes.isnan()]
    kernels.force_isa("generic")
    got = kernels.linear(torch.ones(1, 1), kernels.pack_linear(codes[:, None].clone()))
    assert torch.equal(got[0], codes.float())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_in", [1024, 48 * 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shards_on_any_number_of_ranks_give_the_bits_of_one(dtype: torch.dtype, num_in: int, ranks: int) -> None:
    block, num_shards = (128, 100), 8  # pieces end inside scale blocks
    weight, scale = stored(70, num_in, dtype, block=block)
    x = normal(13, num_in)
    whole = kernels.pack_linear(weight, scale_inv=scale, block=block, num_shards=num_shards)
    parts, size = [], num_in // ranks
    for rank in range(ranks):
        start, stop = rank * size, (rank + 1) * size
        piece_scale = None if scale is None else scale[:, start // 100 : -(-stop // 100)]
        piece = kernels.pack_linear(
            weight[:, start:stop],
            scale_inv=piece_scale,
            block=block,
            offset=(0, start),
            num_shards=num_shards // ranks,
        )
        parts.append(kernels.linear(x[:, start:stop].contiguous(), piece))
    assert torch.equal(kernels.tree_add(parts), kernels.linear(x, whole))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [32, 37, 128])
def test_rows_of_a_weight_alone_give_their_bits_of_the_whole(dtype: torch.dtype, start: int) -> None:
    weight, scale = stored(300, 256, dtype)
    x = normal(5, 256)
    whole = kernels.linear(x, kernels.pack_linear(weight, scale_inv=scale))
    part_scale = None if scale is None else scale[start // 128 : 2]
    part = kernels.pack_linear(weight[start:250], scale_inv=part_scale, offset=(start, 0))
    assert torch.equal(kernels.linear(x, part), whole[:, start:250])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_linear_takes_strided_views(dtype: torch.dtype) -> None:
    packed_heads = heads(3, 61, 80, dtype)
    x = normal(3, 9, 140)[:, :, 30:110].transpose(0, 1)
    want = torch.einsum("tnk,njk->tnj", x.double(), packed_heads.dense().double())
    assert relative_error(kernels.head_linear(x, packed_heads), want) < 2e-6
    assert relative_error(reference.head_linear(x, packed_heads), want) < 2e-6


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_heads_are_the_rows_of_their_matrix(dtype: torch.dtype) -> None:
    weight, scale = stored(3 * 61, 80, dtype, block=(48, 50))
    assert scale is not None
    whole = kernels.dequantize(weight, kernels.BlockScale(scale_inv=scale, rows=48, cols=50))
    packed_heads = heads(3, 61, 80, dtype)
    assert torch.equal(packed_heads.dense().flatten(0, 1), whole)
    assert packed_heads.nbytes >= weight.nbytes
    with pytest.raises(ValueError, match=r"0 scales for 3 heads of .*, must be 3"):
        kernels.pack_heads(weight.view(3, 61, 80))


def test_linear_of_no_rows_is_empty_and_out_is_used() -> None:
    layer = packed(9, 8, torch.float32)
    assert kernels.linear(torch.empty(0, 8), layer).shape == (0, 9)
    out = torch.empty(2, 9)
    assert kernels.linear(torch.ones(2, 8), layer, out=out) is out


def test_wrong_arguments_are_refused_with_both_numbers() -> None:
    layer = packed(9, 8, torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 7\), must be \('any', 8\)"):
        kernels.linear(torch.ones(2, 7), layer)
    with pytest.raises(ValueError, match="bfloat16, must be torch"):
        kernels.linear(torch.ones(2, 8, dtype=torch.bfloat16), layer)
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.linear(torch.ones(8, 2).T, layer)
    with pytest.raises(ValueError, match="num_shards is 3"):
        kernels.pack_linear(torch.ones(3, 6), num_shards=3)
    with pytest.raises(ValueError, match="float64 are not supported"):
        kernels.pack_linear(torch.ones(3, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="without scale_inv"):
        kernels.pack_linear(torch.ones(3, 6).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"\(1, 2\), must be \(1, 1\)"):
        kernels.pack_linear(torch.ones(3, 6).to(torch.float8_e4m3fn), scale_inv=torch.ones(1, 2))


@needs_native
def test_an_fp8_weight_with_nan_is_refused() -> None:
    weight = torch.tensor([[1.0, float("nan")]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="NaN"):
        kernels.pack_linear(weight, scale_inv=torch.ones(1, 1))
