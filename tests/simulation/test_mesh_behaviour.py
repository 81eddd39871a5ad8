"""What a mesh leaves behind, and what it does not do: frames of an idle group, blocks of finished requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh, Result
from transport.frame import Frame, Header, Kind

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
OWN_WORK = (Kind.DISPATCH, Kind.COLLECTIVE, Kind.PLAN, Kind.SAMPLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 4)


def _prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


def _facts(result: Result) -> tuple[Any, ...]:
    return result.tokens, result.logprobs, result.prompt_logprobs, result.finish_reason, result.error


def _assert_empty(mesh: LocalMesh) -> None:
    mesh.settle()
    for engine, link in zip(mesh.engines, mesh.links, strict=True):
        state = engine.leftovers()
        assert not any(state.values()), f"rank {link.rank} kept {state}"
        assert link.idle()


def test_an_idle_group_sends_no_frame(folder: Path) -> None:
    mesh = LocalMesh(folder, seed=0, num_ranks=4, attention_tp=2)
    busy, idle = mesh.mesh.groups
    mesh.run([mesh.submit(prompt, PARAMS, group=0) for prompt in _prompts(6, 50)])
    mesh.settle()
    for rank in busy:
        assert all(mesh.frames_sent(rank)[kind] > 0 for kind in (Kind.DISPATCH, Kind.COLLECTIVE))
    for rank in idle:
        frames = mesh.frames_sent(rank)
        assert frames[Kind.ANSWER] > 0, "its experts are everybody's"
        assert [frames[kind] for kind in OWN_WORK] == [0, 0, 0, 0]


def test_a_mesh_without_requests_sends_nothing(folder: Path) -> None:
    mesh = LocalMesh(folder, num_ranks=4, attention_tp=2)
    mesh.settle()
    for _ in range(100):
        assert not mesh.turn()
    assert all(sum(mesh.frames_sent(rank).values()) == 0 for rank in range(4))


def test_many_requests_in_a_small_cache_leave_nothing(folder: Path) -> None:
    prompts = _prompts(40, 120)
    mesh = LocalMesh(folder, seed=3, num_ranks=4, attention_tp=2, num_cache_blocks=6, max_num_batched_tokens=64)
    crowded = mesh.generate(prompts, PARAMS)
    assert all(result.finish_reason == "length" for result in crowded)
    single = LocalMesh(folder)
    assert [r.tokens for r in crowded] == [single.generate([prompt], PARAMS)[0].tokens for prompt in prompts]
    assert sum(engine.counters().get("preemptions", 0) for engine in mesh.engines) > 0
    _assert_empty(mesh)


def test_cancelled_requests_leave_nothing(folder: Path) -> None:
    mesh = LocalMesh(folder, seed=4, num_ranks=2, attention_tp=2, num_cache_blocks=64)
    endless = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
    requests = [mesh.submit(prompt, endless) for prompt in _prompts(6, 50)]
    for index, request in enumerate(requests):
        for _ in range(20 * index):
            mesh.turn()
        mesh.cancel(request)
    _assert_empty(mesh)
    assert all(not mesh.results[request].ended for request in requests)


def test_a_request_that_can_never_fit_is_refused_and_the_others_go_on(folder: Path) -> None:
    mesh = LocalMesh(folder, num_cache_blocks=2)
    small, large = mesh.submit([5] * 10, PARAMS), mesh.submit([5] * 100, PARAMS)
    mesh.run()
    assert mesh.results[small].finish_reason == "length"
    assert "2" in (mesh.results[large].error or "")
    _assert_empty(mesh)


def test_a_call_that_is_none_is_dropped_and_counted(folder: Path) -> None:
    """Its caller is none the worse: it would ask again."""
    mesh = LocalMesh(folder, num_ranks=2, attention_tp=2)
    junk = Frame(Header(Kind.DISPATCH, 1, layer=2), (torch.zeros(1, 5),))
    mesh.links[1].post(0, junk)
    mesh.settle()
    assert mesh.engines[0].counters()["frames_refused:malformed"] == 1
    assert mesh.generate([[5, 6, 7]], PARAMS)[0].finish_reason == "length"
    _assert_empty(mesh)


POISON = 9
SHAPES: tuple[dict[str, Any], ...] = (
    {"num_ranks": 1},
    {"num_ranks": 4, "attention_tp": 1},
    {"num_ranks": 2, "attention_tp": 2},
    {"num_ranks": 4, "attention_tp": 4, "combine": "compact"},
)
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.8, "seed": 4, "prompt_logprobs": 1},
)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_that_are_not_finite_end_their_request_only(folder: Path, shape: dict[str, Any], bad: float) -> None:
    """A token whose embedding is not a number: its sequences end with an error, their neighbours are untouched, and
    nobody finds in the cache what they have computed."""
    prompts = [[token for token in prompt if token != POISON] for prompt in _prompts(4, 70)]
    ways = [SamplingParams(max_tokens=8, ignore_eos=True, **way) for way in WAYS]
    poisoned = [*range(20, 60), POISON, *range(60, 120)]
    mesh = LocalMesh(folder, seed=1, max_num_batched_tokens=64, **shape)
    healthy = [mesh.generate([prompt], way)[0] for prompt, way in zip(prompts, ways, strict=True)]
    embeddings = [model.attention.embedding_VH for model in mesh.models if model.attention is not None]
    kept = embeddings[0][POISON].clone()
    for embedding in embeddings:
        embedding[POISON] = bad
    requests = [(mesh.submit(p, w), mesh.submit(poisoned, w)) for p, w in zip(prompts, ways, strict=True)]
    mesh.run()
    for (good, poor), expected in zip(requests, healthy, strict=True):
        assert _facts(mesh.results[good]) == _facts(expected)
        assert "not finite" in (mesh.results[poor].error or "")
        assert not mesh.results[poor].tokens
    assert sum(engine.counters().get("nonfinite_logits", 0) for engine in mesh.engines) == len(requests)
    for embedding in embeddings:
        embedding[POISON] = kept
    (again,) = mesh.generate([poisoned], ways[0])
    assert (again.cached_tokens, again.error) == (0, None)
    _assert_empty(mesh)
