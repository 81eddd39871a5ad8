"""Multi-head latent attention over the paged latent cache.

Legend: T rows, n heads, C latent width, R rotary dim, P width of a key but for its rotary part, V width of a value.
"""

from __future__ import annotations

import torch

from kernels import reference
from kernels.heads import PackedHeads
from kernels.runtime import native, require, runs_native

KEY_BLOCK = 32  # positions per cache block


def mla_attention(
    q_latent_TnC: torch.Tensor,
    q_rope_TnR: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_seq: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """o_TnC: row t attends positions 0..positions[t] of sequence row_seq[t], absorbed form, softmax of score * scale.

    cache [num_blocks, 32, C+R] holds keys (C latent, R rotated) whose first C are the values; block_tables int32
    [num_seqs, max_blocks] names the block of each 32 positions; row_seq and positions are int32[T]. Queries may be
    views with a contiguous last dim. Key blocks are taken in order with online softmax; a row's bits do not depend
    on other rows, on where blocks lie, nor on what the cache holds elsewhere. Raises ValueError on an index out of
    range (native only). Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
    """
    num_rows, num_heads, latent = q_latent_TnC.shape
    rope = q_rope_TnR.shape[2]
    if q_rope_TnR.shape[:2] != q_latent_TnC.shape[:2]:
        raise ValueError(f"q_rope {tuple(q_rope_TnR.shape)} does not fit q_latent {tuple(q_latent_TnC.shape)}")
    for name, query in (("q_latent", q_latent_TnC), ("q_rope", q_rope_TnR)):
        if query.dtype != torch.float32 or query.stride(2) != 1:
            raise ValueError(f"{name} is {query.dtype}, must be float32 with a contiguous last dim")
    require(cache, "cache", (None, KEY_BLOCK, latent + rope))
    require(block_tables, "block_tables", (None, None), torch.int32)
    require(row_seq, "row_seq", (num_rows,), torch.int32)
    require(positions, "positions", (num_rows,), torch.int32)
    if not runs_native(q_latent_TnC):
        return reference.mla_attention(q_latent_TnC, q_rope_TnR, cache, block_tables, row_seq, positions, scale)
    out_TnC = torch.empty((num_rows, num_heads, latent))
    native.attention(
        q_latent_TnC.data_ptr(),
        q_rope_TnR.data_ptr(),
        cache.data_ptr(),
        block_tables.data_ptr(),
        row_seq.data_ptr(),
        positions.data_ptr(),
        out_TnC.data_ptr(),
        q_latent_TnC.stride(0),
        q_latent_TnC.stride(1),
        q_rope_TnR.stride(0),
        q_rope_TnR.stride(1),
        num_rows,
        num_heads,
        latent,
        rope,
        cache.shape[0],
        block_tables.shape[0],
        block_tables.shape[1],
        scale,
    )
    return out_TnC


def expanded_attention(
    q_TnK: torch.Tensor,
    weights: tuple[PackedHeads, PackedHeads],
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_seq: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """o_TnV: row t attends positions 0..positions[t] of sequence row_seq[t] in the expanded form.

    `weights` lead from a latent to each head's key [n, P, C] and value [n, V, C]; a key is that and the cached rotary
    part, so queries have K = P + R. All else is as for mla_attention, rows of a sequence best being neighbours, which
    share the expansion. Key positions are taken in order, 128 at a time, with online softmax; a row's bits do not
    depend on other rows. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    key, value = weights
    num_rows, num_heads, width = q_TnK.shape
    rope = width - key.num_out
    if q_TnK.dtype != torch.float32 or q_TnK.stride(2) != 1:
        raise ValueError(f"q is {q_TnK.dtype}, must be float32 with a contiguous last dim")
    if key.num_heads != num_heads or value.num_heads != num_heads or key.num_in != value.num_in or rope < 0:
        raise ValueError(
            f"{key.num_heads} keys [{key.num_out}, {key.num_in}] and {value.num_heads} values [.., {value.num_in}] do "
            f"not fit queries {tuple(q_TnK.shape)}"
        )
    require(cache, "cache", (None, KEY_BLOCK, key.num_in + rope))
    require(block_tables, "block_tables", (None, None), torch.int32)
    require(row_seq, "row_seq", (num_rows,), torch.int32)
    require(positions, "positions", (num_rows,), torch.int32)
    if key.matrices is None or value.matrices is None:
        return reference.expanded_attention(q_TnK, weights, cache, block_tables, row_seq, positions, scale)
    out_TnV = torch.empty((num_rows, num_heads, value.num_out))
    native.expanded_attention(
        q_TnK.data_ptr(),
        key.address,
        value.address,
        cache.data_ptr(),
        block_tables.data_ptr(),
        row_seq.data_ptr(),
        positions.data_ptr(),
        out_TnV.data_ptr(),
        q_TnK.stride(0),
        q_TnK.stride(1),
        num_rows,
        num_heads,
        rope,
        cache.shape[0],
        block_tables.shape[0],
        block_tables.shape[1],
        scale,
    )
    return out_TnV
