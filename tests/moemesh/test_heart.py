"""A rank's heart: it beats whatever the engine does, and knows whether the frontend hears it."""

from __future__ import annotations

import asyncio
import queue
from pathlib import Path
from typing import NoReturn

from moemesh.heart import LEASE_SECONDS, Heart, StillHeart
from transport.control import ControlClient, ControlServer
from transport.life import Life
from transport.messages import Heard, Heartbeat, Stop


def test_it_beats_for_each_life_until_it_is_stopped(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    async def check() -> None:
        server = ControlServer(f"ipc://{tmp_path}/control")
        ended: list[str] = []
        heart = Heart(lambda life: ControlClient(server.endpoints[0], life, channel="heart"), Life(1), end=ended.append)
        heart.start()
        assert await server.receive() == (Life(1), Heartbeat(0, False))
        heart.pulse.progress, heart.pulse.working = 7, True
        server.send(Life(1), Heard(), "heart")
        while await server.receive() != (Life(1), Heartbeat(7, True)):
            pass
        heart.begin_life(Life(1, 1))
        while (await server.receive())[0] != Life(1, 1):
            pass
        server.send(Life(1, 1), Stop(), "heart")
        while not ended:
            await server.receive()
        assert ended == ["the frontend has given it up"]
        heart.stop()
        server.close()

    asyncio.run(asyncio.wait_for(check(), 30))


def test_the_lease_ends_when_the_frontend_is_silent() -> None:
    now = [100.0]

    def never(_: object) -> NoReturn:
        raise AssertionError("it has not been started")

    heart = Heart(never, Life(0), end=never, clock=lambda: now[0])
    assert heart.lease_holds()
    now[0] += LEASE_SECONDS
    assert not heart.lease_holds()
    heart.begin_life(Life(0, 1))
    assert heart.lease_holds()


def test_a_still_heart_never_loses_its_lease() -> None:
    heart = StillHeart()
    heart.begin_life(Life(0, 1))
    assert heart.lease_holds()
    heart.stop()


def test_it_ends_the_process_when_the_frontend_stays_away(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    ended: queue.Queue[str] = queue.Queue()
    nobody = f"ipc://{tmp_path}/control"
    heart = Heart(lambda life: ControlClient(nobody, life, channel="heart"), Life(1), end=ended.put, abandoned_s=0.05)
    heart.start()
    assert ended.get(timeout=30) == "the frontend has not been heard for 0.05 s"
    heart.stop()


def test_it_ends_the_process_when_the_frontend_is_gone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    ended: queue.Queue[str] = queue.Queue()
    ticks = iter(range(1000))
    heart = Heart(
        lambda life: ControlClient(f"ipc://{tmp_path}/control", life, channel="heart"),
        Life(1),
        end=ended.put,
        is_gone=lambda: True,
        clock=lambda: next(ticks) * LEASE_SECONDS,
    )
    heart.start()
    assert ended.get(timeout=30) == "the frontend is gone"
    heart.stop()
