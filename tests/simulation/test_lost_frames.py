"""Frames are lost inside a tensor-parallel group: its members see that they stand still, and the step is run again."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moemesh.group_member import GroupMember
from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import LocalMesh, Result
from transport.local_wire import FaultRates

PROMPTS = [[3, 14, 15, 9, 26], [5] * 40, [2, 71, 82, 81, 8, 2], list(range(2, 100))]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
QUIET_TURNS = 60
"""By then everything that was sent has come; with a seed a frame may take several turns."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 4)


def members(mesh: LocalMesh, tp: int) -> list[GroupMember]:
    return [engine._seat.member for engine in mesh.engines[:tp] if engine._seat is not None]


def run(mesh: LocalMesh, tp: int) -> int:
    """Until nothing is left to do; how often the group had to begin anew."""
    generation = quiet = 0
    while True:
        mesh._network.advance(0.001)
        quiet = 0 if mesh.turn() else quiet + 1
        if quiet <= QUIET_TURNS:
            continue
        leader, *others = (member.pulse() for member in members(mesh, tp))
        assert all(pulse is not None and pulse.awaited for pulse in others)
        assert leader is not None
        if not leader.awaited:
            assert all(result.ended for result in mesh.results.values())
            return generation
        generation, quiet = generation + 1, 0
        mesh.regroup(generation=generation, members=range(tp))


def mesh_of(folder: Path, tp: int, **fields: Any) -> LocalMesh:
    """One group, which has no experts: those are on two more ranks."""
    mesh = LocalMesh(folder, num_ranks=tp + 2, attention_ranks=tp, attention_tp=tp, prefix_caching=False, **fields)
    for prompt in PROMPTS:
        mesh.submit(prompt, PARAMS)
    return mesh


@cache
def undisturbed(folder: Path) -> list[Result]:
    return mesh_of(folder, 2).run()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("drop", [0.002, 0.02])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tp", [2, 4])
def test_the_same_bits_whatever_is_lost(folder: Path, tp: int, seed: int, drop: float, micro_batches: int) -> None:
    mesh = mesh_of(folder, tp, seed=seed, max_num_batched_tokens=48, micro_batches=micro_batches)
    pairs = [(sender, receiver) for sender in range(tp) for receiver in range(tp) if sender != receiver]
    mesh._network.disturb(FaultRates(drop=drop, reorder=0.2, duplicate=0.1), pairs)
    restarts = run(mesh, tp)
    assert restarts > 0 or drop < 0.01, "something was lost"
    assert list(mesh.results.values()) == undisturbed(folder)
    for engine in mesh.engines:
        assert not any(engine.leftovers().values()), engine.leftovers()
