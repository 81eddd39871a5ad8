"""Products with one weight per attention head.

Legend: T rows, n heads, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import panels, reference
from kernels.runtime import native, native_available


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedHeads:
    """One weight [num_out, num_in] for each head, ready for `head_linear`."""

    num_heads: int
    num_out: int
    num_in: int
    dtype: torch.dtype
    device: torch.device
    weight: torch.Tensor  # panels (bytes) of all heads if native, else [n, N, K]
    matrix: torch.Tensor | None  # struct Matrix of head 0; None: not native
    address: int
    head_bytes: int

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def dense(self) -> torch.Tensor:
        """The weights as float32 [num_heads, num_out, num_in], a copy."""
        if self.matrix is None:
            return self.weight.float()
        stride = panels.panel_bytes(self.num_in, self.dtype)
        heads = self.weight.view(self.num_heads, self.head_bytes)
        unpacked = [
            panels.unpack(head, self.num_out, self.num_in, dtype=self.dtype, panel_stride=stride) for head in heads
        ]
        return torch.stack(unpacked).float()


def pack_heads(weight_nNK: torch.Tensor, *, device: torch.device | str = "cpu") -> PackedHeads:
    """Pack one weight [N, K] per head (float32, bfloat16 or float16); the result owns its memory."""
    if weight_nNK.dim() != 3 or 0 in weight_nNK.shape:
        raise ValueError(
            f"weight has shape {tuple(weight_nNK.shape)}, must be (heads, outputs, inputs), none of them 0"
        )
    dtype = weight_nNK.dtype
    panels.check_weight_dtype(dtype)
    if dtype == torch.float8_e4m3fn:
        raise ValueError("per-head weights cannot be float8_e4m3fn; pass kernels.dequantize(weight, scale) instead")
    num_heads, num_out, num_in = weight_nNK.shape
    device = torch.device(device)
    stride = panels.panel_bytes(num_in, dtype)
    head_bytes = panels.num_panels(num_out) * stride
    matrix = None
    if device.type == "cpu" and native_available():
        weight = panels.allocate(num_heads * head_bytes)
        for head in range(num_heads):
            panels.pack_into(weight[head * head_bytes :], weight_nNK[head], stride)
        fields = panels.matrix_fields(weight.data_ptr(), dtype, num_out, num_in, panel_stride=stride)
        matrix = torch.tensor(fields, dtype=torch.int64)
    else:
        weight = weight_nNK.to(device, copy=True).contiguous()
    return PackedHeads(
        num_heads=num_heads,
        num_out=num_out,
        num_in=num_in,
        dtype=dtype,
        device=device,
        weight=weight,
        matrix=matrix,
        address=0 if matrix is None else matrix.data_ptr(),
        head_bytes=head_bytes,
    )


def head_linear(x_TnK: torch.Tensor, packed: PackedHeads) -> torch.Tensor:
    """y_TnN: head h of every row times the weight of head h. x may be a view; its last dim must be contiguous."""
    wanted = (packed.num_heads, packed.num_in)
    if x_TnK.dim() != 3 or tuple(x_TnK.shape[1:]) != wanted or x_TnK.dtype != torch.float32:
        raise ValueError(f"x is {x_TnK.dtype} {tuple(x_TnK.shape)}, must be float32 (rows, {wanted[0]}, {wanted[1]})")
    if x_TnK.stride(2) != 1 and packed.num_in > 1:
        raise ValueError(f"the last dim of x has stride {x_TnK.stride(2)}, must be 1; call .contiguous() first")
    if packed.matrix is None:
        return reference.head_linear(x_TnK, packed)
    num_rows = x_TnK.shape[0]
    y_TnN = torch.empty((num_rows, packed.num_heads, packed.num_out))
    strides = x_TnK.stride()
    native.heads(
        packed.address,
        packed.num_heads,
        packed.head_bytes,
        x_TnK.data_ptr(),
        strides[0],
        strides[1],
        num_rows,
        y_TnN.data_ptr(),
    )
    return y_TnN
