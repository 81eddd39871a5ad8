"""More requests than the cache holds: all finish, each as if alone, and nothing of them is kept afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import Mesh, eventually, running_server
from tests.end_to_end.probes import alone, probes, substance, together
from tests.random_checkpoint import write_random_checkpoint

VOCAB = 320
NUM_REQUESTS = 200
NUM_GROWING = 40
BLOCKS = 20  # of 32 tokens, for each of two attention groups; one of the long requests takes 4 of them


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), seed=5, num_hidden_layers=2)


@pytest.fixture(scope="module")
def mesh(checkpoint: Path) -> Iterator[Mesh]:
    arguments = ("--ranks", "4", "--attention-tp", "2", "--num-gpu-blocks-override", str(BLOCKS))
    with running_server(str(checkpoint), *arguments) as mesh:
        yield mesh


def mixed_requests() -> list[dict[str, Any]]:
    """Some short prompts with long answers, which outgrow what is free when they are admitted; then all sorts."""
    draw = random.Random(11)
    growing = probes(VOCAB, [draw.randint(1, 20) for _ in range(NUM_GROWING)], new_tokens=(70, 100), ignore_eos=True)
    lengths = [draw.choice((1, 5, 20, 33, 60, 120)) for _ in range(NUM_REQUESTS - NUM_GROWING)]
    mixed = probes(VOCAB, lengths, seed=1, new_tokens=(3, 20))
    return [request | {"echo": request["echo"] and len(request["prompt"]) < 40} for request in [*growing, *mixed]]


def settle(mesh: Mesh) -> None:
    """Until no request is known anywhere and no block is used."""
    for name in ("open_requests", "running_requests", "waiting_requests", "cache_used_blocks"):
        eventually(lambda name=name: mesh.total(f"moemesh_{name}") == 0, what=f"{name} is 0")  # type: ignore[misc]


def test_200_requests_in_a_cache_too_small(checkpoint: Path, mesh: Mesh) -> None:
    requests = mixed_requests()
    with running_server(str(checkpoint), "--num-gpu-blocks-override", "1024") as single:
        expected = alone(single, requests)
    assert together(mesh, requests) == expected
    settle(mesh)
    metrics = mesh.metrics()
    assert mesh.total("moemesh_preemptions_total") > 0
    assert metrics["moemesh_cache_blocks"] == {(("rank", "0"),): BLOCKS, (("rank", "2"),): BLOCKS}
    assert sum(metrics["moemesh_requests_total"].values()) == NUM_REQUESTS
    assert [rank["state"] for rank in mesh.get("/mesh").body["ranks"]] == ["up"] * 4
    again = requests[7]
    assert substance(mesh.complete(**again)) == expected[7]


def test_a_client_that_leaves_frees_its_blocks(mesh: Mesh) -> None:
    with mesh.stream(prompt=[5, 6, 7], max_tokens=500, ignore_eos=True, seed=1, return_token_ids=True) as events:
        for _ in range(3):
            assert next(events) is not None
        eventually(lambda: mesh.total("moemesh_cache_used_blocks") > 0, what="its blocks are counted")
    settle(mesh)
    assert mesh.metrics()["moemesh_requests_total"][(("outcome", "cancelled"),)] == 1


def test_clients_that_leave_while_they_wait(mesh: Mesh) -> None:
    """One takes the cache of each group, many more wait for it; all leave at once."""
    with ExitStack() as streams:
        for number in range(40):
            streams.enter_context(mesh.stream(prompt=[number + 3] * 400, max_tokens=230, ignore_eos=True, seed=2))
        eventually(lambda: mesh.total("moemesh_waiting_requests") >= 2, what="some wait")
    settle(mesh)


def test_what_can_never_fit_is_refused_with_the_numbers(mesh: Mesh) -> None:
    answer = mesh.post("/v1/completions", {"prompt": [3] * 100, "max_tokens": 800})
    assert answer.status == 400
    assert f"the cache has {BLOCKS}" in answer.body["error"]["message"]
