"""Experts lose their only host while steps run: survivors load them, and the same bits come as without the loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from moemesh.membership import Membership
from moemesh.membership_records import (
    TICK_SECONDS,
    Event,
    Heartbeat,
    HostingSeen,
    MembershipSettings,
    ProcessEnded,
    PublishView,
    Readmit,
    ReadySeen,
    Tick,
)
from moemesh.sampling_params import SamplingParams
from tests.oracle import write_random_checkpoint
from tests.simulation.local_mesh import MAX_TURNS, LocalMesh, Result
from transport import messages
from transport.life import Life

PROMPTS = [[3, 14, 15, 9, 26], [5] * 40, [2, 71, 82, 81, 8, 2]]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
RANKS = 5
SHAPE = {"num_ranks": RANKS, "attention_ranks": 2, "attention_tp": 2}  # ranks 2, 3 and 4 have the experts
EXPERT_RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 4)


class Frontend:
    """Membership as the frontend runs it, over a mesh in one thread."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        self.membership = Membership(mesh.mesh, mesh.placement, MembershipSettings(respawn=False))
        self.now = 0.0
        self.placements = [mesh.placement]
        for rank in range(RANKS):
            self.tell(ReadySeen(Life(rank)))

    def tell(self, event: Event) -> None:
        for instruction in self.membership.handle(event, self.now):
            match instruction:
                case PublishView():
                    self._publish(instruction)
                case Readmit(life, incarnation):
                    self.mesh.controls[life.rank].inbox.append(messages.Readmit(incarnation))

    def _publish(self, news: PublishView) -> None:
        view, placement = news.view, news.placement
        self.placements.append(placement)
        hosts = {layer: [list(ranks) for ranks in placement.hosts_of(layer)] for layer in placement.moe_layers}
        for rank in view.listening():
            order = {layer: list(experts) for layer, experts in news.orders.get(rank, {}).items()}
            self.mesh.controls[rank].inbox += [
                messages.Place(placement.version, hosts, order),
                messages.View(
                    epoch=view.epoch,
                    incarnations=[record.incarnation for record in view.ranks],
                    states=[record.state for record in view.ranks],
                    born=[0] * RANKS,
                    groups=[
                        messages.GroupMembers(group.generation, list(group.members), group.since)
                        for group in view.groups
                    ],
                ),
            ]

    def turn(self) -> None:
        self.mesh.turn()
        for rank, message in self.mesh.said:
            life = self.membership.present(rank)
            if isinstance(message, messages.Ready):
                self.tell(ReadySeen(life))
            else:
                self.tell(HostingSeen(life, message.experts, message.refused, message.problem))
        self.mesh.said.clear()

    def time_passes(self, seconds: float, *, silent: set[int]) -> None:
        for _ in range(round(seconds / TICK_SECONDS)):
            self.now += TICK_SECONDS
            for rank in set(range(RANKS)) - silent:
                self.tell(Heartbeat(self.membership.present(rank), 0, False))
            self.tell(Tick())

    def run_to(self, requests: list[int], *, tokens: int) -> list[Result]:
        results = [self.mesh.results[request] for request in requests]
        for _ in range(MAX_TURNS):
            if min(len(result.tokens) for result in results) >= tokens:
                return results
            self.turn()
        raise AssertionError(f"no end after {MAX_TURNS} turns: {results}")

    def settle(self) -> None:
        """Until nobody has anything left to load or to do."""
        for _ in range(MAX_TURNS):
            self.turn()
            if not self.membership.homes.orders:
                break
        self.mesh.settle()

    def has(self, rank: int) -> dict[int, tuple[int, ...]]:
        """What the rank's service would answer for."""
        hosted = self.mesh.services[rank].hosted()
        return {layer: tuple(experts) for layer, experts in hosted.items()}


@pytest.mark.parametrize("seed", range(4))
def test_survivors_take_over_and_nobody_notices(folder: Path, seed: int) -> None:
    mesh = LocalMesh(folder, seed=seed, **SHAPE)
    expected = mesh.run([mesh.submit(prompt, PARAMS) for prompt in PROMPTS])
    frontend = Frontend(mesh)
    again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    frontend.run_to(again, tokens=3)
    mesh.kill(3)
    frontend.tell(ProcessEnded(Life(3)))
    frontend.run_to(again, tokens=6)
    mesh.kill(4)  # with what it has taken over
    frontend.tell(ProcessEnded(Life(4)))
    results = frontend.run_to(again, tokens=PARAMS.max_tokens or 0)
    assert [(result.tokens, result.logprobs) for result in results] == [
        (result.tokens, result.logprobs) for result in expected
    ]
    frontend.settle()
    for rank in (0, 1, 2):
        assert not any(mesh.engines[rank].leftovers().values())
    assert frontend.has(2) == frontend.membership.placement.experts_of(2)


@pytest.mark.parametrize("seed", range(4))
def test_experts_go_home_with_their_rank(folder: Path, seed: int) -> None:
    """A rank is stopped, replaced, continued: what the others took over they let go of."""
    mesh = LocalMesh(folder, seed=seed, **SHAPE)
    expected = mesh.run([mesh.submit(prompt, PARAMS) for prompt in PROMPTS])
    frontend = Frontend(mesh)
    before = {rank: frontend.has(rank) for rank in EXPERT_RANKS}
    again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    frontend.run_to(again, tokens=3)
    mesh.stop(4)
    frontend.time_passes(2.0, silent={4})
    assert frontend.membership.view.ranks[4].state == "dead"
    frontend.run_to(again, tokens=6)
    taken = [rank for rank in (2, 3) if frontend.has(rank) != before[rank]]
    assert taken == [2, 3]
    mesh.go_on(4)
    frontend.time_passes(0.2, silent=set())
    results = frontend.run_to(again, tokens=PARAMS.max_tokens or 0)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    frontend.settle()
    assert frontend.membership.view.ranks[4].state == "up"
    assert {rank: frontend.has(rank) for rank in EXPERT_RANKS} == before
    assert frontend.membership.placement.hosts == mesh.placement.hosts
    for engine in mesh.engines:
        assert not any(engine.leftovers().values())
