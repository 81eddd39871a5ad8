"""A rank is killed or stopped while it computes: every answer comes, with exactly the tokens it would have had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.end_to_end.harness import ANSWER_SECONDS, SMALL_CACHE, Mesh, eventually, running_server, serving
from tests.end_to_end.probes import substance

# Two attention groups of one rank each, two ranks with the experts.
SPLIT = ("--ranks", "4", "--attention-ranks", "2", "--attention-tp", "1")

RESPAWN_SECONDS = 120.0  # far more than it takes: the machine may be busy

REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": [5 + index] * (10 + index),
        "max_tokens": 300,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "temperature": 0.8 * (index % 2),
        "seed": index,
    }
    for index in range(6)
]


def answers_with(
    mesh: Mesh, requests: Sequence[Mapping[str, Any]], *, when_they_run: Callable[[], object]
) -> list[list[Any]]:
    """The answers to requests sent all at once; something happens when some of their tokens have come."""
    before = mesh.total("moemesh_generation_tokens_total")
    with ThreadPoolExecutor(1) as thread:
        bodies = thread.submit(mesh.complete_all, requests)
        eventually(lambda: mesh.total("moemesh_generation_tokens_total") > before + 100, what="tokens come")
        when_they_run()
        return [substance(body) for body in bodies.result()]


def rank_of(mesh: Mesh, rank: int) -> dict[str, Any]:
    """What /mesh says of a rank."""
    found: dict[str, Any] = mesh.get("/mesh").body["ranks"][rank]
    return found


def process_of(mesh: Mesh, rank: int) -> psutil.Process:
    return psutil.Process(rank_of(mesh, rank)["pid"])


def await_whole(mesh: Mesh) -> None:
    """Until every rank serves again."""
    eventually(lambda: mesh.get("/health").body["degraded"] is False, timeout_s=RESPAWN_SECONDS, what="it is whole")


def test_an_attention_rank_is_killed_and_another_stopped_for_a_while() -> None:
    with running_server(*SPLIT, *SMALL_CACHE, "--stop-grace", "180") as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]

        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 1).suspend) == expected
        eventually(lambda: rank_of(mesh, 1)["state"] == "dead", what="it is given up")
        process_of(mesh, 1).resume()
        eventually(lambda: rank_of(mesh, 1)["state"] == "up", timeout_s=10, what="it is back")
        assert rank_of(mesh, 1)["incarnation"] == 1

        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 0).kill) == expected
        await_whole(mesh)
        assert rank_of(mesh, 0)["incarnation"] == 1
        assert mesh.total("moemesh_request_restarts_total") > 0
        assert mesh.total("moemesh_rank_respawns_total") == 1
        assert mesh.total("moemesh_replay_mismatch_total") == 0
        assert [substance(body) for body in mesh.complete_all(REQUESTS)] == expected


def test_ranks_with_replicas_of_their_experts_are_stopped_and_killed() -> None:
    """Every rank has both roles and a group of its own, every expert two hosts."""
    every_expert_twice = ("--ranks", "4", "--attention-tp", "1", "--redundant-experts", "256", "--stop-grace", "180")
    with running_server(*every_expert_twice, *SMALL_CACHE) as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]

        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 1).suspend) == expected
        eventually(lambda: rank_of(mesh, 1)["state"] == "dead", what="it is given up")
        process_of(mesh, 1).resume()
        eventually(lambda: rank_of(mesh, 1)["state"] == "up", timeout_s=10, what="it is back")

        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 2).kill) == expected
        assert mesh.get("/health").status == 200
        await_whole(mesh)
        # The newcomer serves, and so does who has met it after having been away.
        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 1).kill) == expected
        await_whole(mesh)
        assert mesh.total("moemesh_replay_mismatch_total") == 0
        assert [substance(body) for body in mesh.complete_all(REQUESTS)] == expected


def test_experts_without_replicas_are_taken_over_and_go_home() -> None:
    """Each of the two ranks with experts loads those of the other, for a while."""
    with running_server(*SPLIT, *SMALL_CACHE, "--stop-grace", "180", "--respawn", "off") as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        home = mesh.get("/mesh").body["placement"]["experts"]

        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 3).suspend) == expected
        eventually(lambda: hosts(mesh) == {(2,)}, what="rank 2 has taken over")
        process_of(mesh, 3).resume()
        eventually(lambda: mesh.get("/mesh").body["placement"]["experts"] == home, what="the experts are at home")

        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 2).kill) == expected
        eventually(lambda: hosts(mesh) == {(3,)}, what="rank 3 has taken over")
        health = mesh.get("/health")
        assert (health.status, health.body["degraded"]) == (200, True)
        assert mesh.total("moemesh_experts_taken_over_total") == sum(map(len, home.values()))
        assert mesh.total("moemesh_experts_missing") == 0
        assert mesh.total("moemesh_replay_mismatch_total") == 0
        assert [substance(body) for body in mesh.complete_all(REQUESTS)] == expected


def hosts(mesh: Mesh) -> set[tuple[int, ...]]:
    """Who hosts experts, by what /mesh says."""
    return {tuple(ranks) for layer in mesh.get("/mesh").body["placement"]["experts"].values() for ranks in layer}


def test_a_rank_is_stopped_while_another_is_replaced() -> None:
    """When it comes back it meets a process that it has never heard of."""
    every_expert_twice = ("--ranks", "4", "--attention-tp", "1", "--redundant-experts", "256", "--stop-grace", "180")
    with running_server(*every_expert_twice, *SMALL_CACHE) as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        process_of(mesh, 1).suspend()
        eventually(lambda: rank_of(mesh, 1)["state"] == "dead", what="it is given up")
        process_of(mesh, 2).kill()
        eventually(lambda: rank_of(mesh, 2)["incarnation"] == 1, what="the other is respawned")
        eventually(lambda: rank_of(mesh, 2)["state"] == "up", timeout_s=RESPAWN_SECONDS, what="it serves")
        process_of(mesh, 1).resume()
        await_whole(mesh)
        assert rank_of(mesh, 1)["incarnation"] == 1
        assert [substance(body) for body in mesh.complete_all(REQUESTS)] == expected


def test_without_respawn_a_mesh_goes_on_with_fewer_ranks() -> None:
    with running_server(*SPLIT, *SMALL_CACHE, "--respawn", "off") as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 0).kill) == expected
        health = mesh.get("/health")
        assert (health.status, health.body["degraded"]) == (200, True)
        assert rank_of(mesh, 0)["state"] == "dead"


def test_when_mpirun_is_killed_no_newcomer_stays() -> None:
    with serving(*SPLIT, *SMALL_CACHE) as mesh:
        process_of(mesh, 0).kill()
        eventually(lambda: rank_of(mesh, 0)["incarnation"] == 1, what="it is respawned")
        await_whole(mesh)
        mpirun = next(one for one in mesh.processes() if "mpirun" in one.cmdline()[0] or "prterun" in one.cmdline()[0])
        mpirun.kill()
        mesh.process.wait(ANSWER_SECONDS)
        mesh.wait_gone()


def test_when_the_frontend_is_killed_no_newcomer_stays() -> None:
    with serving(*SPLIT, *SMALL_CACHE) as mesh:
        process_of(mesh, 0).kill()
        eventually(lambda: rank_of(mesh, 0)["incarnation"] == 1, what="it is respawned")
        mesh.process.kill()  # while the new process begins
        mesh.process.wait(ANSWER_SECONDS)
        mesh.wait_gone()


def test_the_only_rank_is_killed() -> None:
    with running_server(*SMALL_CACHE) as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 0).kill) == expected
        assert rank_of(mesh, 0)["incarnation"] == 1
        assert mesh.get("/health").body["degraded"] is False


def test_all_ranks_are_killed_at_once() -> None:
    """Nobody is left to start anybody: the frontend starts all of them again, and again."""
    with running_server(*SPLIT, *SMALL_CACHE) as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        (segments,) = mesh.segments
        num_segments = len(list(segments.iterdir()))

        def kill_all() -> None:
            for process in [process_of(mesh, rank) for rank in range(4)]:
                process.kill()

        for life in (1, 2):
            before = [rank_of(mesh, rank)["incarnation"] for rank in range(4)]
            assert answers_with(mesh, REQUESTS, when_they_run=kill_all) == expected
            await_whole(mesh)
            lives = [rank_of(mesh, rank)["incarnation"] for rank in range(4)]
            assert len(set(lives)) == 1, f"start {life}: they began together"
            assert lives > before
            assert len(list(segments.iterdir())) == num_segments
        # One of them alone is replaced by the others, as ever.
        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 0).kill) == expected
        await_whole(mesh)
        assert mesh.total("moemesh_replay_mismatch_total") == 0


def test_a_rank_of_a_users_own_mpirun_is_replaced() -> None:
    """All of them one after the other; but when all are gone at once, so is the mesh, and says why."""
    with serving("--attention-tp", "2", *SMALL_CACHE, under_mpirun=4) as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        for rank in range(4):
            assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, rank).kill) == expected
            await_whole(mesh)
        assert [rank_of(mesh, rank)["incarnation"] for rank in range(4)] == [1] * 4
        assert mesh.total("moemesh_replay_mismatch_total") == 0
        mesh.remember_segments()
        for process in [process_of(mesh, rank) for rank in range(4)]:
            process.kill()
        mesh.wait_gone()
        assert "the mesh has failed" in mesh.log
        assert "no rank is left, and those of a user's own mpirun cannot all be started again" in mesh.log


def test_without_respawn_the_only_rank_is_the_mesh() -> None:
    with serving("--respawn", "off", *SMALL_CACHE) as mesh:
        process_of(mesh, 0).kill()
        assert mesh.process.wait(ANSWER_SECONDS) == 1
        assert "the mesh has failed: rank 0, with" in mesh.log
        mesh.wait_gone()


@pytest.mark.parametrize(("tp", "victims"), [(2, (0,)), (4, (2, 0))])
def test_an_attention_group_goes_on_without_the_ranks_that_are_killed(tp: int, victims: tuple[int, ...]) -> None:
    """No prompt is computed twice, and no token but those of steps that were under way."""
    shape = ("--ranks", f"{tp + 1}", "--attention-ranks", f"{tp}", "--attention-tp", f"{tp}", "--respawn", "off")
    with running_server(*shape, *SMALL_CACHE, "--no-enable-prefix-caching") as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]
        for number, victim in enumerate(victims, start=1):
            assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, victim).kill) == expected
            (group,) = mesh.get("/mesh").body["groups"]
            left = [rank for rank in range(tp) if rank not in victims[:number]]
            assert (group["generation"], group["members"]) == (number, left)
            assert mesh.get("/health").body["degraded"] is True
        assert mesh.total("moemesh_request_restarts_total") == 0
        assert mesh.total("moemesh_replay_mismatch_total") == 0
        once = sum(len(request["prompt"]) + request["max_tokens"] - 1 for request in REQUESTS)
        most = once * (1 + len(victims)) + 2 * len(REQUESTS) * len(victims)
        assert mesh.total("moemesh_computed_tokens_total") <= most, "hardly anything was computed again"


def test_a_member_of_an_attention_group_is_stopped_and_comes_back() -> None:
    """It gets the cache, and carries it on when the others are gone."""
    shape = ("--ranks", "3", "--attention-ranks", "2", "--attention-tp", "2", "--stop-grace", "180")
    with running_server(*shape, *SMALL_CACHE) as mesh:
        expected = [substance(body) for body in mesh.complete_all(REQUESTS)]

        def stop_and_let_come_back() -> None:
            process = process_of(mesh, 0)
            process.suspend()
            eventually(lambda: rank_of(mesh, 0)["state"] == "dead", what="it is given up")
            process.resume()
            members = [1, 0]
            eventually(lambda: mesh.get("/mesh").body["groups"][0]["members"] == members, what="it is back")

        assert answers_with(mesh, REQUESTS, when_they_run=stop_and_let_come_back) == expected
        assert answers_with(mesh, REQUESTS, when_they_run=process_of(mesh, 1).kill) == expected
        assert mesh.total("moemesh_replay_mismatch_total") == 0
        assert mesh.total("moemesh_request_restarts_total") == 0
