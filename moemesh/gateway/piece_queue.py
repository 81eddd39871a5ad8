"""Many choices at once, read as one stream: each is pumped by a task of its own into one bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from moemesh.gateway.choices import Piece

# So many pieces may wait for a slow reader; then the engine's streams are no longer read.
_MAX_WAITING = 64


class PieceQueue:
    """Pieces in the order in which they came. One reader; each token passes here, so waiting is made of one future."""

    def __init__(self, num_choices: int) -> None:
        self._open = num_choices
        self._waiting: deque[Piece] = deque()
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._room = asyncio.Event()

    async def next_pieces(self, timeout_s: float | None = None) -> list[Piece] | None:
        """All pieces that are there, at least one; [] when every choice has ended; None when none came in time.

        Raises what a choice raised, once the pieces before it have been read.
        """
        if not self._waiting and self._error is None and self._open:
            await self._arrival(timeout_s)
        if not self._waiting:
            if self._error is not None:
                raise self._error
            return None if self._open else []
        pieces = list(self._waiting)
        self._waiting.clear()
        self._room.set()
        self._open -= sum(piece.finish_reason is not None for piece in pieces)
        return pieces

    async def put(self, piece: Piece) -> None:
        """Waits while the reader is far behind."""
        while len(self._waiting) >= _MAX_WAITING:
            self._room.clear()
            await self._room.wait()
        self._waiting.append(piece)
        self._wake()

    def fail(self, error: Exception) -> None:
        """No choice goes on: the first error is the reader's to raise."""
        self._error = self._error or error
        self._wake()

    async def _arrival(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._wake)
        try:
            await self._reader
        finally:
            self._reader = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


@asynccontextmanager
async def run_choices(runs: Sequence[AsyncGenerator[Piece, None]]) -> AsyncIterator[PieceQueue]:
    """Runs the choices while the block is open; leaving it, in whatever way, closes those that have not ended."""
    queue = PieceQueue(len(runs))
    failure: Exception | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_pump(run, queue)) for run in runs]
        try:
            yield queue
        except Exception as error:  # kept out of the group, which would wrap it
            failure = error
        finally:
            for task in tasks:
                task.cancel()
    if failure is not None:
        raise failure


async def _pump(run: AsyncGenerator[Piece, None], queue: PieceQueue) -> None:
    try:
        async with aclosing(run):
            async for piece in run:
                await queue.put(piece)
    except Exception as error:  # whatever it is, it is the reader's to raise
        queue.fail(error)
