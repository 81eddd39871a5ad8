"""What the frontend sees of rank processes by itself."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from moemesh.membership_records import ProcessEnded, ProcessSeen
from moemesh.process_watch import ProcessWatch
from transport.life import Life

HERE = socket.gethostname()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "1000"])
    yield started
    started.kill()
    started.wait()


async def ends(queue: asyncio.Queue[ProcessEnded]) -> ProcessEnded:
    async with asyncio.timeout(30):
        return await queue.get()


def test_the_end_of_a_process_is_seen_under_its_last_name(process: subprocess.Popen[bytes]) -> None:
    async def check() -> None:
        queue: asyncio.Queue[ProcessEnded] = asyncio.Queue()
        watch = ProcessWatch(queue.put_nowait)
        watch.watch(Life(3), process.pid, HERE)
        watch.rename(Life(3), Life(3, 1))
        assert watch.look(Life(3)) is None
        watch.kill(Life(3))
        assert watch.look(Life(3, 1)) == ProcessSeen(Life(3, 1), False), "nobody kills a life that is over"
        watch.kill(Life(3, 1))
        assert await ends(queue) == ProcessEnded(Life(3, 1))
        assert watch.look(Life(3, 1)) is None
        watch.close()
        assert queue.empty()

    asyncio.run(check())


def test_a_stopped_process_is_seen_as_such(process: subprocess.Popen[bytes]) -> None:
    async def check() -> None:
        watch = ProcessWatch(lambda ended: None)
        watch.watch(Life(0), process.pid, HERE)
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(30):
            while watch.look(Life(0)) != ProcessSeen(Life(0), True):
                await asyncio.sleep(0)
        watch.close()

    asyncio.run(check())


def test_who_is_gone_already_and_who_is_elsewhere(process: subprocess.Popen[bytes]) -> None:
    async def check() -> None:
        queue: asyncio.Queue[ProcessEnded] = asyncio.Queue()
        watch = ProcessWatch(queue.put_nowait)
        watch.watch(Life(1), process.pid, "another.host")
        assert watch.look(Life(1)) is None
        watch.rename(Life(1), Life(1, 1))
        process.kill()
        process.wait()
        watch.watch(Life(0), process.pid, HERE)
        assert await ends(queue) == ProcessEnded(Life(0))
        watch.close()

    asyncio.run(check())
