"""However a mesh ends, its clients are told and nothing of it stays: no process, no segment, no folder."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.end_to_end.harness import (
    ANSWER_SECONDS,
    SMALL_CACHE,
    Mesh,
    eventually,
    moemesh_command,
    run_to_end,
    serving,
    started,
)

LONG: dict[str, Any] = {"prompt": [5] * 20, "ignore_eos": True, "return_token_ids": True}
TOO_LONG_TO_END: dict[str, Any] = LONG | {"max_tokens": 1900}

Events = Iterator[dict[str, Any] | None]


def num_tokens(event: dict[str, Any] | None) -> int:
    assert event is not None
    return sum(len(choice["token_ids"]) for choice in event["choices"])


def take_some(events: Events) -> int:
    """The tokens of the first events: the stream runs."""
    return sum(num_tokens(next(events)) for _ in range(3))


def end_of(events: Events) -> str:
    """How a stream ended: "done", "cut" (the connection broke), or the error it was told."""
    try:
        for event in events:
            if event is None:
                return "done"
            if "error" in event:
                assert next(events, "nothing") == "nothing"
                return str(event["error"]["message"])
    except (OSError, http.client.HTTPException, json.JSONDecodeError):
        return "cut"
    return "cut"


def test_sigterm_lets_streams_end() -> None:
    with serving("--ranks", "2", *SMALL_CACHE) as mesh, mesh.stream(**LONG, max_tokens=400) as events:
        received = take_some(events)
        mesh.process.send_signal(signal.SIGTERM)
        eventually(lambda: mesh.get("/health").status == 503, what="it drains")
        assert mesh.get("/live").status == 200
        refused = mesh.post("/v1/completions", {"prompt": [5]})
        assert refused.status == 503
        assert "Retry-After" in refused.headers
        for event in events:
            if event is None:
                break
            received += num_tokens(event)
        assert received == 400
        assert mesh.process.wait(ANSWER_SECONDS) == 0
        mesh.wait_gone()


def test_ctrl_c_and_the_end_of_patience() -> None:
    """SIGINT is SIGTERM; streams that are not done within the drain timeout are told so."""
    with serving("--drain-timeout", "0.2", *SMALL_CACHE) as mesh, mesh.stream(**TOO_LONG_TO_END) as events:
        take_some(events)
        mesh.process.send_signal(signal.SIGINT)
        assert "shutting down" in end_of(events)
        assert mesh.process.wait(ANSWER_SECONDS) == 0
        mesh.wait_gone()


def test_sigterm_while_it_loads() -> None:
    with started(moemesh_command("serve", "--ranks", "2", "--port", "0", *SMALL_CACHE)) as mesh:
        eventually(lambda: len(rank_processes(mesh)) == 2, timeout_s=ANSWER_SECONDS, what="ranks have been started")
        mesh.stop()


def rank_processes(mesh: Mesh) -> list[object]:
    """Ranks themselves, not the mpirun and the keeper that have the same words in their command lines."""
    return [p for p in mesh.processes() if p.cmdline()[2:4] == ["-m", "moemesh.rank_process"]]


# Who is killed -> what a client in the middle of a stream sees.
OWN_LAUNCH = {
    "frontend": "cut",
    "mpirun": "the mesh has failed",
    "rank": "the mesh has failed",
}


@pytest.mark.parametrize("victim", OWN_LAUNCH)
def test_kill_9(victim: str) -> None:
    """Whom nobody can replace; a rank is one of them where the user does not want that."""
    flags = ("--ranks", "2", *SMALL_CACHE, *(("--fault-tolerance", "off") if victim == "rank" else ()))
    with serving(*flags) as mesh, mesh.stream(**TOO_LONG_TO_END) as events:
        take_some(events)
        if victim == "frontend":
            mesh.process.kill()
        elif victim == "mpirun":
            next(p for p in mesh.processes() if "prterun" in p.cmdline()[0] or "mpirun" in p.cmdline()[0]).kill()
        else:
            rank_processes(mesh)[1].kill()  # type: ignore[attr-defined]
        assert OWN_LAUNCH[victim] in end_of(events)
        mesh.wait_gone()
        assert mesh.process.wait() != 0


@pytest.mark.parametrize("victim", ["frontend", "mpirun"])
def test_kill_9_under_a_users_own_mpirun(victim: str) -> None:
    with serving(*SMALL_CACHE, under_mpirun=2) as mesh, mesh.stream(**TOO_LONG_TO_END) as events:
        take_some(events)
        if victim == "frontend":
            mesh.find_process("attached-frontend").kill()
        else:
            mesh.process.kill()
        assert end_of(events) != "done"
        eventually(lambda: mesh.process.poll() is not None and not mesh.left(), timeout_s=10, what="nothing is left")


def test_without_ulfm_the_loss_of_a_rank_is_the_end() -> None:
    arguments = ("--attention-tp", "1", *SMALL_CACHE)
    with (
        serving(*arguments, under_mpirun=3, ulfm=False) as mesh,
        mesh.stream(**TOO_LONG_TO_END) as first,
        mesh.stream(**TOO_LONG_TO_END) as second,
    ):
        take_some(first)
        take_some(second)
        assert "--with-ft ulfm" in mesh.log
        psutil.Process(mesh.get("/mesh").body["ranks"][2]["pid"]).kill()
        assert "the mesh has failed" in end_of(first)
        assert "the mesh has failed" in end_of(second)
        mesh.wait_gone()
        assert mesh.process.wait() != 0


def test_a_second_mesh_on_the_same_port(demo: Mesh) -> None:
    port = demo.url.rpartition(":")[2]
    done = run_to_end("serve", "--ranks", "2", "--port", port)
    assert done.returncode == 1
    assert f"127.0.0.1:{port} is in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert demo.complete(prompt=[5], max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
