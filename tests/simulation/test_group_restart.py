"""A group loses a rank: what its sequences had got goes on in another group, bit for bit, and the group begins anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh
from transport import messages

PROMPTS = [[3, 14, 15, 9, 26], [5] * 40, [2, 71, 82, 81, 8, 2]]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
SHAPE = {"num_ranks": 6, "attention_ranks": 4, "attention_tp": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 4)


def view(*groups: tuple[int, list[int]], dead: int | None = None) -> messages.View:
    return messages.View(
        epoch=9,
        incarnations=[0] * 6,
        states=["dead" if rank == dead else "up" for rank in range(6)],
        born=[0] * 6,
        groups=[messages.GroupMembers(generation, members, generation) for generation, members in groups],
    )


def run_some(mesh: LocalMesh, requests: list[int], *, tokens: int) -> None:
    while min(len(mesh.results[request].tokens) for request in requests) < tokens:
        mesh.turn()


def assert_nothing_left(mesh: LocalMesh, *, dead: int | None = None) -> None:
    mesh.settle()
    for rank, engine in enumerate(mesh.engines):
        if rank != dead:
            assert not any(engine.leftovers().values()), (rank, engine.leftovers())


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_another_group_goes_on_with_the_same_bits(folder: Path, seed: int, victim: int) -> None:
    mesh = LocalMesh(folder, seed=seed, **SHAPE)
    expected = mesh.run([mesh.submit(prompt, PARAMS, group=1) for prompt in PROMPTS])
    before = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    run_some(mesh, before, tokens=3)
    mesh.kill(victim)
    survivors = [rank for rank in range(6) if rank != victim]
    for rank in survivors:
        mesh.controls[rank].inbox.append(view((1, []), (0, [2, 3]), dead=victim))
    after = [
        mesh.submit(prompt, PARAMS, group=1, generated=mesh.results[request].tokens)
        for prompt, request in zip(PROMPTS, before, strict=True)
    ]
    mesh.run(after)
    for whole, first, rest in zip(expected, before, after, strict=True):
        assert mesh.results[first].tokens + mesh.results[rest].tokens == whole.tokens
        assert mesh.results[first].logprobs + mesh.results[rest].logprobs == whole.logprobs
    assert len(mesh.reports) == len(survivors)
    assert {(report.peer, report.evidence) for report in mesh.reports} == {(victim, "failed")}
    assert_nothing_left(mesh, dead=victim)


@pytest.mark.parametrize("first_to_hear", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_a_new_generation_begins_with_nothing_whoever_hears_of_it_first(
    folder: Path, seed: int, first_to_hear: int
) -> None:
    """Leader and member leave the old generation at different moments: frames of both are under way."""
    mesh = LocalMesh(folder, seed=seed, **SHAPE)
    expected = [result.tokens for result in mesh.run([mesh.submit(prompt, PARAMS) for prompt in PROMPTS])]
    dropped = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    run_some(mesh, dropped, tokens=2)
    before = mesh.engines[0].counters()["steps"]
    news = view((2, [0, 1]), (0, [2, 3]))
    mesh.controls[first_to_hear].inbox.append(news)
    if first_to_hear == 0:
        again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    for _ in range(30):
        mesh.turn()
    mesh.controls[1 - first_to_hear].inbox.append(news)
    if first_to_hear == 1:
        again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    assert [result.tokens for result in mesh.run(again)] == expected
    assert not any(mesh.results[request].ended for request in dropped)
    assert mesh.engines[0].counters()["steps"] >= before, "what was counted stays counted"
    assert_nothing_left(mesh)


@pytest.mark.parametrize("seed", range(4))
def test_a_call_under_way_to_a_rank_that_dies_is_answered_by_a_replica(folder: Path, seed: int) -> None:
    """At once when the link says so; and from the next view on nobody asks the dead any more."""
    everywhere = {"redundant_experts": 16}
    mesh = LocalMesh(folder, seed=seed, **SHAPE, **everywhere)
    expected = [result.tokens for result in mesh.run([mesh.submit(prompt, PARAMS) for prompt in PROMPTS])]
    again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    run_some(mesh, again, tokens=3)
    mesh.kill(5)
    run_some(mesh, again, tokens=6)
    placement = mesh.placement.without({5})
    place = messages.Place(
        placement.version,
        {layer: [list(hosts) for hosts in placement.hosts_of(layer)] for layer in placement.moe_layers},
    )
    for rank in range(5):
        mesh.controls[rank].inbox += [place, view((0, [0, 1]), (0, [2, 3]), dead=5)]
    assert [result.tokens for result in mesh.run(again)] == expected
    assert_nothing_left(mesh, dead=5)
