"""The prefix cache changes how much is computed, and not one bit of what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh, Result

BLOCK = 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=6, logprobs=2, ignore_eos=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 5)


def text(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 320, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two families that begin alike, with ends before, at and behind a block's end, and one prompt alone."""
    first, second = text(1, 140), text(2, 70)
    return [first[:100], first[:64] + second[:20], first[:96], first, second, second[:65], second[:32], text(3, 40)]


def facts(results: list[Result]) -> list[tuple[Any, ...]]:
    return [(r.tokens, r.logprobs, r.prompt_logprobs, r.finish_reason, r.error) for r in results]


@pytest.fixture(scope="module")
def uncached(folder: Path, prompts: list[list[int]]) -> dict[SamplingParams, list[tuple[Any, ...]]]:
    """Each prompt computed from its first token on."""
    mesh = LocalMesh(folder, prefix_caching=False)
    found = {params: [mesh.generate([p], params)[0] for p in prompts] for params in (GREEDY, DRAWN, SCORED)}
    assert not any(result.cached_tokens for results in found.values() for result in results)
    return {params: facts(results) for params, results in found.items()}


def counted(mesh: LocalMesh, name: str) -> float:
    return sum(engine.counters().get(name, 0) for engine in mesh.engines)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_cached_beginning_gives_the_same_bits(
    folder: Path, prompts: list[list[int]], uncached: dict[SamplingParams, list[tuple[Any, ...]]], tp: int
) -> None:
    mesh = LocalMesh(folder, seed=tp, num_ranks=tp, attention_tp=tp)
    for params in (GREEDY, DRAWN, SCORED, GREEDY):
        assert facts([mesh.generate([prompt], params)[0] for prompt in prompts]) == uncached[params]
    again = mesh.generate(prompts, DRAWN)
    assert facts(again) == uncached[DRAWN]
    assert [r.cached_tokens for r in again] == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]
    mesh.settle()
    assert all(not any(engine.leftovers().values()) for engine in mesh.engines)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [{"num_ranks": 2, "attention_tp": 2}, {"num_ranks": 4, "attention_tp": 2}], ids=str)
def test_eviction_and_preemption_change_nothing(
    folder: Path,
    prompts: list[list[int]],
    uncached: dict[SamplingParams, list[tuple[Any, ...]]],
    shape: dict[str, Any],
    seed: int,
) -> None:
    """A cache of 7 blocks for prompts of up to 5, computed at most 48 tokens at a time, all of them at once."""
    mesh = LocalMesh(folder, seed=seed, num_cache_blocks=7, max_num_batched_tokens=48, **shape)
    groups = len(mesh.mesh.groups)
    wanted: list[tuple[Any, ...]] = []
    for round_number, params in enumerate((GREEDY, DRAWN, GREEDY)):
        for index, prompt in enumerate(prompts):
            mesh.submit(prompt, params, group=(index + round_number) % groups)
        wanted += uncached[params]
    assert facts(mesh.run()) == wanted
    assert counted(mesh, "prefix_cache_hits") > 0
    mesh.settle()
    assert all(not any(engine.leftovers().values()) for engine in mesh.engines)


def test_a_preempted_sequence_goes_on_from_its_cached_blocks(folder: Path) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=70, logprobs=1, ignore_eos=True)
    both = [text(8, 40), text(9, 40)]
    expected = [LocalMesh(folder, prefix_caching=False).generate([prompt], long)[0] for prompt in both]
    mesh = LocalMesh(folder, seed=1, num_ranks=2, attention_tp=2, num_cache_blocks=6)
    first = mesh.submit(both[0], long)
    while not mesh.results[first].tokens:
        mesh.turn()
    mesh.submit(both[1], long)
    assert facts(mesh.run()) == facts(expected)
    assert counted(mesh, "preemptions") > 0
    assert [result.cached_tokens for result in mesh.results.values()] == [0, 0]


def test_the_next_turn_of_a_chat_is_computed_from_the_end_of_the_last_answer_on(folder: Path) -> None:
    mesh, fresh = LocalMesh(folder, num_ranks=2, attention_tp=2), LocalMesh(folder, prefix_caching=False)
    turn = SamplingParams(temperature=0.0, max_tokens=40, logprobs=1, ignore_eos=True)
    history = text(4, 50)
    for question in (5, 6, 7):
        (result,) = mesh.generate([history], turn)
        assert facts([result]) == facts(fresh.generate([history], turn))
        history = history + result.tokens + text(question, 10)
    # The second turn began with 50 + 40 known tokens, the third with 60 + 40 + 40, less the last, never computed.
    assert [r.cached_tokens for r in mesh.results.values()] == [0, 64, 128]


def test_tenants_are_kept_apart(folder: Path) -> None:
    mesh = LocalMesh(folder)
    salts = ("", "a", "b", "a", "")
    results = [mesh.run([mesh.submit(text(1, 70), GREEDY, salt=salt)])[0] for salt in salts]
    assert [result.cached_tokens for result in results] == [0, 0, 0, 64, 64]
    assert len({str(fact) for fact in facts(results)}) == 1


def test_of_the_second_of_two_equal_prompts_at_most_two_blocks_are_computed(folder: Path) -> None:
    """Counted where the work is: tokens that the experts of the last layer are given, on one rank."""
    mesh = LocalMesh(folder)
    prompt, params = text(1, 1000), SamplingParams(temperature=0.0, max_tokens=1, logprobs=1)
    rows: list[float] = []
    for _ in range(2):
        before = counted(mesh, "dispatched_tokens:2")
        mesh.generate([prompt], params)
        rows.append(counted(mesh, "dispatched_tokens:2") - before)
    assert rows == [1000, 8]
    assert rows[1] <= 2 * BLOCK
    assert facts([mesh.results[1]]) == facts([mesh.results[2]])
