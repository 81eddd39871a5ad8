"""An attention group loses a member, and goes on with what the others have cached, bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh, Result

PROMPTS = [[3, 14, 15, 9, 26], [5] * 40, [2, 71, 82, 81, 8, 2], list(range(2, 100))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
DRAWN = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
BUDGET = 48
NUM_TOKENS = 2 * sum(len(prompt) + 11 for prompt in PROMPTS)  # the last token of an answer is never computed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 4)


def shape(tp: int, **fields: Any) -> dict[str, Any]:
    """One group, and two ranks with the experts."""
    fields = {"max_num_batched_tokens": BUDGET} | fields
    return {"num_ranks": tp + 2, "attention_ranks": tp, "attention_tp": tp, "prefix_caching": False} | fields


def submit_all(mesh: LocalMesh) -> None:
    for prompt in PROMPTS:
        for params in (GREEDY, DRAWN):
            mesh.submit(prompt, params)


@cache
def undisturbed(folder: Path) -> list[Result]:
    mesh = LocalMesh(folder, prefix_caching=False)
    submit_all(mesh)
    return mesh.run()


def computed(mesh: LocalMesh) -> float:
    """Tokens of all steps that were finished, whoever led them."""
    return sum(engine.counters().get("computed_tokens", 0) for engine in mesh.engines)


def assert_nothing_left(mesh: LocalMesh, *dead: int) -> None:
    mesh.settle()
    for rank, engine in enumerate(mesh.engines):
        if rank not in dead:
            assert not any(engine.leftovers().values()), (rank, engine.leftovers())


def run_some(mesh: LocalMesh, turns: int) -> None:
    for _ in range(turns):
        mesh.turn()


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize("turns", [0, 1, 5, 17, 40, 57, 100, 200])
def test_the_survivors_go_on_with_the_same_bits(folder: Path, victim: int, turns: int) -> None:
    mesh = LocalMesh(folder, seed=turns, **shape(4))
    submit_all(mesh)
    run_some(mesh, turns)
    mesh.kill(victim)
    mesh.regroup(generation=1, members=[rank for rank in range(4) if rank != victim])
    assert mesh.run() == undisturbed(folder)
    assert_nothing_left(mesh, victim)
    assert computed(mesh) <= NUM_TOKENS + BUDGET, "no more than the step under way is computed again"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("lost_tokens", [0, 1, 3])
@pytest.mark.parametrize("turns", [45, 60, 90])
def test_one_survivor_goes_on_alone_though_the_last_tokens_never_arrived(
    folder: Path, victim: int, lost_tokens: int, turns: int
) -> None:
    mesh = LocalMesh(folder, seed=turns, **shape(2))
    submit_all(mesh)
    run_some(mesh, turns)
    mesh.kill(victim)
    mesh.regroup(generation=1, members=[1 - victim], lost_tokens=lost_tokens)
    assert mesh.run() == undisturbed(folder)
    assert_nothing_left(mesh, victim)
    assert computed(mesh) <= NUM_TOKENS + BUDGET + lost_tokens * 2 * len(PROMPTS)


@pytest.mark.parametrize("order", [(0, 1, 2), (3, 2, 1), (1, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("between", [0, 1, 4, 9, 20, 45])
def test_one_after_the_other_dies(folder: Path, order: tuple[int, ...], between: int) -> None:
    """Also before the others have come together again."""
    mesh = LocalMesh(folder, seed=between, **shape(4))
    submit_all(mesh)
    run_some(mesh, 60)
    for generation, victim in enumerate(order, start=1):
        mesh.kill(victim)
        mesh.regroup(generation=generation, members=[rank for rank in range(4) if rank not in order[:generation]])
        run_some(mesh, between)
    assert mesh.run() == undisturbed(folder)
    assert_nothing_left(mesh, *order)


@pytest.mark.parametrize("stopped", [0, 1, 3])
@pytest.mark.parametrize("between", [0, 7, 30])
@pytest.mark.parametrize("afterwards", [2, 15, 60])
def test_who_comes_back_gets_the_cache_and_carries_it_on(
    folder: Path, stopped: int, between: int, afterwards: int
) -> None:
    """At last it is the only one left."""
    mesh = LocalMesh(folder, seed=between, **shape(4))
    submit_all(mesh)
    run_some(mesh, 50)
    mesh.stop(stopped)
    others = [rank for rank in range(4) if rank != stopped]
    mesh.regroup(generation=1, members=others)
    run_some(mesh, between)
    mesh.readmit(stopped)
    mesh.regroup(generation=2, members=[*others, stopped])
    run_some(mesh, afterwards)
    for generation, victim in enumerate(others, start=3):
        mesh.kill(victim)
        mesh.regroup(generation=generation, members=[*others[generation - 2 :], stopped])
    assert mesh.run() == undisturbed(folder)
    assert_nothing_left(mesh, *others)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_stories(folder: Path, seed: int) -> None:
    """Small caches, shared prefixes, both forms of attention, micro-batches, cancelled requests."""
    draw = random.Random(seed)
    tp = draw.choice([2, 4])
    mesh = LocalMesh(
        folder,
        seed=seed,
        **shape(tp, prefix_caching=draw.random() < 0.7),
        num_cache_blocks=draw.choice([7, 9, 512]),
        micro_batches=draw.choice([1, 2]),
    )
    submit_all(mesh)
    left, generation = list(range(tp)), 0
    while len(left) > 1:
        run_some(mesh, draw.randrange(120))
        generation += 1
        mesh.kill(left.pop(draw.randrange(len(left))))
        mesh.regroup(generation=generation, members=left, lost_tokens=draw.choice([0, 0, 1, 2]))
    mesh.run()
    facts = [replace(result, cached_tokens=0) for result in mesh.results.values()]
    assert facts == undisturbed(folder)
    assert_nothing_left(mesh, *(rank for rank in range(tp) if rank not in left))
