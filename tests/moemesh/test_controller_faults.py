"""The controller when ranks are lost: requests go on elsewhere, no token comes twice, the dead are not believed."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from moemesh import mesh_control
from moemesh.engine_client import EngineFailed, NotReady, Overloaded
from moemesh.membership_records import ProcessEnded, Tick
from tests.moemesh.test_controller import FakeRanks, collect, hello, ready, request, run, started, tokens
from transport import messages
from transport.life import Life

FAILED = messages.Failed(rank=0, error="out of memory")


def seconds_pass() -> Callable[[], float]:
    """A clock that shows another second whenever it is read."""
    return itertools.count(0.0, 1.0).__next__


def submits(ranks: FakeRanks) -> list[tuple[int, int, list[int]]]:
    """(rank, request, tokens so far) of all that were given out."""
    sent = [(life.rank, message) for life, message in ranks.sent if isinstance(message, messages.Submit)]
    return [(rank, submit.request_id, submit.generated) for rank, submit in sent]


def test_requests_of_a_lost_group_go_on_in_another() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (controller, ranks):
            asked = [await started(collect(controller, request(max_tokens=4, seed=9))) for _ in range(2)]
            await ranks.say(tokens(1, 2, 20, 21), by=Life(0))
            await ranks.say(FAILED)
            assert submits(ranks) == [(0, 1, []), (1, 2, []), (1, 1, [20, 21])]
            seeds = {submit.params["seed"] for submit in ranks.told(messages.Submit) if submit.request_id == 1}
            assert len(seeds) == 1, "the same draws"
            await ranks.say(tokens(1, 4, 99), by=Life(0))  # of the dead nothing is believed
            await ranks.say(tokens(1, 3, 21, 22), tokens(1, 5, 23, finish_reason="length"), by=Life(1))
            assert [token for output in await asked[0] for token in output.token_ids] == [20, 21, 22, 23]
            status = controller.status()
            assert (status.ready, status.degraded) == (True, True)
            assert status.detail == "rank 0 is dead: out of memory"
            assert controller.mesh()["ranks"][0]["reason"] == "out of memory"
            asked[1].cancel()

    run(check())


def test_requests_wait_until_a_survivor_has_the_lost_experts() -> None:
    async def check() -> None:
        async with ready(2) as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=2)))
            await ranks.say(FAILED)
            (place,) = ranks.told(messages.Place)
            lost = place.order
            assert lost
            assert all(
                hosts == ([] if expert in lost[layer] else [1])
                for layer, of_layer in place.hosts.items()
                for expert, hosts in enumerate(of_layer)
            )
            assert not controller.status().ready
            assert submits(ranks) == [(0, 1, [])]
            assert f"moemesh_experts_missing {sum(map(len, lost.values()))}.0".encode() in ranks.metrics.render()
            assert controller.mesh()["placement"]["loading"] == {"1": sum(map(len, lost.values()))}
            await ranks.say(messages.Hosting(lost), by=Life(1))
            assert ranks.told(messages.Place)[-1].order == {}
            assert all(hosts == [1] for of_layer in ranks.told(messages.Place)[-1].hosts.values() for hosts in of_layer)
            assert submits(ranks)[-1] == (1, 1, [])
            assert controller.status().ready
            assert b"moemesh_experts_missing 0.0" in ranks.metrics.render()
            assert b'moemesh_experts_taken_over_total{rank="1"}' in ranks.metrics.render()
            asked.cancel()

    run(check())


def test_experts_that_cannot_be_loaded_end_requests_and_not_the_mesh() -> None:
    async def check() -> None:
        async with ready(2, respawn=False) as (controller, ranks):
            asked = await started(collect(controller, request()))
            await ranks.say(FAILED)
            order = ranks.told(messages.Place)[-1].order
            await ranks.say(messages.Hosting({}, order, "model.safetensors: is truncated"), by=Life(1))
            with pytest.raises(EngineFailed, match=r"cannot be loaded again: rank 1: model.safetensors: is truncated"):
                await asked
            with pytest.raises(NotReady, match="is truncated"):
                await collect(controller, request())
            status = controller.status()
            assert (status.state, status.ready, status.degraded) == ("ready", False, True)
            assert "is truncated" in status.detail
            assert controller.mesh()["placement"]["problems"] == {"1": "model.safetensors: is truncated"}
            assert b'moemesh_experts_refused_total{rank="1"}' in ranks.metrics.render()
            await ranks.say(messages.Hosting(order), by=Life(1))
            assert controller.status().ready

    run(check())


def test_views_are_published_to_who_lives() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (_, ranks):
            await ranks.say(FAILED)
            last = [(life, message) for life, message in ranks.sent if isinstance(message, messages.View)][-2:]
            assert [life for life, _ in last] == [Life(1), Life(2)]
            view = last[0][1]
            assert view.states == ["dead", "up", "up"]
            assert [(group.generation, group.members) for group in view.groups] == [(1, []), (0, [1])]
            epochs = [message.epoch for life, message in ranks.sent if isinstance(message, messages.View)]
            assert epochs == sorted(epochs)

    run(check())


def test_a_wrong_replay_is_counted_and_never_sent() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=3)))
            await ranks.say(tokens(1, 2, 20, 21))
            await ranks.say(FAILED)
            await ranks.say(tokens(1, 2, 20, 66, 22, finish_reason="length"), by=Life(1))
            assert [token for output in await asked for token in output.token_ids] == [20, 21, 22]
            assert b"moemesh_replay_mismatch_total 1.0" in ranks.metrics.render()
            assert b"moemesh_request_restarts_total 1.0" in ranks.metrics.render()

    run(check())


def test_a_request_that_seems_to_kill_its_ranks_ends() -> None:
    async def check() -> None:
        async with ready(5, attention_ranks=4, clock=seconds_pass()) as (controller, ranks):
            asked = await started(collect(controller, request()))
            for rank in range(3):
                assert submits(ranks)[-1][0] == rank
                await ranks.say(messages.Failed(rank=rank, error="boom"))
            with pytest.raises(EngineFailed, match=r"each of the last 3 failures: rank 2: boom"):
                await asked
            assert controller.status().ready, "it serves the others"

    run(check())


def test_a_stream_that_is_complete_hears_of_no_failure() -> None:
    async def check() -> None:
        async with ready(2, attention_ranks=1, respawn=False) as (controller, ranks):
            stream = controller.generate(request(max_tokens=1))
            asked = await started(anext(stream))
            await ranks.say(tokens(1, 2, 20, finish_reason="length"))
            assert (await asked).finish_reason == "length"
            await ranks.say(FAILED)
            assert controller.failure is not None
            assert [output async for output in stream] == []

    run(check())


def test_a_token_in_between_shows_that_a_request_is_harmless() -> None:
    async def check() -> None:
        async with ready(5, attention_ranks=4) as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=9)))
            for rank in range(3):
                await ranks.say(tokens(1, 2 + rank, 20 + rank), by=Life(rank))
                await ranks.say(messages.Failed(rank=rank, error="boom"))
            assert submits(ranks)[-1] == (3, 1, [20, 21, 22])
            asked.cancel()

    run(check())


def test_a_rank_that_mpi_says_has_failed() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (controller, ranks):
            await ranks.say(messages.PeerReport(peer=0, incarnation=3, evidence="failed"), by=Life(2))
            await ranks.say(messages.PeerReport(peer=0, incarnation=0, evidence="late"), by=Life(2))
            assert controller.mesh()["ranks"][0]["state"] == "suspect"
            await ranks.say(messages.PeerReport(peer=0, incarnation=0, evidence="failed"), by=Life(2))
            assert controller.mesh()["ranks"][0]["state"] == "dead"

    run(check())


def test_the_last_groups_requests_end_with_it() -> None:
    async def check() -> None:
        async with ready(2, attention_ranks=1, respawn=False) as (controller, ranks):
            asked = await started(collect(controller, request()))
            await ranks.say(FAILED)
            with pytest.raises(EngineFailed, match="rank 0, with the last attention group: out of memory"):
                await asked

    run(check())


def test_the_only_rank_begins_another_life_and_its_requests_with_it() -> None:
    async def check() -> None:
        async with ready(1, host=socket.gethostname(), pid=os.getpid(), restarts=True) as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=3)))
            waiting = await started(collect(controller, request(max_tokens=1)))
            await ranks.say(tokens(1, 2, 20))
            assert controller.may_restart
            assert await controller.next_start("the rank process was ended by SIGKILL") == 1
            assert not controller.status().ready
            assert "cannot serve: rank 0 is joining" in controller.status().detail
            await ranks.say(tokens(1, 3, 77), by=Life(0))
            await ranks.say(messages.Ready(rank=0, num_blocks=4), by=Life(0, 1))
            assert submits(ranks)[2:] == [(0, 1, [20]), (0, 2, [])]
            # The same process may have gone on for a while with what it had, past tokens that nobody has heard.
            await ranks.say(tokens(1, 4, 22), by=Life(0, 1))
            await ranks.say(tokens(1, 3, 21, 22, generation=2, finish_reason="length"), by=Life(0, 1))
            assert [token for output in await asked for token in output.token_ids] == [20, 21, 22]
            waiting.cancel()

    run(check())


def test_who_waits_too_long_is_turned_away() -> None:
    async def check() -> None:
        async with ready(queue_timeout=0.0) as (controller, ranks):
            ranks.full = True
            asked = await started(collect(controller, request()))
            with pytest.raises(Overloaded, match="waited for too long"):
                await asked

    run(check())


def test_hearts_are_answered_and_who_was_given_up_is_readmitted() -> None:
    async def check() -> None:
        impatient = {"suspect_after": 0.0, "silent_dead": 0.0, "doubt": 0.0}
        async with ready(1, **impatient) as (controller, ranks):
            while controller.mesh()["ranks"][0]["state"] != "dead":
                await asyncio.sleep(0)
            await ranks.say(messages.Heartbeat(progress=1, working=False), by=Life(0))
            assert (Life(0), messages.Heard()) in ranks.sent
            assert (Life(0), messages.Readmit(incarnation=1)) in ranks.sent
            await ranks.say(messages.Ready(rank=0, num_blocks=4), by=Life(0, 1))
            assert controller.mesh()["ranks"][0]["state"] == "up"
            assert controller.mesh()["ranks"][0]["incarnation"] == 1

    run(check())


@pytest.mark.parametrize(("pause", "answers"), [(0.0, 3), (math.inf, 1)])
def test_a_heart_that_beats_often_is_answered_now_and_then(
    monkeypatch: pytest.MonkeyPatch, pause: float, answers: int
) -> None:
    monkeypatch.setattr(mesh_control, "HEARD_SECONDS", pause)

    async def check() -> None:
        async with ready() as (_, ranks):
            await ranks.say(*[messages.Heartbeat(progress=beat, working=True) for beat in range(3)])
            assert ranks.sent.count((Life(0), messages.Heard())) == answers

    run(check())


def regroups(ranks: FakeRanks) -> list[tuple[int, int, list[tuple[int, list[int]]]]]:
    """(rank, generation, [(request, tokens so far)]) of what leaders were told."""
    sent = [(life.rank, message) for life, message in ranks.sent if isinstance(message, messages.Regroup)]
    return [(rank, told.generation, [(s.request_id, s.generated) for s in told.sequences]) for rank, told in sent]


def test_the_rest_of_a_group_goes_on_with_its_requests() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2, attention_tp=2) as (controller, ranks):
            asked = [await started(collect(controller, request(max_tokens=4))) for _ in range(2)]
            await ranks.say(tokens(1, 2, 20, 21), by=Life(0))
            await ranks.say(FAILED)
            assert regroups(ranks) == [(1, 1, [(1, [20, 21]), (2, [])])]
            assert len(submits(ranks)) == 2
            order = [type(message) for life, message in ranks.sent if life == Life(1)]
            assert order.index(messages.Regroup) > order.index(messages.View), "it knows its generation"
            late = tokens(1, 2, 30), tokens(1, 3, 21, 22, generation=1)
            await ranks.say(*late, tokens(1, 5, 23, finish_reason="length", generation=1), by=Life(1))
            assert [token for output in await asked[0] for token in output.token_ids] == [20, 21, 22, 23]
            asked[1].cancel()
            await asyncio.wait(asked)
            assert (Life(1), messages.Cancel(request_id=2)) in ranks.sent

    run(check())


def test_a_leader_that_cannot_be_told_is_told_later_and_gets_nothing_else() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2, attention_tp=2) as (controller, ranks):
            asked = [await started(collect(controller, request(max_tokens=4)))]
            ranks.full = True
            await ranks.say(FAILED)
            asked.append(await started(collect(controller, request(max_tokens=4))))
            assert not regroups(ranks)
            ranks.full = False
            while not regroups(ranks):
                await asyncio.sleep(0)
            assert regroups(ranks) == [(1, 1, [(1, [])])]
            assert submits(ranks)[1:] == [(1, 2, [])]
            for one in asked:
                one.cancel()

    run(check())


def test_a_request_that_seems_to_kill_one_member_after_the_other_ends() -> None:
    async def check() -> None:
        async with ready(5, attention_ranks=4, attention_tp=4, clock=seconds_pass()) as (controller, ranks):
            asked = await started(collect(controller, request()))
            for rank in range(3):
                await ranks.say(messages.Failed(rank=rank, error="boom"))
            with pytest.raises(EngineFailed, match=r"each of the last 3 failures: rank 2: boom"):
                await asked
            assert regroups(ranks)[-1] == (3, 3, [])

    run(check())


def test_ranks_that_go_almost_together_are_no_sign_of_a_request_that_kills() -> None:
    async def check() -> None:
        now = 100.0
        async with ready(5, attention_ranks=4, attention_tp=4, clock=lambda: now) as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=1)))
            for rank in range(3):
                await ranks.say(messages.Failed(rank=rank, error="boom"))
                now += 0.1
            await ranks.say(tokens(1, 2, 20, generation=3, finish_reason="length"), by=Life(3))
            assert [token for output in await asked for token in output.token_ids] == [20]

    run(check())


def test_a_survivor_is_told_to_start_a_lost_rank_again() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (controller, ranks):
            await ranks.say(messages.Started(pid=1, host="elsewhere"), by=Life(0))
            await ranks.say(FAILED)
            controller._control.tell(ProcessEnded(Life(0)))
            controller._control.tell(Tick())
            orders = [(life, message) for life, message in ranks.sent if isinstance(message, messages.Respawn)]
            assert orders == [(Life(1), messages.Respawn(rank=0, incarnation=1, local_rank=0, ranks_on_host=3))]
            assert b'moemesh_rank_respawns_total{rank="0"} 1.0' in ranks.metrics.render()
            await ranks.say(messages.NotSpawned(rank=0, incarnation=1, error="no slots"), by=Life(1))
            assert controller.mesh()["ranks"][0]["reason"] == "cannot respawn: no slots"

    run(check())


def test_a_newcomer_is_told_who_is_there_before_what_to_load() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (controller, ranks):
            await ranks.say(FAILED)
            controller._control.tell(ProcessEnded(Life(0)))
            controller._control.tell(Tick())
            before = len(ranks.sent)
            await ranks.say(replace(hello(0), incarnation=1), by=Life(0, 1))
            told = [message for life, message in ranks.sent[before:] if life == Life(0, 1)]
            assert [type(message) for message in told] == [messages.View, messages.Start]
            view = told[0]
            assert (view.born, view.states) == ([1, 0, 0], ["joining", "up", "up"])
            others = [life for life, message in ranks.sent[before:] if message == view]
            assert sorted(others) == [Life(0, 1), Life(1), Life(2)]

    run(check())


def test_a_process_that_came_too_late_is_killed() -> None:
    async def check() -> None:
        async with ready(3, attention_ranks=2) as (_, ranks):
            stray = await asyncio.create_subprocess_exec("sleep", "600")
            await ranks.say(messages.Started(pid=stray.pid, host=socket.gethostname()), by=Life(0, 5))
            assert await asyncio.wait_for(stray.wait(), 30) == -signal.SIGKILL

    run(check())
