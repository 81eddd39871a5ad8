"""Server-sent events to one client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

from moemesh.gateway.errors import ApiError

# X-Accel-Buffering: the proxies that know it pass events on at once.
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


# What leaves at once into an empty buffer: half of what asyncio's transports take before they make writers wait.
_LITTLE = 32 * 1024

_encode = json.JSONEncoder(separators=(",", ":")).encode


class EventStream:
    """An answer of many events. Writing waits for a slow client, and gives up on one that takes nothing."""

    def __init__(self, request: web.Request, *, client_timeout_s: float) -> None:
        self._request = request
        self._timeout_s = client_timeout_s
        self.response = web.StreamResponse(headers=_HEADERS)

    async def open(self) -> None:
        await self.response.prepare(self._request)

    async def send(self, payloads: Iterable[Mapping[str, Any]]) -> None:
        """Each payload as one event, all in one write."""
        data = "".join([f"data: {_encode(payload)}\n\n" for payload in payloads])
        if data:
            await self._write(data)

    async def keep_alive(self) -> None:
        """A comment, which clients skip and proxies count as life."""
        await self._write(": keep-alive\n\n")

    async def finish(self) -> None:
        """The end of a whole answer."""
        await self._write("data: [DONE]\n\n")
        await self.response.write_eof()

    async def fail(self, error: ApiError) -> None:
        """The end of an answer that breaks off: the error, and no [DONE]."""
        await self.send([error.body()])
        await self.response.write_eof()

    async def _write(self, text: str) -> None:
        data = text.encode()
        if self._leaves_at_once(data):
            await self.response.write(data)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError(f"the client took nothing for {self._timeout_s:g} seconds") from None

    def _leaves_at_once(self, data: bytes) -> bool:
        """Whether writing does not wait, so that no clock need be set: for a client that keeps up, always."""
        transport = self._request.transport
        return len(data) <= _LITTLE and transport is not None and transport.get_write_buffer_size() == 0
