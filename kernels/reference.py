"""The same operations in plain torch, on any device: the oracle of the tests, and the path where the C kernels are not.

Equal to the C kernels up to rounding, but not batch-invariant. Same signatures; see there for the contracts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from kernels.experts import PackedExperts
    from kernels.heads import PackedHeads
    from kernels.layers import LayerStack, RoutedExperts
    from kernels.layout import Angles, AttentionBatch, Span
    from kernels.linear import PackedLinear
    from kernels.mla import MlaWeights

Pieces = tuple[torch.Tensor, ...]


def embed(table_VK: torch.Tensor, ids: array[int]) -> torch.Tensor:
    return table_VK.index_select(0, torch.tensor(ids, dtype=torch.int64, device=table_VK.device)).float()


def linear(x_TK: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    shards = zip(x_TK.chunk(packed.num_shards, 1), packed.dense().chunk(packed.num_shards, 1), strict=True)
    return tree_add([x @ weight.T for x, weight in shards])


def quantize(weight_NK: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_out, num_in = weight_NK.shape
    weight_NBk = F.pad(weight_NK.float(), (0, -num_in % block)).view(num_out, -1, block)
    top_NB = weight_NBk.abs().amax(2)
    if not top_NB.isfinite().all():
        raise ValueError("the weight to quantize contains NaN or infinity")
    scale_NB = (top_NB / 127).clamp(min=torch.finfo(torch.float32).tiny)
    values_NBk = (weight_NBk / scale_NB[:, :, None]).round().to(torch.int8)
    return values_NBk.flatten(1)[:, :num_in].contiguous(), scale_NB


def head_linear(x_TnK: torch.Tensor, packed: PackedHeads) -> torch.Tensor:
    return torch.einsum("tnk,njk->tnj", x_TnK, packed.dense())


def grouped_ffn(
    x_TH: torch.Tensor, experts: PackedExperts, slot_rows_S: torch.Tensor, slot_experts_S: torch.Tensor
) -> torch.Tensor:
    y_SH = torch.empty((slot_rows_S.shape[0], experts.hidden), device=x_TH.device)
    for expert in sorted(set(slot_experts_S.tolist())):
        slots = (slot_experts_S == expert).nonzero()[:, 0]
        gate, up, down = experts.dense(expert)
        x = x_TH[slot_rows_S[slots].long()]
        y_SH[slots] = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return y_SH


def run_layers(ids: array[int], stack: LayerStack, batch: AttentionBatch) -> torch.Tensor:
    x_TH = embed(stack.embedding, ids)
    for layer in stack.layers:
        normed = rms_norm(x_TH, layer.input_norm, stack.eps)
        (y_TH,) = mla_attend(mla_project(normed, layer.attention, batch, 0), layer.attention, batch, layer.cache)
        x_TH += _biased(y_TH, layer.output_bias)
        normed = rms_norm(x_TH, layer.ffn_norm, stack.eps)
        base = None if layer.ffn is None else ffn(normed, layer.ffn)
        if layer.routed is not None:
            ids_TK, weights_TK = layer.routed.gate.choose(normed, layer.routed.counts)
            base = _moe(normed, layer.routed, (ids_TK, weights_TK), base)
        assert base is not None
        x_TH += base
    return x_TH


def ffn(x_TH: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    rows = torch.arange(x_TH.shape[0], dtype=torch.int32, device=x_TH.device)
    return grouped_ffn(x_TH, experts, rows, torch.zeros_like(rows))


def _moe(
    x_TH: torch.Tensor, experts: RoutedExperts, routed: tuple[torch.Tensor, torch.Tensor], base_TH: torch.Tensor | None
) -> torch.Tensor:
    ids_TK, weights_TK = routed
    slots_TK = torch.arange(ids_TK.numel(), dtype=torch.int32, device=x_TH.device).view(ids_TK.shape)
    places = experts.place_of.to(x_TH.device)[ids_TK.flatten().long()]
    rows_SH = grouped_ffn(x_TH, experts.bank, (slots_TK // ids_TK.shape[1]).flatten(), places)
    return combine(rows_SH, slots_TK, weights_TK, base_TH)


def lay_out(spans: Sequence[Span], angles: Angles) -> dict[str, torch.Tensor]:
    device, size, width = angles.cos.device, 32, max(len(span.blocks) for span in spans)
    tables = [[*span.blocks, *[0] * (width - len(span.blocks))] for span in spans]
    block_tables = torch.tensor(tables, dtype=torch.int32, device=device)
    sequence = torch.arange(len(spans)).repeat_interleave(torch.tensor([span.num_rows for span in spans])).to(device)
    positions = torch.cat([torch.arange(span.start, span.start + span.num_rows) for span in spans]).to(device)
    return {
        "positions": positions.int(),
        "cos": angles.cos[positions],
        "sin": angles.sin[positions],
        "slots": block_tables[sequence, positions // size].long() * size + positions % size,
        "row_sequence": sequence.int(),
        "block_tables": block_tables,
    }


def mla_project(x_OH: torch.Tensor, weights: MlaWeights, batch: AttentionBatch, first_row: int) -> torch.Tensor:
    rows, width = slice(first_row, first_row + x_OH.shape[0]), weights.latent_width
    latent = _biased(linear(x_OH, weights.latent_down), weights.latent_down_bias)
    key = latent[:, None, width:].contiguous()
    rope_(key, batch.rows.cos[rows], batch.rows.sin[rows], weights.interleave)
    query = x_OH
    if weights.query_down is not None and weights.query_norm is not None:
        down = _biased(linear(x_OH, weights.query_down), weights.query_down_bias)
        query = rms_norm(down, weights.query_norm, weights.eps)
    return torch.cat((query, rms_norm(latent[:, :width], weights.latent_norm, weights.eps), key[:, 0]), 1)


def mla_attend(
    rows_TD: torch.Tensor, weights: MlaWeights, batch: AttentionBatch, cache: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    query_TQ, keys = rows_TD.split_with_sizes([weights.query_width, cache.shape[2]], 1)
    cache.view(-1, cache.shape[2]).index_copy_(0, batch.rows.slots, keys)
    q_TnK = linear(query_TQ, weights.query_up).view(batch.num_rows, weights.num_heads, -1)
    q_plain, q_rope = q_TnK.split_with_sizes([weights.key_up.num_in, weights.rope_width], 2)
    rope_(q_rope, batch.rows.cos, batch.rows.sin, weights.interleave)
    values = torch.empty((batch.num_rows, weights.num_heads, weights.value_up.num_out), device=rows_TD.device)
    at = batch.rows
    expanded = torch.zeros_like(at.positions, dtype=torch.bool)
    if at.expanded_until is not None:
        expanded = at.positions < at.expanded_until[at.row_sequence.long()]
    for rows, form in ((expanded.nonzero()[:, 0], _attend_expanded), ((~expanded).nonzero()[:, 0], _attend_absorbed)):
        if len(rows):
            paging = (cache, at.block_tables, at.row_sequence[rows], at.positions[rows], weights.scale)
            values[rows] = form(q_plain[rows], q_rope[rows], weights, paging)
    columns = values.flatten(1).split_with_sizes([part.num_in for part in weights.output], 1)
    return tuple(linear(x, part) for x, part in zip(columns, weights.output, strict=True))


_Paging = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]


def _attend_absorbed(q_plain: torch.Tensor, q_rope: torch.Tensor, weights: MlaWeights, paging: _Paging) -> torch.Tensor:
    o_TnC = mla_attention(head_linear(q_plain, weights.key_up), q_rope, *paging)
    return head_linear(o_TnC, weights.value_up)


def _attend_expanded(q_plain: torch.Tensor, q_rope: torch.Tensor, weights: MlaWeights, paging: _Paging) -> torch.Tensor:
    assert weights.key_expand is not None
    q_TnK = torch.cat((q_plain, q_rope), 2)
    return expanded_attention(q_TnK, (weights.key_expand, weights.value_up), *paging)


def _biased(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    return weight_H * (x_TH * torch.rsqrt(x_TH.pow(2).mean(-1, keepdim=True) + eps))


def rope_(x_TnR: torch.Tensor, cos_TR2: torch.Tensor, sin_TR2: torch.Tensor, interleave: bool) -> torch.Tensor:
    half = x_TnR.shape[2] // 2
    first, second = (x_TnR[..., 0::2], x_TnR[..., 1::2]) if interleave else (x_TnR[..., :half], x_TnR[..., half:])
    cos, sin = cos_TR2[:, None], sin_TR2[:, None]
    rotated = first * cos - second * sin, second * cos + first * sin
    first.copy_(rotated[0])
    second.copy_(rotated[1])
    return x_TnR


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    *,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    scoring: str,
    method: str,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = scores_TE if bias_E is None or method != "noaux_tc" else scores_TE + bias_E
    if method != "greedy" and num_groups > 1:
        grouped = choice_TE.view(choice_TE.shape[0], num_groups, -1)
        best_of = min(2, grouped.shape[2]) if method == "noaux_tc" else 1
        group_scores = grouped.topk(best_of, -1).values.sum(-1)
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, _best(group_scores, topk_groups), False)
        masked = float("-inf") if method == "noaux_tc" else 0.0
        choice_TE = grouped.masked_fill(outside[..., None], masked).flatten(1)
    ids_TK = _best(choice_TE, top_k)
    weights_TK = (choice_TE if method == "group_limited_greedy" else scores_TE).gather(1, ids_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK.int(), weights_TK * scale


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest, the lowest index of equals first (topk leaves that open)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def plan_slots(
    ids_TK: torch.Tensor, rank_of_E: torch.Tensor, num_ranks: int
) -> tuple[Pieces, Pieces, Pieces, Pieces, torch.Tensor, list[int]]:
    ids = ids_TK.flatten().long()
    _check_below(ids, rank_of_E.shape[0], "expert")
    ranks = rank_of_E.long()[ids]
    _check_below(ranks, num_ranks, "rank")
    positions = ranks.argsort(stable=True)
    ranks, tokens = ranks[positions], positions // ids_TK.shape[1]
    is_first = torch.ones_like(ranks, dtype=torch.bool)
    is_first[1:] = (ranks[1:] != ranks[:-1]) | (tokens[1:] != tokens[:-1])
    row_counts = ranks[is_first].bincount(minlength=num_ranks)
    rows = is_first.cumsum(0) - 1 - (row_counts.cumsum(0) - row_counts)[ranks]
    places = torch.empty_like(positions).index_copy_(0, positions, torch.arange(len(positions)))
    slot_counts = ranks.bincount(minlength=num_ranks).tolist()
    by_rank = [torch.split_with_sizes(t.int(), slot_counts) for t in (rows, ids[positions], positions)]
    firsts = torch.split_with_sizes(tokens[is_first].int(), row_counts.tolist())
    return firsts, by_rank[0], by_rank[1], by_rank[2], places.int(), slot_counts


def _check_below(values: torch.Tensor, limit: int, name: str) -> None:
    wrong = values[(values < 0) | (values >= limit)]
    if len(wrong):
        raise ValueError(f"{name} {int(wrong[0])} is outside 0 to {limit - 1}: router and placement disagree")


def mla_attention(
    q_latent_TnC: torch.Tensor,
    q_rope_TnR: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_seq: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out_TnC = torch.empty_like(q_latent_TnC, memory_format=torch.contiguous_format)
    query = torch.cat((q_latent_TnC, q_rope_TnR), -1)
    for seq in sorted(set(row_seq.tolist())):
        rows = (row_seq == seq).nonzero()[:, 0]
        last = positions[rows]
        length = int(last.max()) + 1
        blocks = block_tables[seq, : -(-length // cache.shape[1])].long()
        keys_LD = cache[blocks].flatten(0, 1)[:length]
        scores_TnL = (query[rows] @ keys_LD.T) * scale
        hidden = torch.arange(length, device=cache.device) > last[:, None]
        weights_TnL = scores_TnL.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        out_TnC[rows] = weights_TnL @ keys_LD[:, : q_latent_TnC.shape[2]]
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
    key, value = weights
    out_TnV = torch.empty((*q_TnK.shape[:2], value.num_out), device=q_TnK.device)
    for seq in sorted(set(row_seq.tolist())):
        rows = (row_seq == seq).nonzero()[:, 0]
        last = positions[rows]
        length = int(last.max()) + 1
        blocks = block_tables[seq, : -(-length // cache.shape[1])].long()
        latent_LC, rope_LR = (
            cache[blocks].flatten(0, 1)[:length].split_with_sizes([key.num_in, q_TnK.shape[2] - key.num_out], 1)
        )
        keys_nLP, values_nLV = latent_LC @ key.dense().mT, latent_LC @ value.dense().mT
        rope_nLR = rope_LR.expand(key.num_heads, -1, -1)
        scores_nTL = (q_TnK[rows].transpose(0, 1) @ torch.cat((keys_nLP, rope_nLR), 2).mT) * scale
        hidden_TL = torch.arange(length, device=cache.device) > last[:, None]
        weights_nTL = scores_nTL.masked_fill(hidden_TL, float("-inf")).softmax(-1)
        out_TnV[rows] = (weights_nTL @ values_nLV).transpose(0, 1)
    return out_TnV


def combine(
    rows_SH: torch.Tensor, slot_index_TK: torch.Tensor, weights_TK: torch.Tensor, base_TH: torch.Tensor | None
) -> torch.Tensor:
    shape = (slot_index_TK.shape[0], rows_SH.shape[1])
    y_TH = torch.zeros(shape, device=rows_SH.device) if base_TH is None else base_TH
    for index_T, weight_T in zip(slot_index_TK.long().unbind(1), weights_TK.unbind(1), strict=True):
        y_TH = torch.addcmul(y_TH, weight_T[:, None], rows_SH[index_T])
    return y_TH


def tree_add(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    return tree_add([left + right for left, right in zip(parts[::2], parts[1::2], strict=True)])


def checksum(data: torch.Tensor) -> int:
    """Horner's scheme over the 64-bit words, a block of them at a time; the number of bytes comes last."""
    prime, block, mask = 0x9E3779B185EBCA87, 4096, 2**64 - 1
    padded = np.zeros(-(-data.nbytes // 8) * 8, dtype=np.uint8)
    padded[: data.nbytes] = data.reshape(-1).view(torch.uint8).numpy()
    words = padded.view(np.uint64)
    powers = np.array([pow(prime, i, 2**64) for i in range(block)], dtype=np.uint64)[::-1]
    result = 0
    for start in range(0, words.size, block):
        part = words[start : start + block]
        added = int((part * powers[block - part.size :]).sum(dtype=np.uint64))
        result = (result * pow(prime, part.size, 2**64) + added) & mask
    return (result * prime + data.nbytes) & mask
