"""Other heads for a rank whose group has other members."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh_config import ModelConfig, load_model_config, make_mesh
from moemesh.checkpoint import Checkpoint
from moemesh.checksums import Checksums
from moemesh.heads import HeadLoader, Heads, HeadsMissing, Layers
from moemesh.mesh_plan import placement_of
from moemesh.model_loader import ModelLoader
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import Inline


class Later(Inline):
    """Does nothing before it is told to."""

    def __init__(self) -> None:
        self.orders: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.orders.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", 3)


def load(folder: Path, rank: int, tp: int, checksums: Checksums) -> tuple[ModelConfig, ModelLoader, Checkpoint, Layers]:
    config = load_model_config(folder)
    mesh = make_mesh(config, num_ranks=tp, attention_tp=tp, num_cache_blocks=4)
    checkpoint = Checkpoint(folder, config, checksums)
    loader = ModelLoader(
        checkpoint,
        mesh=mesh,
        placement=placement_of(config, mesh),
        rank=rank,
        device=torch.device("cpu"),
        weight_dtype=None,
        quantization=None,
        report=lambda done, total: None,
    )
    model = loader.load().attention
    assert model is not None
    return config, loader, checkpoint, [layer.attention for layer in model.layers]


def test_all_heads_are_those_of_a_rank_that_has_them_from_the_start(folder: Path) -> None:
    config, loader, checkpoint, layers = load(folder, 1, 2, Checksums())
    expected = load(folder, 0, 1, Checksums())[3]
    half = config.num_logical_shards // 2
    heads = Heads(layers, (half, 2 * half), HeadLoader(loader.mla, checkpoint), Inline())
    assert heads.ready()
    assert heads.layers() is layers
    heads.want((0, 2 * half))
    for ours, theirs, before in zip(heads.layers(), expected, layers, strict=True):
        assert torch.equal(ours.weights.query_up.dense(), theirs.weights.query_up.dense())
        assert torch.equal(ours.weights.key_up.dense(), theirs.weights.key_up.dense())
        assert torch.equal(ours.weights.value_up.dense(), theirs.weights.value_up.dense())
        assert torch.equal(ours.weights.output[0].dense(), theirs.weights.output[0].dense())
        assert ours.weights.latent_down is before.weights.latent_down, "what is whole is there once"
    heads.want((half, 2 * half))
    assert heads.layers() is layers, "those of the start stay"


def test_they_are_waited_for_and_the_last_wish_counts(folder: Path) -> None:
    config, loader, checkpoint, layers = load(folder, 0, 2, Checksums())
    shards, later = config.num_logical_shards, Later()
    heads = Heads(layers, (0, shards // 2), HeadLoader(loader.mla, checkpoint), later)
    heads.want((0, shards))
    assert not heads.ready()
    heads.want((0, shards // 2))
    assert heads.ready()
    heads.want((0, shards - 1))
    later.orders[0]()
    assert not heads.ready()
    later.orders[1]()
    assert heads.layers()[0].weights.num_heads == (shards - 1) * config.num_heads // shards


def test_they_are_had_from_files_that_were_deleted(folder: Path) -> None:
    config, loader, checkpoint, layers = load(folder, 0, 2, Checksums())
    shards = config.num_logical_shards
    heads = Heads(layers, (0, shards // 2), HeadLoader(loader.mla, checkpoint), Inline())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    heads.want((0, shards))
    assert len(heads.layers()) == config.num_layers


def test_without_memory_there_are_none(folder: Path) -> None:
    config, loader, checkpoint, layers = load(folder, 0, 2, Checksums())
    free = [0]
    head_loader = HeadLoader(loader.mla, checkpoint, free_memory=lambda: free[0])
    heads = Heads(layers, (0, config.num_logical_shards // 2), head_loader, Inline())
    heads.want((0, config.num_logical_shards))
    with pytest.raises(HeadsMissing, match=r"heads of layer 0 need .* and 0.00 KiB are free"):
        heads.layers()
    free[0] = 1 << 40
    heads.want((0, config.num_logical_shards))
    assert heads.layers()


@pytest.mark.parametrize("name", ["q_b_proj", "kv_b_proj", "o_proj"])
def test_a_changed_file_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """Each rank has read its share of the rows, and left checksums of them shard by shard."""
    paths = []
    for rank in (0, 1):
        checksums = Checksums()
        _, loader, checkpoint, layers = load(folder, rank, 2, checksums)
        paths.append(tmp_path / str(rank))
        checksums.save(paths[-1])
    shards = checkpoint.config.num_logical_shards
    head_loader = HeadLoader(loader.mla, checkpoint, prepare=lambda: checksums.learn(paths))
    heads = Heads(layers, (shards // 2, shards), head_loader, Inline())
    heads.want((0, shards))
    heads.layers()
    heads.want((1, shards))
    info = checkpoint.tensors[f"model.layers.1.self_attn.{name}.weight"]
    with info.path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        json.loads(file.read(size))
        place = 8 + size + info.begin + info.nbytes // shards + 1
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    heads.want((0, shards))
    with pytest.raises(HeadsMissing, match=f"layers.1.self_attn.{name}.weight is not what the mesh has loaded"):
        heads.layers()
