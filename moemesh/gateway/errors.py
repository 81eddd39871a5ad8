"""Every error as OpenAI shapes it, and the one table from exceptions to HTTP status and metric label."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from moemesh.chat_template import ChatTemplateError
from moemesh.engine_client import EngineFailed, InvalidRequest, NotReady, Overloaded, RequestError
from moemesh.sampling_params import SamplingParamsError
from moemesh.tokenizer import TokenizerError

_INVALID = "invalid_request_error"


class ApiError(Exception):
    """An answer that is an error. `message` goes to the client as it is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for whose fault it is."""
        if self.status < 500:
            return _INVALID
        return "overloaded_error" if self.status == HTTPStatus.SERVICE_UNAVAILABLE else "server_error"

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        return web.json_response(self.body(), status=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """A 400 for the field `param`."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


@dataclass(frozen=True)
class _Row:
    error: type[Exception]
    status: HTTPStatus
    code: str | None
    outcome: str


# The first row whose class matches counts. Their messages are written for clients; any other exception's is not.
_TABLE: Final = (
    _Row(InvalidRequest, HTTPStatus.BAD_REQUEST, "invalid_request", "invalid"),
    _Row(SamplingParamsError, HTTPStatus.BAD_REQUEST, None, "invalid"),
    _Row(TokenizerError, HTTPStatus.BAD_REQUEST, None, "invalid"),
    _Row(ChatTemplateError, HTTPStatus.BAD_REQUEST, None, "invalid"),
    _Row(Overloaded, HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "overloaded"),
    _Row(NotReady, HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", "not_ready"),
    _Row(EngineFailed, HTTPStatus.INTERNAL_SERVER_ERROR, "engine_failed", "failed"),
    _Row(RequestError, HTTPStatus.INTERNAL_SERVER_ERROR, "engine_failed", "failed"),
)
_PARAM_OF: Final[Mapping[type[Exception], str]] = {TokenizerError: "prompt", ChatTemplateError: "messages"}


def to_api_error(error: Exception) -> ApiError:
    """The answer for an exception. One that is not in the table is a fault of ours: its text stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RecursionError):
        return bad_request("the request is nested too deeply")
    for row in _TABLE:
        if isinstance(error, row.error):
            param = getattr(error, "param", None) or _PARAM_OF.get(row.error)
            return ApiError(row.status, str(error), param=param, code=row.code, headers=_retry_header(error))
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log has the details", code="internal_error"
    )


def is_expected(error: Exception) -> bool:
    """Whether the table knows the error: all others belong in the log, with their traceback."""
    return isinstance(error, (ApiError, RecursionError, *(row.error for row in _TABLE)))


def outcome_of(error: Exception) -> str:
    """The metric label of a request that ended so."""
    return next((row.outcome for row in _TABLE if isinstance(error, row.error)), "failed")


def _retry_header(error: Exception) -> dict[str, str]:
    """Whole seconds, rounded up, at least 1: what the Retry-After header can say."""
    if not isinstance(error, Overloaded | NotReady):
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}


def from_http_exception(error: web.HTTPException, *, method: str, path: str, max_body_bytes: int) -> ApiError:
    """aiohttp's own refusals (no such path, wrong method, body too large) in OpenAI's shape."""
    if error.status == HTTPStatus.NOT_FOUND:
        return ApiError(404, f"there is no {path[:200]} here; /openapi.json lists what there is", code="unknown_url")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ApiError(
            405,
            f"{path[:200]} does not take {method[:40]}, it takes {allowed}",
            code="method_not_allowed",
            headers={"Allow": allowed},
        )
    if error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return ApiError(
            413,
            f"the request is larger than the {max_body_bytes} bytes allowed: send fewer or shorter prompts at once",
            code="request_too_large",
        )
    return ApiError(error.status, error.reason or HTTPStatus(error.status).phrase)
