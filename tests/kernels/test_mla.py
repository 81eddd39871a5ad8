"""A layer of attention in two calls: the same bits as its single operations, and what torch computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import needs_native, normal, packed, relative_error, seeded

HEADS, PLAIN, ROPE, LATENT, VALUE, HIDDEN = 4, 24, 16, 61, 20, 96

FIELDS = [field.name for field in dataclasses.fields(kernels.MlaWeights) if field.init]


def layer(dtype: torch.dtype = torch.bfloat16, *, compressed: bool = True, biased: bool = False) -> kernels.MlaWeights:
    query = 45 if compressed else HIDDEN
    key = (normal(HEADS, LATENT, PLAIN, seed=5) / 5).bfloat16()
    fields: dict[str, Any] = {
        "query_down": packed(query, HIDDEN, dtype) if compressed else None,
        "query_down_bias": normal(query, seed=1) if compressed and biased else None,
        "query_norm": normal(query, seed=2) if compressed else None,
        "query_up": packed(HEADS * (PLAIN + ROPE), query, dtype),
        "latent_down": packed(LATENT + ROPE, HIDDEN, dtype),
        "latent_down_bias": normal(LATENT + ROPE, seed=3) if biased else None,
        "latent_norm": normal(LATENT, seed=4),
        "key_up": kernels.pack_heads(key),
        "key_expand": kernels.pack_heads(key.mT.contiguous()),
        "value_up": kernels.pack_heads((normal(HEADS, VALUE, LATENT, seed=6) / 8).bfloat16()),
        "output": tuple(packed(HIDDEN, n * VALUE, dtype, num_shards=n) for n in (1, 1, 2)),
    }
    return kernels.MlaWeights(**fields, eps=1e-5, interleave=compressed, scale=0.15)


def batch(num_rows: int = 70, until: tuple[int, int] | None = None) -> kernels.AttentionBatch:
    """Two sequences: the last positions of the first, all of the second. `until`: where each one's prompt ends."""
    first = num_rows // 3
    positions = torch.cat((torch.arange(first) + 40, torch.arange(num_rows - first)))
    sequence = (torch.arange(num_rows) >= first).long()
    tables = torch.randperm(10, generator=seeded())[:8].view(2, 4)
    angle = normal(num_rows, ROPE // 2, seed=7)
    rows = kernels.BatchRows(
        positions=positions.int(),
        cos=angle.cos(),
        sin=angle.sin(),
        slots=tables[sequence, positions // 32] * 32 + positions % 32,
        row_sequence=sequence.int(),
        block_tables=tables.int(),
        expanded_until=None if until is None else torch.tensor(until, dtype=torch.int32),
    )
    return kernels.AttentionBatch(rows)


def biased(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias


def composed_project(x: torch.Tensor, w: kernels.MlaWeights, rows: kernels.BatchRows, first: int) -> torch.Tensor:
    latent = biased(kernels.linear(x, w.latent_down), w.latent_down_bias)
    key = latent[:, None, LATENT:].contiguous()
    kernels.rope_(key, rows.cos[first : first + len(x)], rows.sin[first : first + len(x)], w.interleave)
    query = x
    if w.query_down is not None and w.query_norm is not None:
        query = kernels.rms_norm(biased(kernels.linear(x, w.query_down), w.query_down_bias), w.query_norm, w.eps)
    return torch.cat((query, kernels.rms_norm(latent[:, :LATENT].contiguous(), w.latent_norm, w.eps), key[:, 0]), 1)


def composed_attend(
    rows_TD: torch.Tensor, w: kernels.MlaWeights, rows: kernels.BatchRows, cache: torch.Tensor
) -> list[torch.Tensor]:
    query, keys = rows_TD.split([w.query_width, LATENT + ROPE], 1)
    cache.view(-1, LATENT + ROPE)[rows.slots] = keys
    q = kernels.linear(query.contiguous(), w.query_up).view(-1, HEADS, PLAIN + ROPE)
    rotary = q[:, :, PLAIN:].contiguous()
    kernels.rope_(rotary, rows.cos, rows.sin, w.interleave)
    latent = kernels.head_linear(q[:, :, :PLAIN], w.key_up)
    o = kernels.mla_attention(latent, rotary, cache, rows.block_tables, rows.row_sequence, rows.positions, w.scale)
    values = kernels.head_linear(o, w.value_up)
    if rows.expanded_until is not None:
        assert w.key_expand is not None
        q = torch.cat((q[:, :, :PLAIN], rotary), 2)
        both = w.key_expand, w.value_up
        expanded = kernels.expanded_attention(
            q, both, cache, rows.block_tables, rows.row_sequence, rows.positions, w.scale
        )
        is_prompt = rows.positions < rows.expanded_until[rows.row_sequence.long()]
        values = torch.where(is_prompt[:, None, None], expanded, values)
    columns = values.flatten(1).split([part.num_in for part in w.output], 1)
    return [kernels.linear(x.contiguous(), part) for x, part in zip(columns, w.output, strict=True)]


# How far the prompts of batch() reach: none, no row, some rows of the first, of the second, of both, all rows.
UNTIL = [None, (0, 0), (50, 0), (0, 17), (45, 30), (99, 99)]


@needs_native
@pytest.mark.parametrize("until", UNTIL, ids=str)
def test_each_row_takes_the_form_of_its_role(until: tuple[int, int] | None) -> None:
    weights, rows = layer(), batch(until=until)
    x, cache = normal(70, HIDDEN), normal(10, 32, LATENT + ROPE, seed=8)
    projected = kernels.mla_project(x, weights, rows, 0)
    got = kernels.mla_attend(projected, weights, rows, cache.clone())
    want = composed_attend(projected, weights, rows.rows, cache)
    assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True))


@needs_native
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_both_calls_equal_the_single_operations(compressed: bool, with_bias: bool, dtype: torch.dtype) -> None:
    weights, rows = layer(dtype, compressed=compressed, biased=with_bias), batch()
    x, cache = normal(70, HIDDEN), normal(10, 32, LATENT + ROPE, seed=8)
    projected = kernels.mla_project(x, weights, rows, 0)
    assert torch.equal(projected, composed_project(x, weights, rows.rows, 0))
    assert torch.equal(kernels.mla_project(x[9:30], weights, rows, 9), projected[9:30])
    mine, theirs = cache.clone(), cache.clone()
    got = kernels.mla_attend(projected, weights, rows, mine)
    want = composed_attend(projected, weights, rows.rows, theirs)
    assert torch.equal(mine, theirs)
    assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True))


def test_one_call_is_both_to_the_bit() -> None:
    weights = layer(biased=True)
    fields = {name: getattr(weights, name) for name in FIELDS}
    whole = kernels.MlaWeights(**fields | {"output": (packed(HIDDEN, HEADS * VALUE, torch.bfloat16, num_shards=4),)})
    x, rows, cache = normal(70, HIDDEN), batch(), normal(10, 32, LATENT + ROPE, seed=8)
    (want,) = kernels.mla_attend(kernels.mla_project(x, whole, rows, 0), whole, rows, cache.clone())
    if kernels.native_available():
        assert torch.equal(kernels.mla(x, whole, rows, cache), want)
    else:
        torch.testing.assert_close(kernels.mla(x, whole, rows, cache), want)


@pytest.mark.parametrize("until", [None, (45, 30)])
@pytest.mark.parametrize("compressed", [True, False])
def test_both_calls_agree_with_torch(compressed: bool, until: tuple[int, int] | None) -> None:
    weights, rows = layer(compressed=compressed, biased=True), batch(until=until)
    x, cache = normal(70, HIDDEN), normal(10, 32, LATENT + ROPE, seed=8)
    projected = kernels.mla_project(x, weights, rows, 0)
    assert relative_error(projected, reference.mla_project(x, weights, rows, 0)) < 3e-6
    got = kernels.mla_attend(projected, weights, rows, cache.clone())
    for left, right in zip(got, reference.mla_attend(projected, weights, rows, cache), strict=True):
        assert relative_error(left, right) < 1e-5


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    weights, rows, cache = layer(), batch(), normal(10, 32, LATENT + ROPE)
    with pytest.raises(ValueError, match="outside their batch"):
        kernels.mla_project(normal(3, HIDDEN), weights, rows, 68)
    projected = kernels.mla_project(normal(70, HIDDEN), weights, rows, 0)
    with pytest.raises(ValueError, match="outside the cache"):
        kernels.mla_attend(projected, weights, rows, cache[:1])
    with pytest.raises(ValueError, match=r"rows has shape \(69, "):
        kernels.mla_attend(projected[:69], weights, rows, cache)
    fields = {name: getattr(weights, name) for name in FIELDS}
    with pytest.raises(ValueError, match=r"query_up.num_in is 44, must be 45"):
        kernels.MlaWeights(**fields | {"query_up": packed(HEADS * (PLAIN + ROPE), 44, torch.float32)})
    without = kernels.MlaWeights(**fields | {"key_expand": None})
    with pytest.raises(ValueError, match="no key_expand"):
        kernels.mla_attend(projected, without, batch(until=(0, 0)), cache)
    with pytest.raises(ValueError, match=r"key_expand is \(4, 61, 24\), must be \(4, 24, 61\)"):
        kernels.MlaWeights(**fields | {"key_expand": fields["key_up"]})
    with pytest.raises(ValueError, match="without query_norm"):
        kernels.MlaWeights(**fields | {"query_norm": None})
