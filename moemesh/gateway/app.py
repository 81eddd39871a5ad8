"""The web application: its endpoints, and what stands before all of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from aiohttp import web

from moemesh.chat_template import ChatTemplate
from moemesh.engine_client import EngineClient
from moemesh.gateway.auth import Handler, auth_middleware
from moemesh.gateway.chat import chat_completions
from moemesh.gateway.completions import completions
from moemesh.gateway.errors import from_http_exception, is_expected, to_api_error
from moemesh.gateway.openapi import Endpoint, openapi_document
from moemesh.gateway.operations import health, list_models, live, mesh, metrics, show_model, version
from moemesh.gateway.options import GatewayOptions
from moemesh.gateway.request_schemas import (
    chat_request,
    completion_request,
    detokenize_request,
    tokenize_request,
)
from moemesh.gateway.service import GATEWAY, Gateway
from moemesh.gateway.text_endpoints import detokenize, tokenize, tokenizer_info
from moemesh.metrics import Metrics
from moemesh.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def create_app(
    engine: EngineClient,
    options: GatewayOptions,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    metrics: Metrics,
) -> web.Application:
    """The gateway over an engine. Serve it with `run_gateway`, which cancels the requests of clients that leave.

    Without a tokenizer only prompts of token ids are served, and texts in answers are empty.
    """
    app = web.Application(
        client_max_size=options.max_body_bytes,
        middlewares=[_answer_errors, auth_middleware(options.api_keys)],
    )
    app[GATEWAY] = Gateway(engine, options, tokenizer, template, metrics)
    app.cleanup_ctx.append(_gateway_threads)
    app.on_response_prepare.append(_name_server)
    endpoints = _endpoints(options)
    document = openapi_document(endpoints, options)

    async def openapi(request: web.Request) -> web.Response:
        return web.json_response(document)

    app.router.add_get("/openapi.json", openapi)
    for endpoint in endpoints:
        if endpoint.method == "GET":
            app.router.add_get(endpoint.path, endpoint.handler)
        else:
            app.router.add_post(endpoint.path, endpoint.handler)
    return app


def _endpoints(options: GatewayOptions) -> tuple[Endpoint, ...]:
    def get(path: str, handler: Handler, summary: str, *, text: bool = False) -> Endpoint:
        return Endpoint(method="GET", path=path, handler=handler, summary=summary, text=text)

    limits = options.limits
    return (
        Endpoint(
            method="POST",
            path="/v1/completions",
            handler=completions,
            summary="Continue prompts",
            request=completion_request(limits),
            streams=True,
        ),
        Endpoint(
            method="POST",
            path="/v1/chat/completions",
            handler=chat_completions,
            summary="Answer a conversation",
            request=chat_request(limits),
            streams=True,
        ),
        Endpoint(
            method="POST",
            path="/tokenize",
            handler=tokenize,
            summary="Token ids of a prompt or a conversation",
            request=tokenize_request(limits),
        ),
        Endpoint(
            method="POST",
            path="/detokenize",
            handler=detokenize,
            summary="Text of token ids",
            request=detokenize_request(),
        ),
        get("/v1/models", list_models, "Models served"),
        get("/v1/models/{model:.+}", show_model, "One model"),
        get("/tokenizer_info", tokenizer_info, "The tokenizer's configuration"),
        get("/health", health, "Whether requests are served"),
        get("/live", live, "Whether the process answers"),
        get("/mesh", mesh, "Ranks, their state and what they host"),
        get("/metrics", metrics, "Prometheus metrics", text=True),
        get("/version", version, "The server's version"),
    )


async def _gateway_threads(app: web.Application) -> AsyncIterator[None]:
    yield
    app[GATEWAY].close()


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    """In place of aiohttp's own header, which gives the versions of Python and of itself to everybody."""
    response.headers["Server"] = "moemesh"


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every exception into an answer in OpenAI's shape, and counts the answers."""
    gateway = request.app[GATEWAY]
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = from_http_exception(
            error, method=request.method, path=request.path, max_body_bytes=gateway.options.max_body_bytes
        ).response()
    except ConnectionError:
        # The client is gone, nobody reads the answer; 499 is what proxies log then.
        response = web.Response(status=499)
    except Exception as error:
        if not is_expected(error):
            _log.exception("%r %r failed", request.method, request.path)
        response = to_api_error(error).response()
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "other"
    gateway.metrics.http_requests.labels(path, _method_label(request.method), str(response.status)).inc()
    return response


def _method_label(method: str) -> str:
    """Clients may invent methods; series may not."""
    return method if method in ("GET", "HEAD", "POST") else "other"
