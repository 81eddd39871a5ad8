"""Random weights in every format the kernels read."""

import pytest
import torch

import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
SCALED = DTYPES[3:]
needs_native = pytest.mark.skipif(not kernels.native_available(), reason=kernels.native_reason())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def stored(
    num_out: int, num_in: int, dtype: torch.dtype, *, block: tuple[int, int] = (128, 128), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight of standard deviation about 1/sqrt(num_in), and its scales if fp8 or int8."""
    weight = normal(num_out, num_in, seed=seed) / num_in**0.5
    if dtype not in SCALED:
        return weight.to(dtype), None
    scale = torch.rand(-(-num_out // block[0]), -(-num_in // block[1]), generator=seeded(seed)) * 0.01 + 0.001
    if dtype == torch.int8:
        return (weight * num_in**0.5 * 40).clamp(-127, 127).to(dtype), scale
    return (weight * 100).clamp(-448, 448).to(dtype), scale


def packed(
    num_out: int,
    num_in: int,
    dtype: torch.dtype,
    *,
    num_shards: int = 1,
    block: tuple[int, int] = (128, 128),
    arithmetic: kernels.Arithmetic = "float32",
) -> kernels.PackedLinear:
    weight, scale = stored(num_out, num_in, dtype, block=block)
    return kernels.pack_linear(weight, scale_inv=scale, block=block, num_shards=num_shards, arithmetic=arithmetic)


def experts(
    num_experts: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    block: tuple[int, int] = (128, 128),
    arithmetic: kernels.Arithmetic = "float32",
) -> kernels.PackedExperts:
    scales_block = block if dtype in SCALED else None
    bank = kernels.PackedExperts.empty(
        num_experts, hidden, width, dtype=dtype, block=scales_block, arithmetic=arithmetic
    )
    for slot in range(num_experts):
        gate, gate_scale = stored(width, hidden, dtype, block=block, seed=3 * slot)
        up, up_scale = stored(width, hidden, dtype, block=block, seed=3 * slot + 1)
        down, down_scale = stored(hidden, width, dtype, block=block, seed=3 * slot + 2)
        if gate_scale is not None and up_scale is not None and down_scale is not None:
            bank.load(slot, gate, up, down, (gate_scale, up_scale, down_scale))
        else:
            bank.load(slot, gate, up, down)
    return bank


def heads(
    num_heads: int, num_out: int, num_in: int, dtype: torch.dtype, *, arithmetic: kernels.Arithmetic = "float32"
) -> kernels.PackedHeads:
    """Heads of one matrix [num_heads * num_out, num_in], whose scale blocks (48, 50) end anywhere in them."""
    weight, scale = stored(num_heads * num_out, num_in, dtype, block=(48, 50))
    starts = range(0, num_heads * num_out, num_out)
    scales = [
        kernels.BlockScale(
            scale_inv=scale[start // 48 : -(-(start + num_out) // 48)], rows=48, cols=50, row_phase=start % 48
        )
        for start in starts
        if scale is not None
    ]
    return kernels.pack_heads(weight.view(num_heads, num_out, num_in), scales=scales, arithmetic=arithmetic)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest element."""
    return float((got - want).abs().max() / want.abs().max())
