"""Linear layers: y = x W^T with W packed once and read many times.

Legend: T rows, N outputs, K inputs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import panels, reference
from kernels.runtime import Arithmetic, native, native_available, require, runs_native

EMBEDDINGS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedLinear:
    """A weight [num_out, num_in] ready for `linear`: panels for the C kernels, or the plain weight elsewhere."""

    num_out: int
    num_in: int
    num_shards: int
    dtype: torch.dtype
    in_pairs: bool
    device: torch.device
    weight: torch.Tensor  # panels (bytes) if native, else [N, K]
    scale: panels.PanelScale | panels.BlockScale | None  # the former if native
    matrix: torch.Tensor | None  # struct Matrix of csrc/kernels.h; None: not native
    address: int  # of matrix

    @property
    def nbytes(self) -> int:
        """Bytes that the weight and its scales occupy."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dense(self) -> torch.Tensor:
        """The weight as float32 [num_out, num_in], a copy."""
        weight = self.weight
        if self.matrix is not None:
            stride = panels.panel_bytes(self.num_in, self.dtype)
            shape = self.num_out, self.num_in
            weight = panels.unpack(weight, *shape, dtype=self.dtype, panel_stride=stride, in_pairs=self.in_pairs)
        return panels.dequantize(weight, self.scale)


def pack_linear(
    weight_NK: torch.Tensor,
    *,
    scale_inv: torch.Tensor | None = None,
    block: tuple[int, int] = (128, 128),
    offset: tuple[int, int] = (0, 0),
    num_shards: int = 1,
    arithmetic: Arithmetic = "float32",
    device: torch.device | str = "cpu",
) -> PackedLinear:
    """Pack a weight; the result owns its memory.

    float8_e4m3fn and int8 need `scale_inv`, the scales of exactly the blocks (`block` rows by columns) that the weight
    touches; `offset` is the (row, column) of the weight's first element in the matrix that the blocks were laid over,
    so that a slice computes the same bits as its part of the whole. With num_shards > 1 (a power of two that divides
    K) the sum over K is cut in that many equal pieces, added in a balanced binary tree: the product of whole and
    `tree_add` of the products of its aligned power-of-two parts are equal to the bit. Raises ValueError.
    """
    num_out, num_in = _check_shape(weight_NK, num_shards)
    block_scale = _scale_of(weight_NK, scale_inv, block, offset)
    device = torch.device(device)
    in_pairs = panels.lies_in_pairs(weight_NK.dtype, num_in // num_shards, arithmetic)
    scale: panels.PanelScale | panels.BlockScale | None
    matrix = None
    if device.type == "cpu" and native_available():
        weight, scale, matrix = _to_panels(weight_NK, block_scale, num_shards, in_pairs)
    else:
        weight = weight_NK.to(device, copy=True).contiguous()
        scale = None if block_scale is None else block_scale.to(device)
    return PackedLinear(
        num_out=num_out,
        num_in=num_in,
        num_shards=num_shards,
        dtype=weight_NK.dtype,
        in_pairs=in_pairs,
        device=device,
        weight=weight,
        scale=scale,
        matrix=matrix,
        address=0 if matrix is None else matrix.data_ptr(),
    )


def linear(x_TK: torch.Tensor, packed: PackedLinear, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """y_TN = x W^T in float32. Each row's bits depend on that row alone. `out` receives the result if given."""
    require(x_TK, "x", (None, packed.num_in))
    if packed.matrix is None:
        y_TN = reference.linear(x_TK, packed)
        return y_TN if out is None else out.copy_(y_TN)
    num_rows = x_TK.shape[0]
    if out is None:
        out = torch.empty((num_rows, packed.num_out))
    else:
        require(out, "out", (num_rows, packed.num_out))
    native.linear(packed.address, x_TK.data_ptr(), num_rows, out.data_ptr())
    return out


def embed(table_VK: torch.Tensor, ids: array[int]) -> torch.Tensor:
    """Float32 rows [T, K] of int32 ids ("i"). Raises ValueError on an id outside the vocabulary (native only)."""
    if table_VK.dtype not in EMBEDDINGS or not runs_native(table_VK):
        return reference.embed(table_VK, ids)
    require(table_VK, "table", (None, None), table_VK.dtype)
    ids_at, num_rows = ids.buffer_info()
    num_ids, width = table_VK.shape
    x_TK = torch.empty((num_rows, width))
    native.embed(table_VK.data_ptr(), panels.KINDS[table_VK.dtype], num_ids, width, ids_at, num_rows, x_TK.data_ptr())
    return x_TK


def normed_linear(
    x_TK: torch.Tensor,
    rows: Sequence[int],
    norm_K: torch.Tensor,
    packed: PackedLinear,
    *,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` of `rms_norm` of some rows of x, the same bits: the head. `out` receives the result if given.

    Raises ValueError on a row that is not there (native only).
    """
    require(x_TK, "x", (None, packed.num_in))
    require(norm_K, "norm", (packed.num_in,))
    if packed.matrix is None:
        chosen = torch.tensor(rows, dtype=torch.int64, device=x_TK.device)
        y_RN = reference.linear(reference.rms_norm(x_TK.index_select(0, chosen), norm_K, eps), packed)
        return y_RN if out is None else out.copy_(y_RN)
    index = array("q", rows)
    index_at, num_rows = index.buffer_info()
    if out is None:
        out = torch.empty((num_rows, packed.num_out))
    else:
        require(out, "out", (num_rows, packed.num_out))
    native.normed_linear(
        packed.address, x_TK.data_ptr(), index_at, num_rows, x_TK.shape[0], norm_K.data_ptr(), eps, out.data_ptr()
    )
    return out


def _check_shape(weight_NK: torch.Tensor, num_shards: int) -> tuple[int, int]:
    if weight_NK.dim() != 2 or 0 in weight_NK.shape:
        raise ValueError(f"weight has shape {tuple(weight_NK.shape)}, must be (outputs, inputs), neither of them 0")
    panels.check_weight_dtype(weight_NK.dtype)
    num_out, num_in = weight_NK.shape
    if num_shards < 1 or num_shards & (num_shards - 1) or num_in % num_shards:
        raise ValueError(f"num_shards is {num_shards}; must be a power of two that divides the {num_in} inputs")
    return num_out, num_in


def _scale_of(
    weight_NK: torch.Tensor, scale_inv: torch.Tensor | None, block: tuple[int, int], offset: tuple[int, int]
) -> panels.BlockScale | None:
    if (weight_NK.dtype in panels.SCALED) != (scale_inv is not None):
        given = "without" if scale_inv is None else "with"
        raise ValueError(
            f"weight is {weight_NK.dtype} {given} scale_inv; float8_e4m3fn and int8 need it, others have none"
        )
    if scale_inv is None:
        return None
    scale = panels.BlockScale(
        scale_inv=scale_inv.float().contiguous(),
        rows=block[0],
        cols=block[1],
        row_phase=offset[0] % block[0],
        col_phase=offset[1] % block[1],
    )
    scale.check(*weight_NK.shape)
    return scale


def _to_panels(
    weight_NK: torch.Tensor, block_scale: panels.BlockScale | None, num_shards: int, in_pairs: bool
) -> tuple[torch.Tensor, panels.PanelScale | None, torch.Tensor]:
    """Panels, scales as the kernel reads them, and the struct Matrix that points at both."""
    (num_out, num_in), dtype = weight_NK.shape, weight_NK.dtype
    stride = panels.panel_bytes(num_in, dtype)
    data = panels.allocate(panels.num_panels(num_out) * stride)
    panels.pack_into(data, weight_NK, stride, in_pairs=in_pairs)
    scale = None if block_scale is None else block_scale.for_panels(num_out)
    fields = panels.matrix_fields(
        data.data_ptr(),
        dtype,
        (num_out, num_in),
        scale=scale,
        num_shards=num_shards,
        panel_stride=stride,
        in_pairs=in_pairs,
    )
    return data, scale, torch.tensor(fields, dtype=torch.int64)
