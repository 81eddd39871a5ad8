"""Bit-identical results whatever the shape of the mesh, the batch, the chunks or the order in which frames arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh, Result

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=6, logprobs=2, prompt_logprobs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 heads, hence 16 logical shards; 10 experts, which few numbers of ranks divide."""
    return write_random_checkpoint(
        tmp_path_factory.mktemp("models") / "model",
        3,
        num_attention_heads=16,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=10,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=3,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 5, 33, 40, 64, 70)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


def facts(results: list[Result]) -> list[tuple[Any, ...]]:
    return [(r.tokens, r.logprobs, r.prompt_logprobs, r.finish_reason, r.error) for r in results]


@pytest.fixture(scope="module")
def alone(folder: Path, prompts: list[list[int]]) -> dict[str, list[tuple[Any, ...]]]:
    """Each request by itself, on one rank."""
    mesh = LocalMesh(folder)
    return {
        "greedy": facts([mesh.generate([prompt], GREEDY)[0] for prompt in prompts]),
        "drawn": facts([mesh.generate([prompt], DRAWN)[0] for prompt in prompts]),
    }


SHAPES: list[dict[str, Any]] = [
    {"num_ranks": 1},
    {"num_ranks": 2, "attention_tp": 1},
    {"num_ranks": 2, "attention_tp": 2},
    {"num_ranks": 4, "attention_tp": 1},
    {"num_ranks": 4, "attention_tp": 2},
    {"num_ranks": 4, "attention_tp": 4},
    {"num_ranks": 4, "attention_tp": 4, "credit_window": 1},
    {"num_ranks": 16, "attention_tp": 16},
    {"num_ranks": 16, "attention_tp": 4},
    {"num_ranks": 3, "attention_ranks": 1},
    {"num_ranks": 5, "attention_ranks": 2, "attention_tp": 2},
    {"num_ranks": 4, "attention_tp": 2, "micro_batches": 2},
    {"num_ranks": 4, "attention_tp": 2, "expert_hold": "on"},
    {"num_ranks": 4, "attention_tp": 2, "redundant_experts": 7},
    {"num_ranks": 2, "attention_tp": 2, "max_num_batched_tokens": 7},
    {"num_ranks": 1, "max_num_batched_tokens": 1},
    {"num_ranks": 1, "max_num_seqs": 2},
    {"num_ranks": 2, "attention_tp": 1, "num_cache_blocks": 4},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_every_mesh_gives_the_same_bits(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[tuple[Any, ...]]], shape: dict[str, Any]
) -> None:
    mesh = LocalMesh(folder, seed=5, **shape)
    assert facts(mesh.generate(prompts, GREEDY)) == alone["greedy"]
    assert facts(mesh.generate(prompts, DRAWN)) == alone["drawn"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, of widths that bf16x3 takes in every matrix, also in the smallest piece of a sum."""
    return write_random_checkpoint(
        tmp_path_factory.mktemp("models") / "model",
        3,
        dtype="bfloat16",
        num_attention_heads=8,
        qk_nope_head_dim=32,
        v_head_dim=32,
        q_lora_rank=64,
        moe_intermediate_size=64,
        intermediate_size=96,
        n_routed_experts=10,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=3,
    )


@pytest.fixture(scope="module")
def pairs_alone(pairs: Path, prompts: list[list[int]]) -> list[tuple[Any, ...]]:
    mesh = LocalMesh(pairs, arithmetic="bf16x3")
    attention = mesh.models[0].attention
    assert attention is not None
    layer = attention.layers[0].attention.weights
    assert all(packed.in_pairs for packed in (layer.query_up, layer.latent_down, layer.key_up, *layer.output))
    return facts([mesh.generate([prompt], GREEDY)[0] for prompt in prompts])


@pytest.mark.parametrize(
    "shape",
    [
        {"num_ranks": 1, "max_num_batched_tokens": 7},
        {"num_ranks": 2, "attention_tp": 1, "micro_batches": 2},
        {"num_ranks": 4, "attention_tp": 4},
        {"num_ranks": 5, "attention_ranks": 2, "attention_tp": 2},
        {"num_ranks": 8, "attention_tp": 8, "max_num_batched_tokens": 50},
    ],
    ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()),
)
def test_every_mesh_gives_the_same_bits_in_bf16x3(
    pairs: Path, prompts: list[list[int]], pairs_alone: list[tuple[Any, ...]], shape: dict[str, Any]
) -> None:
    assert facts(LocalMesh(pairs, seed=5, arithmetic="bf16x3", **shape).generate(prompts, GREEDY)) == pairs_alone


def test_a_mesh_without_tiles_gives_the_same_bits_in_bf16x3(
    pairs: Path, prompts: list[list[int]], pairs_alone: list[tuple[Any, ...]]
) -> None:
    mesh = LocalMesh(pairs, arithmetic="bf16x3")
    kernels.force_isa("generic")
    try:
        assert facts(mesh.generate(prompts, GREEDY)) == pairs_alone
    finally:
        kernels.force_isa(None)


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_arrival_does_not_matter(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[tuple[Any, ...]]], seed: int
) -> None:
    mesh = LocalMesh(folder, seed=seed, num_ranks=4, attention_tp=2, micro_batches=2, max_num_batched_tokens=50)
    assert facts(mesh.generate(prompts, GREEDY)) == alone["greedy"]


def test_a_generated_token_equals_the_same_token_in_a_prompt(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[tuple[Any, ...]]]
) -> None:
    """log-probabilities of generated tokens, and of the same tokens scored as part of a prompt."""
    mesh = LocalMesh(folder)
    for prompt, (tokens, logprobs, *_) in zip(prompts, alone["greedy"], strict=True):
        (result,) = mesh.generate([prompt + tokens], GREEDY)
        assert result.prompt_logprobs is not None
        scored = [entry[:3] for entry in result.prompt_logprobs[len(prompt) :]]
        assert scored == [entry[:3] for entry in logprobs]


def test_compact_combine_is_close(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[tuple[Any, ...]]]
) -> None:
    mesh = LocalMesh(folder, seed=1, num_ranks=4, attention_tp=2, combine="compact")
    for result, expected in zip(mesh.generate(prompts, GREEDY), alone["greedy"], strict=True):
        ours = torch.tensor([entry[1] for entry in (result.prompt_logprobs or [])[1:]])
        theirs = torch.tensor([entry[1] for entry in expected[2][1:]])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
