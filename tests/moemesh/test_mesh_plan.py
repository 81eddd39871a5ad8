"""What is decided before anything starts: mesh shape, cache size, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh_config import ConfigError
from moemesh.checkpoint import CheckpointError
from moemesh.mesh_plan import MeshPlan, plan_mesh, threads_per_rank
from moemesh.options import EngineOptions
from tests.oracle import write_random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 1)


def _plan(folder: Path, **options: Any) -> MeshPlan:
    return plan_mesh(EngineOptions(model=str(folder), device="cpu", **options))


def test_the_cache_has_the_size_asked_for(folder: Path) -> None:
    assert _plan(folder, num_gpu_blocks_override=7).mesh.num_cache_blocks == 7
    per_block = 3 * 32 * 48 * 4  # layers, tokens, latent width, float32
    assert _plan(folder, kv_cache_memory_bytes=5 * per_block + 1).mesh.num_cache_blocks == 5
    with pytest.raises(ConfigError, match=str(per_block)):
        _plan(folder, kv_cache_memory_bytes=per_block - 1)


def test_by_default_the_cache_holds_every_sequence_if_memory_allows(folder: Path) -> None:
    assert _plan(folder, max_num_seqs=3, max_model_len=100).mesh.num_cache_blocks == 3 * 4


def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"too little memory: 2 ranks .* GiB .* GiB are available"):
        _plan(folder, ranks=2, kv_cache_memory_bytes=2**50)


def test_a_damaged_checkpoint_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _plan(tmp_path)


def test_a_tensor_parallel_degree_that_does_not_divide_the_heads_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 .*4"):
        _plan(folder, ranks=8, attention_tp=8)


def test_an_fp8_checkpoint_is_not_quantised_again(folder: Path, tmp_path: Path) -> None:
    assert _plan(folder, quantization="int8").mesh.num_ranks == 1
    fp8 = write_random_checkpoint(tmp_path / "fp8", 1, fp8=True, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"--quantization int8: .*fp8 is FP8 already"):
        _plan(fp8, quantization="int8")


def test_ranks_share_the_cores(folder: Path) -> None:
    options = EngineOptions(model=str(folder))
    assert threads_per_rank(options, 1000) == 1
    assert threads_per_rank(EngineOptions(model=str(folder), threads=3), 1000) == 3
