"""`prefill_attention=expanded` is exact in itself: which form a position takes is decided by its role and nothing else.

Only a generated token that is sent back as prompt may give other bits.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh_config import load_model_config
from moemesh.sampling_params import SamplingParams
from tests.oracle import ORACLE_CASES, OracleCase, oracle_logprobs, write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh, Result

EXPANDED = {"prefill_attention": "expanded"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=40, logprobs=2, ignore_eos=True)

Facts = list[tuple[Any, ...]]


def facts(results: list[Result]) -> Facts:
    return [(r.tokens, r.logprobs, r.prompt_logprobs, r.finish_reason, r.error) for r in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("models") / "model", 3, num_attention_heads=16, qk_nope_head_dim=8, v_head_dim=12
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two that begin alike; lengths before, at and behind the ends of blocks of 32 and of the kernel's spans of 128."""
    draw = random.Random(1)
    first, second = (draw.choices(range(2, 320), k=150) for _ in range(2))
    return [first[:1], first[:33], second[:64], first[:128], first[:100] + second[:35], second]


@pytest.fixture(scope="module")
def alone(folder: Path, prompts: list[list[int]]) -> dict[SamplingParams, Facts]:
    """Each request by itself on one rank, with an empty cache."""
    mesh = LocalMesh(folder, prefix_caching=False, **EXPANDED)
    return {params: facts([mesh.generate([p], params)[0] for p in prompts]) for params in (GREEDY, DRAWN)}


SHAPES: list[dict[str, Any]] = [
    {"num_ranks": 1},
    {"num_ranks": 1, "max_num_batched_tokens": 1},
    {"num_ranks": 2, "attention_tp": 2, "max_num_batched_tokens": 7},
    {"num_ranks": 4, "attention_tp": 2, "micro_batches": 2, "max_num_batched_tokens": 50},
    {"num_ranks": 16, "attention_tp": 16},
    {"num_ranks": 3, "attention_ranks": 1},
    {"num_ranks": 2, "attention_tp": 1, "num_cache_blocks": 7, "max_num_batched_tokens": 40},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mesh_gives_the_same_bits(
    folder: Path, prompts: list[list[int]], alone: dict[SamplingParams, Facts], shape: dict[str, Any]
) -> None:
    """Twice the same, so that the second time finds what the first has left in the cache."""
    mesh = LocalMesh(folder, seed=5, **shape, **EXPANDED)
    for params in (GREEDY, DRAWN, DRAWN):
        assert facts(mesh.generate(prompts, params)) == alone[params]


def test_a_preempted_sequence_takes_the_same_forms_again(folder: Path, prompts: list[list[int]]) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=70, logprobs=1, ignore_eos=True)
    both = [prompts[4][:40], prompts[5][:40]]
    expected = [LocalMesh(folder, prefix_caching=False, **EXPANDED).generate([prompt], long)[0] for prompt in both]
    for caching in (False, True):
        mesh = LocalMesh(folder, seed=1, num_cache_blocks=6, prefix_caching=caching, **EXPANDED)
        assert facts(mesh.generate(both, long)) == facts(expected)
        assert mesh.engines[0].counters()["preemptions"] > 0


@pytest.mark.parametrize("known", [1, 17, 39])
@pytest.mark.parametrize("chunk", [3, 512])
def test_a_restarted_request_goes_on_with_the_same_bits(
    folder: Path, prompts: list[list[int]], alone: dict[SamplingParams, Facts], known: int, chunk: int
) -> None:
    """Among others, and beside prompts that are equal to what it has generated so far."""
    mesh = LocalMesh(folder, max_num_batched_tokens=chunk, **EXPANDED)
    restarted = []
    for prompt, (tokens, *_) in zip(prompts, alone[DRAWN], strict=True):
        mesh.submit(prompt + tokens[:known], GREEDY)
        restarted.append(mesh.submit(prompt, DRAWN, generated=tokens[:known]))
    mesh.run()
    for request, (tokens, logprobs, *_) in zip(restarted, alone[DRAWN], strict=True):
        assert mesh.results[request].tokens == tokens[known:]
        assert mesh.results[request].logprobs == logprobs[known:]


def test_a_prompt_does_not_see_whether_the_cache_has_it_as_somebodys_answer(
    folder: Path, prompts: list[list[int]], alone: dict[SamplingParams, Facts]
) -> None:
    mesh = LocalMesh(folder, **EXPANDED)
    mesh.generate(prompts, DRAWN)
    histories = [prompt + tokens for prompt, (tokens, *_) in zip(prompts, alone[DRAWN], strict=True)]
    expected = LocalMesh(folder, prefix_caching=False, **EXPANDED).generate(histories, DRAWN)
    again = mesh.generate(histories, DRAWN)
    assert facts(again) == facts(expected)
    assert [r.cached_tokens for r in again] == [len(prompt) // 32 * 32 for prompt in prompts]


def test_it_is_another_arithmetic(folder: Path, prompts: list[list[int]], alone: dict[SamplingParams, Facts]) -> None:
    absorbed = LocalMesh(folder).generate(prompts[2:], GREEDY)
    for ours, theirs in zip(absorbed, alone[GREEDY][2:], strict=True):
        scored = torch.tensor([[entry[1] for entry in facts[1:]] for facts in (ours.prompt_logprobs or [], theirs[2])])
        assert not torch.equal(scored[0], scored[1])
        torch.testing.assert_close(scored[0], scored[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_logprobs_equal_the_oracles(case: OracleCase, tmp_path: Path) -> None:
    folder = case.write(tmp_path, seed=6)
    prompt = random.Random(3).choices(range(2, load_model_config(folder).vocab_size), k=80)
    (result,) = LocalMesh(folder, max_num_batched_tokens=33, **EXPANDED).generate([prompt], GREEDY)
    token_ids = prompt + result.tokens
    expected = oracle_logprobs(folder, token_ids[:-1])
    scored = [*(result.prompt_logprobs or [])[1:], *result.logprobs]
    ours = torch.tensor([entry[1] for entry in scored])
    theirs = expected[torch.arange(len(scored)), torch.tensor([entry[0] for entry in scored])]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
