"""What operators and clients ask about the server: models, health, version, mesh, metrics."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from aiohttp import web

from moemesh.gateway.errors import ApiError
from moemesh.gateway.service import GATEWAY, Gateway, unknown_model
from moemesh.metrics import CONTENT_TYPE


async def list_models(request: web.Request) -> web.Response:
    """The names under which the model is served."""
    gateway = request.app[GATEWAY]
    models = [_model(gateway, name) for name in gateway.options.served_model_names]
    return web.json_response({"object": "list", "data": models})


async def show_model(request: web.Request) -> web.Response:
    """One of them."""
    gateway = request.app[GATEWAY]
    name = request.match_info["model"]
    if name not in gateway.options.served_model_names:
        raise unknown_model(name, gateway.options.served_model_names)
    return web.json_response(_model(gateway, name))


def _model(gateway: Gateway, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": gateway.started,
        "owned_by": "moemesh",
        "root": gateway.options.served_model_names[0],
        "parent": None,
        "max_model_len": gateway.engine.max_model_len,
    }


async def health(request: web.Request) -> web.Response:
    """200 while requests are served, on a degraded mesh too, which the body says; else 503."""
    status = request.app[GATEWAY].engine.status()
    body: dict[str, Any] = {
        "status": "ok" if status.ready else "unavailable",
        "state": status.state,
        "degraded": status.degraded,
        "detail": status.detail,
    }
    if status.ready:
        return web.json_response(body)
    error = ApiError(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {status.detail or status.state}", code="not_ready")
    return web.json_response(body | error.body(), status=error.status, headers={"Retry-After": "1"})


async def live(request: web.Request) -> web.Response:
    """200 as long as the process can answer at all."""
    return web.json_response({"status": "ok"})


async def version(request: web.Request) -> web.Response:
    """The version of the server."""
    return web.json_response({"version": request.app[GATEWAY].options.version})


async def mesh(request: web.Request) -> web.Response:
    """Ranks, their state and what they host."""
    return web.json_response(request.app[GATEWAY].engine.mesh())


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    return web.Response(body=request.app[GATEWAY].metrics.render(), headers={"Content-Type": CONTENT_TYPE})
