"""Operations on rows: norm, rotary embedding, combine, tree sum.

Legend: T rows, H hidden, V vocabulary, K top-k, S slots, n heads, R rotary dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels import reference
from kernels.runtime import native, require, runs_native


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), float32 (Zhang and Sennrich, arXiv 1910.07467)."""
    num_rows, width = x_TH.shape
    require(x_TH, "x", (None, None))
    require(weight_H, "weight", (width,))
    if not runs_native(x_TH):
        return reference.rms_norm(x_TH, weight_H, eps)
    y_TH = torch.empty_like(x_TH)
    native.rms_norm(x_TH.data_ptr(), weight_H.data_ptr(), y_TH.data_ptr(), num_rows, width, eps)
    return y_TH


def add_rms_norm_(x_TH: torch.Tensor, y_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Add y to x in place; returns rms_norm(x) of the sum, the same bits as apart."""
    shape = x_TH.shape
    num_rows, width = shape
    require(x_TH, "x", shape)
    require(y_TH, "y", shape)
    require(weight_H, "weight", (width,))
    if not runs_native(x_TH):
        return reference.rms_norm(x_TH.add_(y_TH), weight_H, eps)
    out_TH = torch.empty_like(x_TH)
    x_at, y_at = x_TH.data_ptr(), y_TH.data_ptr()
    native.add_rms_norm(x_at, y_at, weight_H.data_ptr(), out_TH.data_ptr(), num_rows, width, eps)
    return out_TH


def rope_(x_TnR: torch.Tensor, cos_TR2: torch.Tensor, sin_TR2: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotate x in place and return it. x [T, n, R] may be a view whose last dim is contiguous; cos, sin [T, R/2].

    Pair i is (2i, 2i+1) if interleave, else (i, R/2 + i); it stays where it is.
    """
    num_rows, num_heads, width = x_TnR.shape
    if width % 2 or x_TnR.dtype != torch.float32 or x_TnR.stride(2) != 1:
        raise ValueError(
            f"x is {x_TnR.dtype} {tuple(x_TnR.shape)}, must be float32, even and contiguous in the last dim"
        )
    require(cos_TR2, "cos", (num_rows, width // 2))
    require(sin_TR2, "sin", (num_rows, width // 2))
    if not runs_native(x_TnR):
        return reference.rope_(x_TnR, cos_TR2, sin_TR2, interleave)
    at, strides = x_TnR.data_ptr(), x_TnR.stride()
    cos_at, sin_at = cos_TR2.data_ptr(), sin_TR2.data_ptr()
    native.rope(at, strides[0], strides[1], num_rows, num_heads, width, cos_at, sin_at, int(interleave))
    return x_TnR


def combine(
    rows_SH: torch.Tensor, slot_index_TK: torch.Tensor, weights_TK: torch.Tensor, base_TH: torch.Tensor | None
) -> torch.Tensor:
    """y_TH = base (or 0) + sum over k, in order, of weights[t, k] * rows[slot_index[t, k]], each step fused.

    slot_index is int32. Raises ValueError on an index out of range (native only).
    """
    num_rows, top_k = slot_index_TK.shape
    num_slots, width = rows_SH.shape
    require(rows_SH, "rows", (None, None))
    require(slot_index_TK, "slot_index", (None, None), torch.int32)
    require(weights_TK, "weights", (num_rows, top_k))
    if base_TH is not None:
        require(base_TH, "base", (num_rows, width))
    if not runs_native(rows_SH):
        return reference.combine(rows_SH, slot_index_TK, weights_TK, base_TH)
    y_TH = torch.empty((num_rows, width))
    slots_at, weights_at = slot_index_TK.data_ptr(), weights_TK.data_ptr()
    base_at = 0 if base_TH is None else base_TH.data_ptr()
    native.combine(
        rows_SH.data_ptr(), num_slots, slots_at, weights_at, base_at, y_TH.data_ptr(), num_rows, top_k, width
    )
    return y_TH


def tree_add(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of a power of two of equally shaped tensors in a balanced binary tree: ((0 + 1) + (2 + 3)) + ...

    A single part is returned as it is, not copied.
    """
    count = len(parts)
    if count == 0 or count & (count - 1) or count > 1 << 15:
        raise ValueError(f"{count} parts; a balanced tree needs a power of two, at most {1 << 15}")
    for part in parts:
        require(part, "part", tuple(parts[0].shape))
    if count == 1:
        return parts[0]
    if not runs_native(parts[0]):
        return reference.tree_add(parts)
    out = torch.empty_like(parts[0])
    addresses = torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64)
    native.tree_add(addresses.data_ptr(), count, out.data_ptr(), out.numel())
    return out
