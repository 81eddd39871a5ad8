"""From the bytes of a request to a JSON object, or an error that says what is wrong with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

from aiohttp import web

from moemesh.gateway.errors import ApiError, bad_request

_T = TypeVar("_T")
# Smaller bodies parse in less time than a thread takes to wake up.
_INLINE_BYTES = 64 * 1024


async def read_json_object(
    request: web.Request, *, offload: Callable[..., Awaitable[Any]], timeout_s: float
) -> dict[str, Any]:
    """The object in the body. ApiError 400, 408 or 415; a body too large is aiohttp's HTTPRequestEntityTooLarge."""
    if request.content_type != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the body must be application/json, not {request.content_type[:80]}: "
            "send 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(timeout_s):
            data = await request.read()
    except TimeoutError:
        raise ApiError(
            HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive within {timeout_s:g} seconds", code="timeout"
        ) from None
    body = parse_object(data) if len(data) <= _INLINE_BYTES else await offload(parse_object, data)
    assert isinstance(body, dict)
    return body


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes; ApiError 400 for anything else, NaN and unpaired surrogates included."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start} of {len(data)} cannot be read") from error
    except UnicodeEncodeError as error:
        raise bad_request("the body holds an unpaired surrogate escape, which stands for no character") from error
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    except ValueError as error:
        # A number too long to convert: Python's own limit against quadratic conversion.
        raise bad_request("the body holds a number with too many digits") from error
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"the body holds {name}, which is not JSON: send a finite number")
