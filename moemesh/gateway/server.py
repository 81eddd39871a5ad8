"""Serving the application on sockets that listen already (see `moemesh.port.listen`)."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

# How long open connections may go on once serving ends: draining is over by then.
_SHUTDOWN_S = 2.0


@asynccontextmanager
async def run_gateway(
    app: web.Application, sockets: Sequence[socket.socket], *, access_log: logging.Logger | None = None
) -> AsyncIterator[None]:
    """Serves on `sockets` while the block is open and closes them with it.

    Leaving the block closes the port at once and cancels what is still being answered after two seconds.
    """
    # Without handler_cancellation a request would be computed to its end for a client that has left.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=access_log, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        for bound in sockets:
            await web.SockSite(runner, bound).start()
        yield
    finally:
        await runner.cleanup()
