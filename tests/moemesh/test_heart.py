"""A rank's heart: it beats whatever the engine does, and knows whether the frontend hears it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from moemesh.heart import LEASE_SECONDS, Heart, StillHeart
from transport.control import ControlClient, ControlServer
from transport.life import Life
from transport.messages import Heard, Heartbeat


def test_it_beats_for_each_life_until_it_is_stopped(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    async def check() -> None:
        server = ControlServer(f"ipc://{tmp_path}/control")
        heart = Heart(lambda life: ControlClient(server.endpoint, life, channel="heart"), Life(1))
        heart.start()
        assert await server.receive() == (Life(1), Heartbeat(0, False))
        heart.pulse.progress, heart.pulse.working = 7, True
        server.send(Life(1), Heard(), "heart")
        while await server.receive() != (Life(1), Heartbeat(7, True)):
            pass
        heart.begin_life(Life(1, 1))
        while (await server.receive())[0] != Life(1, 1):
            pass
        heart.stop()
        server.close()

    asyncio.run(asyncio.wait_for(check(), 30))


def test_the_lease_ends_when_the_frontend_is_silent() -> None:
    now = [100.0]

    def never(life: Life) -> ControlClient:
        raise AssertionError("it has not been started")

    heart = Heart(never, Life(0), clock=lambda: now[0])
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
