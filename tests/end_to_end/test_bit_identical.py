"""The same tokens and the same floats, compared with ==, whatever the shape of the mesh and whoever else is served.

Reference: every request alone on one rank, its prompt computed whole. Every other shape gets all requests at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import SMALL_CACHE, Mesh, running_server
from tests.end_to_end.probes import alone, probes, together
from tests.random_checkpoint import write_random_checkpoint

DEMO_VOCAB = 4096
RANDOM_VOCAB = 320
# 32 requests: prompts of one token, of a block (32), one more, and of several blocks.
LENGTHS = (1, 2, 31, 32, 33, 64, 65, 130, 7, 19, 40, 90, 3, 50, 21, 77) * 2

CHUNKED = ("--max-num-batched-tokens", "16")
TWO_BATCHES = ("--micro-batches", "2")


@pytest.fixture(scope="module")
def demo_expected(demo: Mesh) -> list[list[Any]]:
    return alone(demo, probes(DEMO_VOCAB, LENGTHS))


def test_among_31_others(demo: Mesh, demo_expected: list[list[Any]]) -> None:
    assert together(demo, probes(DEMO_VOCAB, LENGTHS)) == demo_expected


DEMO_SHAPES = {
    "1 rank, chunked, two batches": ("--ranks", "1", *CHUNKED, *TWO_BATCHES),
    "2 ranks": ("--ranks", "2"),
    "2 ranks of the user's mpirun, TP 1": ("--attention-tp", "1"),
    "3 ranks, 1 with attention": ("--ranks", "3", "--attention-ranks", "1", *CHUNKED),
    "4 ranks, TP 1, chunked": ("--ranks", "4", "--attention-tp", "1", *CHUNKED),
    "4 ranks, TP 2, two batches": ("--ranks", "4", "--attention-tp", "2", *TWO_BATCHES),
    "4 ranks, TP 4": ("--ranks", "4", "--attention-tp", "4"),
    "4 ranks, 2 with attention": ("--ranks", "4", "--attention-ranks", "2", *TWO_BATCHES),
}


@pytest.mark.parametrize("shape", DEMO_SHAPES)
def test_demo_model_on(shape: str, demo_expected: list[list[Any]]) -> None:
    users_own = 2 if "mpirun" in shape else 0
    with running_server(*DEMO_SHAPES[shape], *SMALL_CACHE, under_mpirun=users_own) as mesh:
        assert together(mesh, probes(DEMO_VOCAB, LENGTHS)) == demo_expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 heads in 16 logical shards; 10 experts, which no number of ranks here but 2 divides."""
    return write_random_checkpoint(
        tmp_path_factory.mktemp("model"),
        seed=3,
        num_attention_heads=16,
        n_routed_experts=10,
        n_group=5,
        topk_group=3,
        num_experts_per_tok=3,
        eos_token_id=[1, 2],
    )


@pytest.fixture(scope="module")
def random_expected(checkpoint: Path) -> Iterator[list[list[Any]]]:
    with running_server(str(checkpoint), *SMALL_CACHE) as mesh:
        yield alone(mesh, probes(RANDOM_VOCAB, LENGTHS))


RANDOM_SHAPES = {
    "4 ranks, TP 4, chunked": ("--ranks", "4", "--attention-tp", "4", *CHUNKED),
    "5 ranks, 2 with attention, two batches": ("--ranks", "5", "--attention-ranks", "2", *TWO_BATCHES),
    "16 ranks, TP 16": ("--ranks", "16", "--attention-tp", "16"),
}


@pytest.mark.parametrize("shape", RANDOM_SHAPES)
def test_random_model_on(shape: str, checkpoint: Path, random_expected: list[list[Any]]) -> None:
    with running_server(str(checkpoint), *RANDOM_SHAPES[shape], *SMALL_CACHE) as mesh:
        assert together(mesh, probes(RANDOM_VOCAB, LENGTHS)) == random_expected


def test_the_other_arithmetic(demo: Mesh) -> None:
    """Other than the one that this machine takes by itself."""
    taken = demo.get("/mesh").body["arithmetic"]
    other = ("--arithmetic", "float32" if taken == "bf16x3" else "bf16x3", *SMALL_CACHE)
    requests = probes(DEMO_VOCAB, LENGTHS)
    with running_server(*other) as mesh:
        assert mesh.get("/mesh").body["arithmetic"] != taken
        expected = alone(mesh, requests)
    with running_server(*other, "--ranks", "4", "--attention-tp", "2", *CHUNKED) as mesh:
        assert together(mesh, requests) == expected


def test_prompts_in_the_expanded_form() -> None:
    expanded = ("--prefill-attention", "expanded", *SMALL_CACHE)
    requests = probes(DEMO_VOCAB, LENGTHS)
    with running_server(*expanded) as mesh:
        expected = alone(mesh, requests)
    with running_server(*expanded, "--ranks", "4", "--attention-tp", "2", *CHUNKED) as mesh:
        for _ in range(2):  # the second time with what the first has cached
            assert together(mesh, requests) == expected


def test_generated_tokens_sent_back_as_prompt(demo: Mesh) -> None:
    for request in probes(DEMO_VOCAB, (5, 40), new_tokens=(40, 40), echo=True, ignore_eos=True):
        generated = demo.complete(**request)["choices"][0]
        text = [*request["prompt"], *generated["token_ids"]]
        scored = demo.complete(**request | {"prompt": text, "max_tokens": 0})["choices"][0]
        assert scored["logprobs"]["token_logprobs"] == generated["logprobs"]["token_logprobs"]
        assert scored["logprobs"]["top_logprobs"] == generated["logprobs"]["top_logprobs"]
