"""int8 weights: the same bits from every variant, and as near to the weight as 8 bits allow."""

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import needs_native, normal

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of every kind, the last one shorter: zeros, subnormals, ties, huge and tiny numbers."""
    weight = normal(37, 300) * torch.logspace(-30, 30, 37)[:, None]
    weight[1], weight[2, :128], weight[3, 256:] = 0.0, 0.0, 1e-40
    weight[4] = torch.arange(-127, 173).clamp(max=127) / 2 + 0.25
    return weight.clamp(-60000, 60000).to(dtype)


@needs_native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_variant_gives_the_bits_of_torch(dtype: torch.dtype, isa: str) -> None:
    try:
        kernels.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor does not run {isa}")
    weight = awkward(dtype)
    want_values, want_scale = reference.quantize(weight, kernels.INT8_BLOCK)
    for given in (weight, weight.T.contiguous().T, torch.cat((weight, weight), 1)[:, :300]):
        values, scale = kernels.quantize(given)
        assert torch.equal(values, want_values)
        assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_are_off_by_half_a_step(dtype: torch.dtype) -> None:
    weight = awkward(dtype)
    values, scale = kernels.quantize(weight)
    assert scale.shape == (37, 3)
    restored = kernels.dequantize(values, kernels.BlockScale(scale_inv=scale, rows=1, cols=kernels.INT8_BLOCK))
    steps = scale.repeat_interleave(kernels.INT8_BLOCK, 1)[:, :300]
    assert ((restored - weight.float()).abs() <= steps * 0.50001).all()
    assert values.abs().amax() == 127


def test_a_block_does_not_depend_on_its_company() -> None:
    weight = normal(5, 640)
    values, scale = kernels.quantize(weight)
    part_values, part_scale = kernels.quantize(weight[1:4, 128:384])
    assert torch.equal(part_values, values[1:4, 128:384])
    assert torch.equal(part_scale, scale[1:4, 1:3])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_no_number_is_refused(dtype: torch.dtype, wrong: float) -> None:
    weight = normal(9, 300)
    weight[8, 299] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        kernels.quantize(weight.to(dtype))
