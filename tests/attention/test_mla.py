"""Absorbed attention against the plain form, and its independence of tensor-parallel degree and chunks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from attention.latent_cache import LatentCache
from attention.rope import RotaryTable
from kernels import AttentionBatch, Span, lay_out
from mesh_config import load_model_config, make_mesh
from moemesh.checkpoint import Checkpoint
from moemesh.mesh_plan import placement_of
from moemesh.model import AttentionModel
from moemesh.model_loader import ModelLoader
from tests.oracle import oracle_model, write_random_checkpoint
from transport.shards import maximal_subtrees, owned_shards, tree_sum

CPU = torch.device("cpu")
LENGTH = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("models") / "model", 11, num_attention_heads=8, v_head_dim=24
    )


def _model(folder: Path, rank: int = 0, tp: int = 1) -> AttentionModel:
    config = load_model_config(folder)
    mesh = make_mesh(config, num_ranks=tp, attention_tp=tp)
    loader = ModelLoader(
        Checkpoint(folder, config),
        mesh=mesh,
        placement=placement_of(config, mesh),
        rank=rank,
        device=CPU,
        weight_dtype=None,
        quantization=None,
        report=lambda done, total: None,
    )
    model = loader.load().attention
    assert model is not None
    return model


def _batch(rotary: RotaryTable, start: int, stop: int, blocks: list[int]) -> AttentionBatch:
    return lay_out([Span(start, stop - start, blocks)], rotary.angles)


def _cache(model: AttentionModel) -> LatentCache:
    config = model.config
    cache = LatentCache(num_layers=config.num_layers, num_blocks=8, width=config.latent_width, device=CPU)
    cache.layer(0).fill_(math.nan)  # what was never written must never be read
    return cache


def _attend(model: AttentionModel, x_TH: torch.Tensor, chunks: list[int], blocks: list[int]) -> list[torch.Tensor]:
    """Partial outputs of the owned subtrees, over all rows, computed chunk by chunk."""
    attention, cache = model.layers[0].attention, _cache(model)
    parts: list[list[torch.Tensor]] = []
    for start, stop in zip([0, *chunks], [*chunks, len(x_TH)], strict=True):
        batch = _batch(model.rotary, start, stop, blocks)
        rows = attention.project(x_TH[start:stop], batch, 0)
        parts.append(attention.attend(rows, batch, cache, 0))
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def x_TH(folder: Path) -> torch.Tensor:
    hidden = load_model_config(folder).hidden_size
    return torch.randn(LENGTH, hidden, generator=torch.Generator().manual_seed(5))


def test_it_equals_the_oracles_layer(folder: Path, x_TH: torch.Tensor) -> None:
    oracle = oracle_model(folder)
    layer = oracle.model.layers[0].self_attn
    positions = torch.arange(LENGTH).unsqueeze(0)
    angles = oracle.model.rotary_emb(x_TH.unsqueeze(0), positions)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = layer(hidden_states=x_TH.unsqueeze(0), position_embeddings=angles, attention_mask=mask)
    (ours,) = _attend(_model(folder), x_TH, [], [3, 0, 6])
    torch.testing.assert_close(ours, expected[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("chunks", [[1], [31], [32], [40], [1, 2, 3, 33, 65]])
def test_chunks_and_blocks_do_not_change_a_bit(folder: Path, x_TH: torch.Tensor, chunks: list[int]) -> None:
    model = _model(folder)
    (whole,) = _attend(model, x_TH, [], [0, 1, 2])
    (chunked,) = _attend(model, x_TH, chunks, [7, 2, 5])
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_tensor_parallelism_does_not_change_a_bit(folder: Path, x_TH: torch.Tensor, tp: int) -> None:
    shards = load_model_config(folder).num_logical_shards
    (whole,) = _attend(_model(folder), x_TH, [], [0, 1, 2])
    partials = {}
    for rank in range(tp):
        subtrees = maximal_subtrees(*owned_shards(shards, tp, rank), shards)
        partials |= dict(zip(subtrees, _attend(_model(folder, rank, tp), x_TH, [], [0, 1, 2]), strict=True))
    assert torch.equal(whole, tree_sum(partials, shards))
