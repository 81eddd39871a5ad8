"""Products with one weight per attention head.

Legend: T rows, n heads, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from kernels import panels, reference
from kernels.runtime import Arithmetic, native, native_available


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedHeads:
    """One weight [num_out, num_in] for each head, ready for `head_linear`."""

    num_heads: int
    num_out: int
    num_in: int
    dtype: torch.dtype
    in_pairs: bool
    device: torch.device
    weight: torch.Tensor  # panels (bytes) of all heads if native, [n, bytes], else [n, N, K]
    scales: tuple[panels.PanelScale | panels.BlockScale, ...]  # one for each head, or none; the former if native
    matrices: torch.Tensor | None  # struct Matrix of each head; None: not native
    address: int  # of matrices

    @property
    def nbytes(self) -> int:
        """Bytes that weights and scales occupy."""
        return self.weight.nbytes + sum(scale.nbytes for scale in self.scales)

    def dense(self) -> torch.Tensor:
        """The weights as float32 [num_heads, num_out, num_in], a copy."""
        return torch.stack([self._dense(head) for head in range(self.num_heads)])

    def _dense(self, head: int) -> torch.Tensor:
        weight = self.weight[head]
        if self.matrices is not None:
            stride = panels.panel_bytes(self.num_in, self.dtype)
            shape = self.num_out, self.num_in
            weight = panels.unpack(weight, *shape, dtype=self.dtype, panel_stride=stride, in_pairs=self.in_pairs)
        return panels.dequantize(weight, self.scales[head] if self.scales else None)


def pack_heads(
    weight_nNK: torch.Tensor,
    *,
    scales: Sequence[panels.BlockScale] = (),
    arithmetic: Arithmetic = "float32",
    device: torch.device | str = "cpu",
) -> PackedHeads:
    """Pack one weight [N, K] per head; the result owns its memory. float8_e4m3fn and int8 need one of `scales` for
    each head. Raises ValueError."""
    _check(weight_nNK, scales)
    num_heads, num_out, num_in = weight_nNK.shape
    dtype, device = weight_nNK.dtype, torch.device(device)
    in_pairs = panels.lies_in_pairs(dtype, num_in, arithmetic)
    packed_scales: tuple[panels.PanelScale | panels.BlockScale, ...]
    matrices = None
    if device.type == "cpu" and native_available():
        panel_scales = tuple(scale.for_panels(num_out) for scale in scales)
        stride = panels.panel_bytes(num_in, dtype)
        head_bytes = panels.num_panels(num_out) * stride
        weight = panels.allocate(num_heads * head_bytes).view(num_heads, head_bytes)
        words = []
        for data, source, scale in zip_longest(weight, weight_nNK, panel_scales):
            panels.pack_into(data, source, stride, in_pairs=in_pairs)
            words += panels.matrix_fields(
                data.data_ptr(), dtype, (num_out, num_in), scale=scale, panel_stride=stride, in_pairs=in_pairs
            )
        matrices, packed_scales = torch.tensor(words, dtype=torch.int64), panel_scales
    else:
        packed_scales = tuple(scale.to(device) for scale in scales)
        weight = weight_nNK.to(device, copy=True).contiguous()
    return PackedHeads(
        num_heads=num_heads,
        num_out=num_out,
        num_in=num_in,
        dtype=dtype,
        in_pairs=in_pairs,
        device=device,
        weight=weight,
        scales=packed_scales,
        matrices=matrices,
        address=0 if matrices is None else matrices.data_ptr(),
    )


def _check(weight_nNK: torch.Tensor, scales: Sequence[panels.BlockScale]) -> None:
    if weight_nNK.dim() != 3 or 0 in weight_nNK.shape:
        raise ValueError(
            f"weight has shape {tuple(weight_nNK.shape)}, must be (heads, outputs, inputs), none of them 0"
        )
    panels.check_weight_dtype(weight_nNK.dtype)
    num_heads, num_out, num_in = weight_nNK.shape
    wanted = num_heads if weight_nNK.dtype in panels.SCALED else 0
    if len(scales) != wanted:
        raise ValueError(f"{len(scales)} scales for {num_heads} heads of {weight_nNK.dtype}, must be {wanted}")
    for scale in scales:
        scale.check(num_out, num_in)


def head_linear(x_TnK: torch.Tensor, packed: PackedHeads) -> torch.Tensor:
    """y_TnN: head h of every row times the weight of head h. x may be a view; its last dim must be contiguous."""
    wanted = (packed.num_heads, packed.num_in)
    if x_TnK.dim() != 3 or tuple(x_TnK.shape[1:]) != wanted or x_TnK.dtype != torch.float32:
        raise ValueError(f"x is {x_TnK.dtype} {tuple(x_TnK.shape)}, must be float32 (rows, {wanted[0]}, {wanted[1]})")
    if x_TnK.stride(2) != 1 and packed.num_in > 1:
        raise ValueError(f"the last dim of x has stride {x_TnK.stride(2)}, must be 1; call .contiguous() first")
    if packed.matrices is None:
        return reference.head_linear(x_TnK, packed)
    num_rows = x_TnK.shape[0]
    y_TnN = torch.empty((num_rows, packed.num_heads, packed.num_out))
    strides = x_TnK.stride()
    native.heads(
        packed.address,
        packed.num_heads,
        x_TnK.data_ptr(),
        strides[0],
        strides[1],
        num_rows,
        y_TnN.data_ptr(),
    )
    return y_TnN
