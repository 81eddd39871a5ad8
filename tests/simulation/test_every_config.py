"""Every config of the oracle on every kind of mesh, compared with ==: for all that a config can say, what
test_exactness.py shows for one model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mesh_config import ModelConfig, load_model_config
from mesh_config.model_shape import Quantization
from moemesh.sampling_params import SamplingParams
from tests.oracle import ORACLE_CASES, ORACLE_CONFIGS, OracleCase
from tests.simulation.local_mesh import LocalMesh, Result

LENGTHS = (1, 2, 33, 40, 17, 64, 9)
SMALL_CACHE = 6  # blocks: sequences wait for each other


def _requests(config: ModelConfig) -> list[tuple[list[int], SamplingParams]]:
    draw = random.Random(1)
    return [
        (
            draw.choices(range(2, config.vocab_size), k=length),
            SamplingParams(
                max_tokens=6,
                temperature=0.0 if length % 2 else 0.9,
                seed=length,
                ignore_eos=True,
                logprobs=3,
                prompt_logprobs=2,
            ),
        )
        for length in LENGTHS
    ]


def _shapes(config: ModelConfig) -> list[dict[str, Any]]:
    shapes: list[dict[str, Any]] = [
        {"num_ranks": 2},
        {"num_ranks": 4, "attention_tp": 1, "max_num_batched_tokens": 16},
        {"num_ranks": 3, "attention_ranks": 2, "micro_batches": 2},
    ]
    shards = min(4, config.num_logical_shards)
    if shards > 1:
        shapes.append({"num_ranks": shards, "attention_tp": shards, "micro_batches": 2, "max_num_batched_tokens": 24})
    if config.moe_layers:  # one expert for a rank, or none
        shapes.append({"num_ranks": config.num_experts + 2, "attention_ranks": 1})
    return shapes


def _run(mesh: LocalMesh, requests: list[tuple[list[int], SamplingParams]]) -> list[Result]:
    groups = len(mesh.mesh.groups)
    return mesh.run([mesh.submit(prompt, params, group=i % groups) for i, (prompt, params) in enumerate(requests)])


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_every_shape_gives_the_same(case: OracleCase, tmp_path: Path) -> None:
    _check_shapes(case, tmp_path)


@pytest.mark.parametrize("name", ["v3_awkward_sizes", "v3_halves_rotated_tied", "v3_float16", "v2_lite_like"])
def test_every_shape_gives_the_same_in_int8(name: str, tmp_path: Path) -> None:
    _check_shapes(ORACLE_CONFIGS[name], tmp_path, quantization="int8")


@pytest.mark.parametrize(("name", "quantization"), [("v3_fp8", None), ("v3_awkward_sizes", "int8")])
def test_every_shape_gives_the_same_with_expanded_prompts(
    name: str, quantization: Quantization | None, tmp_path: Path
) -> None:
    """Weights of heads with block scales, in both directions that the expanded form takes them."""
    _check_shapes(ORACLE_CONFIGS[name], tmp_path, quantization=quantization, prefill_attention="expanded")


def _check_shapes(case: OracleCase, tmp_path: Path, **fields: Any) -> None:
    folder = case.write(tmp_path, seed=2)
    requests = _requests(load_model_config(folder))
    expected = _run(LocalMesh(folder, **fields), requests)
    for seed, shape in enumerate(_shapes(load_model_config(folder)), start=1):
        mesh = LocalMesh(folder, seed=seed, num_cache_blocks=SMALL_CACHE, **fields, **shape)
        assert _run(mesh, requests) == expected, shape
