"""A new process takes the place of a dead rank: it is asked, and asks, from the moment on that it has been met."""

from __future__ import annotations

from pathlib import Path

import pytest

from moemesh.neighbours import Neighbours
from moemesh.sampling_params import SamplingParams
from tests.random_checkpoint import write_random_checkpoint
from tests.simulation.local_mesh import LocalControl, LocalMesh
from transport import messages

PROMPTS = [[5, 9, 14, 2, 7] * 9, [3, 3, 8], [30, 1, 2, 3] * 5]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True, logprobs=2)
NEWCOMER = 1


class HealingMesh(LocalMesh):
    """Of four ranks, in one attention group."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed=seed, num_ranks=4, attention_ranks=2, attention_tp=2)

    def tell(self, *, state: str, born: int, generation: int, members: list[int], ranks: tuple[int, ...]) -> None:
        """A view in which the newcomer is in this state."""
        alive = state == "up"
        placement = self.placement if alive else self.placement.without({NEWCOMER})
        version = 2 * generation + alive
        hosts = {layer: [list(hosts) for hosts in placement.hosts_of(layer)] for layer in placement.moe_layers}
        view = messages.View(
            epoch=version,
            incarnations=[0, 1, 0, 0],
            states=["up", state, "up", "up"],
            born=[0, born, 0, 0],
            groups=[messages.GroupMembers(generation, members, generation)],
        )
        for rank in ranks:
            self.controls[rank].inbox += [messages.Place(version, hosts), view]

    def begin_anew(self) -> None:
        """The newcomer's process, which nobody has met yet."""
        self._network.revive(NEWCOMER)
        self._dead.discard(NEWCOMER)
        self.controls[NEWCOMER] = LocalControl()
        self.engines[NEWCOMER] = self.new_engine(NEWCOMER, Neighbours(NEWCOMER, born=1, met={}))

    def said_by_newcomer(self, turns: int) -> list[type[messages.Message]]:
        """What it tells the frontend in so many turns of its own."""
        for _ in range(turns):
            self.engines[NEWCOMER].turn()
        sent = self.controls[NEWCOMER].sent
        said = [type(message) for message in sent]
        sent.clear()
        return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("models") / "model", 4)


@pytest.mark.parametrize("last_to_hear", [0, NEWCOMER, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_group_is_whole_again_with_the_same_bits(folder: Path, seed: int, last_to_hear: int) -> None:
    mesh = HealingMesh(folder, seed)
    expected = [result.tokens for result in mesh.run([mesh.submit(prompt, PARAMS) for prompt in PROMPTS])]
    lost = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    for _ in range(40):
        mesh.turn()
    mesh.kill(NEWCOMER)
    mesh.tell(state="dead", born=0, generation=1, members=[], ranks=(0, 2, 3))
    for _ in range(20):
        mesh.turn()
    mesh.begin_anew()
    mesh.tell(state="joining", born=1, generation=1, members=[], ranks=(0, 1, 2, 3))
    for _ in range(20):
        mesh.turn()
    whole = {"state": "up", "born": 1, "generation": 2, "members": [0, 1]}
    mesh.tell(**whole, ranks=tuple(rank for rank in range(4) if rank != last_to_hear))
    if last_to_hear != 0:
        again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    for _ in range(30):
        mesh.turn()
    mesh.tell(**whole, ranks=(last_to_hear,))
    if last_to_hear == 0:
        again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    assert [result.tokens for result in mesh.run(again)] == expected
    assert not any(mesh.results[request].ended for request in lost)
    mesh.settle()
    assert not any(any(engine.leftovers().values()) for engine in mesh.engines)


def test_it_says_that_it_is_ready_once_it_knows_the_mesh_and_has_met_everybody(folder: Path) -> None:
    mesh = HealingMesh(folder, 0)
    mesh.kill(NEWCOMER)
    mesh.begin_anew()
    assert mesh.said_by_newcomer(10) == []
    mesh.tell(state="joining", born=1, generation=1, members=[], ranks=(NEWCOMER,))
    assert mesh.said_by_newcomer(10) == [messages.Hosting, messages.Ready], "what it has first"


@pytest.mark.parametrize("held_back", [0, NEWCOMER])
def test_what_is_asked_of_a_group_waits_until_its_members_have_met(folder: Path, held_back: int) -> None:
    mesh = HealingMesh(folder, 1)
    expected = [result.tokens for result in mesh.run([mesh.submit(prompt, PARAMS) for prompt in PROMPTS])]
    mesh.kill(NEWCOMER)
    mesh.begin_anew()
    link = mesh._network.links[held_back]
    waiting = link.take_joined()  # met, and not known yet
    mesh.tell(state="up", born=1, generation=2, members=[0, 1], ranks=(0, 1, 2, 3))
    again = [mesh.submit(prompt, PARAMS) for prompt in PROMPTS]
    for _ in range(30):
        mesh.turn()
    assert not any(mesh.results[request].tokens for request in again)
    for process in waiting:
        link.peer_joined(*process)
    assert [result.tokens for result in mesh.run(again)] == expected
