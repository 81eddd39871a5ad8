"""Attention groups are independent: one that has no request sends nothing of its own, whatever the other one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.end_to_end.harness import SMALL_CACHE, Mesh, eventually, running_server

# What a rank sends for requests of its own group; answers (and credits) it owes to others as a host of experts.
OWN_KINDS = ("dispatch", "collective", "plan", "samples")
GROUPS = ((0, 1), (2, 3))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running_server("--ranks", "4", "--attention-tp", "2", *SMALL_CACHE) as mesh:
        yield mesh


def of_rank(mesh: Mesh, name: str, rank: int) -> float:
    return mesh.metrics().get(name, {}).get((("rank", str(rank)),), 0.0)


def frames(mesh: Mesh, group: tuple[int, ...], *kinds: str) -> dict[tuple[int, str], float]:
    """Frames of these kinds that each rank of the group has sent so far."""
    sent = mesh.metrics()["moemesh_frames_sent_total"]
    return {(rank, kind): sent.get((("kind", kind), ("rank", str(rank))), 0.0) for rank in group for kind in kinds}


def wait_for_steps(mesh: Mesh, rank: int, count: int) -> None:
    """Until the rank has reported `count` more steps, and once more: everybody reports as often."""
    for more in (count, 1):
        before = of_rank(mesh, "moemesh_steps_total", rank)
        eventually(
            lambda before=before, more=more: of_rank(mesh, "moemesh_steps_total", rank) >= before + more,  # type: ignore[misc]
            what=f"rank {rank} goes on",
        )


def test_group_1_is_silent_while_group_0_works(mesh: Mesh) -> None:
    for _ in range(3):
        mesh.complete(prompt=[5] * 50, max_tokens=20, ignore_eos=True)
    eventually(lambda: of_rank(mesh, "moemesh_steps_total", 0) >= 60, what="rank 0 has reported its steps")
    eventually(lambda: mesh.total("moemesh_running_requests") == 0, what="group 0 has reported its end")
    assert set(frames(mesh, GROUPS[1], *OWN_KINDS).values()) == {0.0}
    assert min(frames(mesh, GROUPS[0], "dispatch", "collective").values()) > 0
    assert min(frames(mesh, GROUPS[1], "answer").values()) > 0


def test_group_0_is_silent_while_group_1_works(mesh: Mesh) -> None:
    """A stream for each group; the client of the first one leaves."""
    request = {"prompt": [5] * 20, "max_tokens": 1900, "ignore_eos": True, "return_token_ids": True}
    with ExitStack() as in_group_0, ExitStack() as in_group_1:
        next(in_group_0.enter_context(mesh.stream(**request)))
        next(in_group_1.enter_context(mesh.stream(**request)))
        in_group_0.close()
        eventually(lambda: of_rank(mesh, "moemesh_running_requests", 0) == 0, what="group 0 is idle")
        wait_for_steps(mesh, 2, 20)
        before = frames(mesh, GROUPS[0], *OWN_KINDS), frames(mesh, GROUPS[1], *OWN_KINDS)
        wait_for_steps(mesh, 2, 50)
        assert of_rank(mesh, "moemesh_running_requests", 2) == 1
        assert frames(mesh, GROUPS[0], *OWN_KINDS) == before[0]
        after = frames(mesh, GROUPS[1], *OWN_KINDS)
        # One row at a time belongs to the first rank of the group: only that one dispatches.
        for key in ((2, "plan"), (2, "dispatch"), (2, "collective"), (3, "collective")):
            assert after[key] > before[1][key]
