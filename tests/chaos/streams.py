"""Clients that stream requests over HTTP, on an event loop in a thread of its own, and note when each token came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.chaos.history import Ending, Stream, read_stream

SILENCE_SECONDS = 30.0  # a stream that is still this long is taken for dead
TICK_SECONDS = 0.02
LONGEST_LINE = 1 << 20
MOST_PATIENCE = 1.0  # seconds that a refused client waits, whatever Retry-After says


@dataclass(kw_only=True)
class _Recording:
    """What has come of one stream; read when all is over, so that reading delays nobody's clock."""

    client: int
    kind: int
    sent: float
    lines: list[tuple[float, bytes]] = field(default_factory=list)
    cut: Ending | None = None
    detail: str = ""
    retry_after: float | None = None
    ended: float = 0.0

    def read(self) -> Stream:
        return read_stream(
            self.lines,
            cut=self.cut,
            detail=self.detail,
            client=self.client,
            kind=self.kind,
            sent=self.sent,
            ended=self.ended,
            retry_after=self.retry_after,
        )


class Clients:
    """`num_clients` clients, each sending its own of `requests` over and over (`rounds` times, or until `finish`).

    A client whose stream fails stops; one that is refused tries again a little later. A context manager: leaving it
    drops what still runs.
    """

    def __init__(
        self,
        url: str,
        requests: Sequence[Mapping[str, Any]],
        *,
        num_clients: int | None = None,
        rounds: int | None = None,
        silence_s: float = SILENCE_SECONDS,
    ) -> None:
        self._url = f"{url}/v1/completions"
        self._requests = requests
        self._num_clients = num_clients or len(requests)
        self._rounds = rounds
        self._silence_s = silence_s
        self._recordings: list[_Recording] = []
        self._received: Counter[int] = Counter()
        self._active = self._num_clients
        self.lateness = 0.0
        self._loop = asyncio.new_event_loop()
        self._finishing = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="clients")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        self._thread.join()

    def all_stopped(self) -> bool:
        """Whether nobody streams any more."""
        return self._active == 0

    def snapshot(self) -> list[int]:
        """Events received so far, by client."""
        return [self._received[client] for client in range(self._num_clients)]

    def drain(self, timeout_s: float) -> None:
        """Begin no new request and wait for those that run."""
        with contextlib.suppress(RuntimeError):  # all clients have stopped, and their loop with them
            self._loop.call_soon_threadsafe(self._finishing.set)
        self._thread.join(timeout_s)

    def finish(self, timeout_s: float) -> list[Stream]:
        """Drain, drop what still runs, and give all streams in the order in which they were sent."""
        self.drain(timeout_s)
        self._drop()
        self._thread.join()
        return [recording.read() for recording in sorted(self._recordings, key=lambda one: one.sent)]

    def _drop(self) -> None:
        def cancel() -> None:
            if self._main is not None:
                self._main.cancel()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(cancel)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._main = self._loop.create_task(self._all())
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._main)

    async def _all(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=LONGEST_LINE) as session,
            asyncio.TaskGroup() as group,
        ):
            ticker = group.create_task(self._tick())
            await asyncio.wait([group.create_task(self._client(session, one)) for one in range(self._num_clients)])
            ticker.cancel()

    async def _tick(self) -> None:
        """How late this very loop runs: what it sees of a token's time is no better."""
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(TICK_SECONDS)
            self.lateness = max(self.lateness, loop.time() - before - TICK_SECONDS)

    async def _client(self, session: aiohttp.ClientSession, client: int) -> None:
        kind = client % len(self._requests)
        sent = 0
        try:
            while not self._finishing.is_set() if self._rounds is None else sent < self._rounds:
                recording = await self._stream(session, client, kind)
                sent += 1
                if recording.cut == "refused":
                    await self._wait_a_little(recording.retry_after)
                elif not recording.lines or recording.lines[-1][1] != b"[DONE]":
                    return
        finally:
            self._active -= 1

    async def _wait_a_little(self, retry_after: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(retry_after or MOST_PATIENCE, MOST_PATIENCE)):
                await self._finishing.wait()

    async def _stream(self, session: aiohttp.ClientSession, client: int, kind: int) -> _Recording:
        recording = _Recording(client=client, kind=kind, sent=time.monotonic(), cut="left")
        self._recordings.append(recording)
        try:
            async with session.post(self._url, json={"stream": True, **self._requests[kind]}) as response:
                if response.status != 200:
                    await _read_refusal(recording, response)
                else:
                    async for data in self._events(response):
                        recording.lines.append((time.monotonic(), data))
                        self._received[client] += 1
                    recording.cut, recording.detail = "cut", "it ended without [DONE]"
        except TimeoutError:
            recording.cut, recording.detail = "silent", f"nothing for {self._silence_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            recording.cut, recording.detail = "cut", f"{type(error).__name__}: {error}"
        finally:
            recording.ended = time.monotonic()
        return recording

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The data of each event; TimeoutError when none comes for too long (comments that keep alive do not count)."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._silence_s) as limit:
            async for line in response.content:
                if line.startswith(b"data: "):
                    limit.reschedule(loop.time() + self._silence_s)
                    yield line.removeprefix(b"data: ").strip()


async def _read_refusal(recording: _Recording, response: aiohttp.ClientResponse) -> None:
    text = await response.text()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    recording.cut = "refused" if response.status == 503 else "error"
    recording.detail = f"{response.status}: {text}"
    given = response.headers.get("Retry-After")
    recording.retry_after = float(given) if given is not None else None
