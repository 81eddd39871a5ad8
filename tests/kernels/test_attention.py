"""Latent attention, in both forms, against a plain softmax in double; independence of what a row must not see."""

import math

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import needs_native, normal, relative_error, seeded

SHAPES = [(512, 64), (24, 8), (7, 2), (64, 61)]
ROW_SEQ = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 0], dtype=torch.int32)
POSITIONS = torch.tensor([5, 70, 31, 32, 127, 0, 1, 2, 3, 64], dtype=torch.int32)
TABLES = torch.tensor([[3, 1, 4, 11], [5, 9, 2, 6], [8, 7, 10, 0]], dtype=torch.int32)


def plain(
    latent: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, scale: float
) -> torch.Tensor:
    """One row at a time, one softmax, in double."""
    rows = []
    for t, (seq, position) in enumerate(zip(ROW_SEQ.tolist(), POSITIONS.tolist(), strict=True)):
        keys = cache[tables[seq].long()].flatten(0, 1)[: position + 1].double()
        query = torch.cat((latent[t], rope[t]), -1).double()
        rows.append(((query @ keys.T) * scale).softmax(-1) @ keys[:, : latent.shape[2]])
    return torch.stack(rows)


@pytest.mark.parametrize(("latent_width", "rope_width"), SHAPES)
@pytest.mark.parametrize("num_heads", [1, 6, 70])
def test_attention_agrees_with_plain_softmax(latent_width: int, rope_width: int, num_heads: int) -> None:
    cache = normal(12, 32, latent_width + rope_width)
    query = normal(len(ROW_SEQ), num_heads, latent_width + rope_width, seed=1)
    latent, rope = query[..., :latent_width], query[..., latent_width:]  # views
    scale = 3 / math.sqrt(latent_width + rope_width)
    want = plain(latent, rope, cache, TABLES, scale)
    for attention in (kernels.mla_attention, reference.mla_attention):
        got = attention(latent, rope, cache, TABLES, ROW_SEQ, POSITIONS, scale)
        assert relative_error(got, want) < 3e-6


# heads, latent, rotary, plain part of a key, value
EXPANDED = [(1, 512, 64, 128, 128), (3, 24, 8, 16, 20), (2, 7, 2, 33, 1), (4, 64, 61, 24, 70)]
Heads = tuple[kernels.PackedHeads, kernels.PackedHeads]


def up_projections(heads: int, latent: int, key: int, value: int) -> Heads:
    matrices = [(normal(heads, width, latent, seed=seed) / latent**0.5) for seed, width in ((5, key), (6, value))]
    return kernels.pack_heads(matrices[0].bfloat16()), kernels.pack_heads(matrices[1].bfloat16())


@pytest.mark.parametrize("shape", EXPANDED)
def test_the_expanded_form_agrees_with_plain_softmax(shape: tuple[int, ...]) -> None:
    heads, latent, rope, key, value = shape
    cache, weights = normal(12, 32, latent + rope), up_projections(heads, latent, key, value)
    query = normal(len(ROW_SEQ), heads, key + rope, seed=1)
    scale = 3 / math.sqrt(key + rope)
    absorbed = torch.einsum("tnk,nkc->tnc", query[..., :key].double(), weights[0].dense().double())
    attended = plain(absorbed, query[..., key:].double(), cache, TABLES, scale)
    want = torch.einsum("tnc,nvc->tnv", attended, weights[1].dense().double())
    for attention in (kernels.expanded_attention, reference.expanded_attention):
        got = attention(query, weights, cache, TABLES, ROW_SEQ, POSITIONS, scale)
        assert relative_error(got, want) < 5e-6


@needs_native
@pytest.mark.parametrize(("latent_width", "rope_width"), SHAPES)
def test_a_row_sees_nothing_beyond_its_position_nor_where_blocks_lie(latent_width: int, rope_width: int) -> None:
    width = latent_width + rope_width
    cache, query = normal(12, 32, width), normal(len(ROW_SEQ), 5, width, seed=1)
    latent, rope = query[..., :latent_width].contiguous(), query[..., latent_width:].contiguous()
    want = kernels.mla_attention(latent, rope, cache, TABLES, ROW_SEQ, POSITIONS, 0.1)
    for seq in range(3):
        last = int(POSITIONS[ROW_SEQ.eq(seq)].max())
        moved = torch.full((9, 32, width), math.nan)
        blocks = torch.tensor([6, 2, 8, 4], dtype=torch.int32)
        old = cache[TABLES[seq].long()].flatten(0, 1)
        old[last + 1 :] = math.nan
        moved[blocks.long()] = old.view(4, 32, width)
        table = blocks.clone()
        table[last // 32 + 1 :] = -1  # never looked at
        rows = ROW_SEQ.eq(seq).nonzero()[:, 0]
        row_seq = torch.zeros(len(rows), dtype=torch.int32)
        got = kernels.mla_attention(
            latent[rows], rope[rows], moved, table[None].contiguous(), row_seq, POSITIONS[rows], 0.1
        )
        assert torch.equal(got, want[rows])


@needs_native
@pytest.mark.parametrize("chunk", [1, 3, 32, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_of_a_prompt_give_the_bits_of_the_whole(chunk: int, threads: int) -> None:
    length, heads = 301, 9
    cache, table = normal(10, 32, 40), torch.randperm(10, generator=seeded()).int()[None]
    latent, rope = normal(length, heads, 32, seed=1), normal(length, heads, 8, seed=2)
    positions, row_seq = torch.arange(length, dtype=torch.int32), torch.zeros(length, dtype=torch.int32)
    want = kernels.mla_attention(latent, rope, cache, table, row_seq, positions, 0.2)
    kernels.set_num_threads(threads)
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        got = kernels.mla_attention(latent[part], rope[part], cache, table, row_seq[part], positions[part], 0.2)
        assert torch.equal(got, want[part])


@needs_native
@pytest.mark.parametrize("heads", [1, 9, 70])
@pytest.mark.parametrize("latent_width", [32, 61])
def test_threads_that_share_a_long_context_leave_no_trace(heads: int, latent_width: int) -> None:
    """Rows of several sequences, alone and together: by 1 thread each, by 2 and 5 in pieces of the context or heads."""
    cache, tables = normal(100, 32, latent_width + 8), torch.randperm(100, generator=seeded()).int().view(2, 50)
    positions = torch.tensor([1500, 255, 256, 1023, 7, 1599, 300], dtype=torch.int32)
    row_seq = torch.tensor([0, 0, 0, 0, 1, 1, 1], dtype=torch.int32)
    latent, rope = normal(7, heads, latent_width, seed=1), normal(7, heads, 8, seed=2)
    results = []
    for threads in (1, 2, 5):
        kernels.set_num_threads(threads)
        parts = [slice(0, 7)] if threads == 1 else [slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 7)]
        results.append(
            torch.cat(
                [kernels.mla_attention(latent[p], rope[p], cache, tables, row_seq[p], positions[p], 0.2) for p in parts]
            )
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    want = reference.mla_attention(latent.double(), rope.double(), cache.double(), tables, row_seq, positions, 0.2)
    assert relative_error(results[0], want) < 3e-6


@needs_native
@pytest.mark.parametrize("chunk", [1, 5, 32, 33, 128, 150])
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_in_the_expanded_form_give_the_bits_of_the_whole(chunk: int, threads: int) -> None:
    length, heads = 301, 3
    table = torch.randperm(10, generator=seeded()).int()[None]
    query, weights = normal(length, heads, 24, seed=1), up_projections(heads, 40, 16, 20)
    positions, row_seq = torch.arange(length, dtype=torch.int32), torch.zeros(length, dtype=torch.int32)
    written = normal(10, 32, 48)
    kernels.set_num_threads(threads)
    want = kernels.expanded_attention(query, weights, written, table, row_seq, positions, 0.2)
    cache = torch.full_like(written, math.nan)  # of what comes later nothing may be seen
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        slots = table[0, positions[part] // 32].long() * 32 + positions[part] % 32
        cache.view(-1, 48)[slots] = written.view(-1, 48)[slots]
        got = kernels.expanded_attention(query[part], weights, cache, table, row_seq[part], positions[part], 0.2)
        assert torch.equal(got, want[part])


@needs_native
def test_in_the_expanded_form_a_later_position_changes_nothing() -> None:
    table, positions = torch.arange(4, dtype=torch.int32)[None], torch.arange(128, dtype=torch.int32)
    query, weights, row_seq = normal(128, 2, 24, seed=1), up_projections(2, 40, 16, 20), torch.zeros_like(positions)
    cache = normal(4, 32, 48)
    want = kernels.expanded_attention(query, weights, cache, table, row_seq, positions, 0.2)
    cache.view(-1, 48)[77] = math.inf
    got = kernels.expanded_attention(query, weights, cache, table, row_seq, positions, 0.2)
    assert torch.equal(got[:77], want[:77])
    assert not torch.isfinite(got[77:]).any()


@needs_native
def test_indices_out_of_range_are_refused() -> None:
    cache, latent, rope = normal(2, 32, 6), normal(1, 1, 4), normal(1, 1, 2)
    table, zero = torch.tensor([[1, 2]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="block outside the cache"):
        kernels.mla_attention(latent, rope, cache, table, zero, zero + 40, 1.0)
    with pytest.raises(ValueError, match="outside its block table"):
        kernels.mla_attention(latent, rope, cache, table, zero, zero + 64, 1.0)
    with pytest.raises(ValueError, match="without a block table"):
        kernels.mla_attention(latent, rope, cache, table, zero + 1, zero, 1.0)
    weights = up_projections(1, 4, 3, 5)
    with pytest.raises(ValueError, match="block outside the cache"):
        kernels.expanded_attention(normal(1, 1, 5), weights, cache, table, zero, zero + 40, 1.0)
    with pytest.raises(ValueError, match="do not fit queries"):
        kernels.expanded_attention(normal(1, 2, 5), weights, cache, table, zero, zero, 1.0)
