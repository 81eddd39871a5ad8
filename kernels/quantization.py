"""Weight-only int8: a scale for every 128 inputs of every output.

Legend: N outputs, K inputs, B blocks = ceil(K / 128).
"""

from __future__ import annotations

import torch

from kernels import panels, reference
from kernels.runtime import native, runs_native

INT8_BLOCK = 128


def quantize(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32, bfloat16 or float16 weight as int8 [N, K] and float32 scales [N, B], for `pack_linear` and the like.

    The scale of 128 neighbours in a row (fewer at its end) is their largest magnitude / 127; each becomes its quotient
    by the scale, rounded to nearest even. The same bits on every machine. Raises ValueError for NaN and infinity.
    """
    if not runs_native(weight_NK):
        return reference.quantize(weight_NK, INT8_BLOCK)
    if weight_NK.stride(1) != 1:
        weight_NK = weight_NK.contiguous()
    num_out, num_in = weight_NK.shape
    values_NK = torch.empty((num_out, num_in), dtype=torch.int8)
    scale_NB = torch.empty((num_out, -(-num_in // INT8_BLOCK)))
    native.quantize(
        weight_NK.data_ptr(),
        panels.KINDS[weight_NK.dtype],
        weight_NK.stride(0) * weight_NK.element_size(),
        num_out,
        num_in,
        INT8_BLOCK,
        values_NK.data_ptr(),
        scale_NB.data_ptr(),
    )
    return values_NK, scale_NB
