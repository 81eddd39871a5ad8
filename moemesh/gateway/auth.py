"""API keys: every path asks for one unless it is listed here as open."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from moemesh.gateway.errors import ApiError

# What a supervisor must be able to ask without a secret; neither says anything about the model or its users.
OPEN_PATHS: Final = frozenset({"/live", "/health"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class KeyRing:
    """Keys as digests, so that comparing takes the same time whatever was sent and however long it is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def admits(self, key: str) -> bool:
        """Whether it is one of the keys; all are compared, also after a match."""
        given = _digest(key)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def auth_middleware(keys: Sequence[str]) -> Middleware:
    """Refuses with 401, before anything else is looked at, a request without a valid `Authorization: Bearer KEY`."""
    ring = KeyRing(keys)

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not keys or request.path in OPEN_PATHS:
            return await handler(request)
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not ring.admits(key.strip()):
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "a valid API key is needed: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handler(request)

    return check_key
