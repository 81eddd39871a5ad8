"""Many choices at once, read as one stream: each is pumped by a task of its own into one bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from moemesh.gateway.choices import Piece

# So many pieces may wait for a slow reader; then the engine's streams are no longer read.
_MAX_WAITING = 64


class PieceQueue:
    """Pieces in the order in which they came. One reader."""

    def __init__(self, queue: asyncio.Queue[Piece | Exception], num_choices: int) -> None:
        self._queue = queue
        self._open = num_choices
        self._error: Exception | None = None

    async def next_pieces(self, timeout_s: float | None = None) -> list[Piece] | None:
        """All pieces that are there, at least one; [] when every choice has ended; None when none came in time.

        Raises what a choice raised, once the pieces before it have been read.
        """
        if self._error is not None:
            raise self._error
        if self._open == 0:
            return []
        try:
            async with asyncio.timeout(timeout_s):
                item = await self._queue.get()
        except TimeoutError:
            return None
        pieces: list[Piece] = []
        while self._take(item, pieces) and not self._queue.empty():
            item = self._queue.get_nowait()
        if self._error is not None and not pieces:
            raise self._error
        return pieces

    def _take(self, item: Piece | Exception, pieces: list[Piece]) -> bool:
        if isinstance(item, Exception):
            self._error = item
            return False
        pieces.append(item)
        self._open -= item.finish_reason is not None
        return True


@asynccontextmanager
async def run_choices(runs: Sequence[AsyncGenerator[Piece, None]]) -> AsyncIterator[PieceQueue]:
    """Runs the choices while the block is open; leaving it, in whatever way, closes those that have not ended."""
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(_MAX_WAITING)
    failure: Exception | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_pump(run, queue)) for run in runs]
        try:
            yield PieceQueue(queue, len(runs))
        except Exception as error:  # kept out of the group, which would wrap it
            failure = error
        finally:
            for task in tasks:
                task.cancel()
    if failure is not None:
        raise failure


async def _pump(run: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | Exception]) -> None:
    try:
        async with aclosing(run):
            async for piece in run:
                await queue.put(piece)
    except Exception as error:  # whatever it is, it is the reader's to raise
        await queue.put(error)
