"""`/openapi.json`, from the table of endpoints and the schemas that check requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from moemesh.gateway.auth import OPEN_PATHS
from moemesh.gateway.json_schema import Schema
from moemesh.gateway.options import GatewayOptions
from moemesh.gateway.request_schemas import RequestSchema

_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One path. `streams`: it may answer with events; `text`: it answers in plain text."""

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    summary: str
    request: RequestSchema | None = None
    streams: bool = False
    text: bool = False


def openapi_document(endpoints: Iterable[Endpoint], options: GatewayOptions) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace("{model:.+}", "{model}")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, options)
    components: dict[str, Any] = {"schemas": {"Error": _ERROR}}
    if options.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "moemesh", "version": options.version},
        "paths": paths,
        "components": components,
    }


def _operation(endpoint: Endpoint, options: GatewayOptions) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain" if endpoint.text else "application/json": {}}
    if endpoint.streams:
        content["text/event-stream"] = {}
    error = {
        "description": "Error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__,
        "responses": {"200": {"description": "OK", "content": content}, "4XX": error, "5XX": error},
    }
    if endpoint.request is not None:
        schema = _nullable_fields(endpoint.request.schema)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model" in endpoint.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if options.api_keys and endpoint.path not in OPEN_PATHS:
        operation["security"] = [{"key": []}]
    return operation


def _nullable_fields(schema: Schema) -> dict[str, Any]:
    """The schema with null for the fields that may be left out, which is what null means in a request."""
    required = schema.get("required", ())
    properties = {}
    for name, field in schema.get("properties", {}).items():
        field = _nullable_fields(field)
        properties[name] = field if name in required else {"anyOf": [field, {"type": "null"}]}
    result = dict(schema)
    if properties:
        result["properties"] = properties
    if "items" in schema:
        result["items"] = _nullable_fields(schema["items"])
    if "anyOf" in schema:
        result["anyOf"] = [_nullable_fields(one) for one in schema["anyOf"]]
    return result
