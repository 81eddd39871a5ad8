"""The part of JSON Schema that requests need: the same schemas check requests and make up `/openapi.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moemesh.gateway.errors import ApiError, bad_request

Schema = Mapping[str, Any]

_TYPE_NAMES = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "an array",
    "object": "an object",
}


def validated(value: Any, schema: Schema, path: str, *, skip: Collection[str] = ()) -> Any:
    """The value as the schema has it (2.0 where an integer is wanted becomes 2), or ApiError 400 naming the path.

    `skip` names fields of the top level that the caller checks itself.
    """
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], path)
    if schema["type"] == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _TYPE_CHECKS[schema["type"]](value):
        raise bad_request(f"{path or 'the request'} must be {_TYPE_NAMES[schema['type']]}, not {shown(value)}", path)
    if "enum" in schema and value not in schema["enum"]:
        choices = ", ".join(shown(choice) for choice in schema["enum"])
        raise bad_request(f"{path} must be one of {choices}, not {shown(value)}", path)
    if isinstance(value, str):
        _check_size(len(value), schema, path, ("minLength", "maxLength"), "characters")
    elif isinstance(value, list):
        _check_size(len(value), schema, path, ("minItems", "maxItems"), "entries")
        return [validated(item, schema["items"], f"{path}[{index}]") for index, item in enumerate(value)]
    elif isinstance(value, dict):
        return _validated_object(value, schema, path, skip)
    elif not isinstance(value, bool):
        _check_range(value, schema, path)
    return value


def shown(value: object) -> str:
    """The value as JSON would have it, cut: a megabyte of a client's must not come back in an error."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPE_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": _is_number,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _any_of(value: Any, schemas: list[Schema], path: str) -> Any:
    """The first schema that fits; where none does, the error of the one whose type fits, else all their types."""
    errors = []
    for schema in schemas:
        if _TYPE_CHECKS[schema["type"]](value):
            try:
                return validated(value, schema, path)
            except ApiError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    kinds = " or ".join(_TYPE_NAMES[schema["type"]] for schema in schemas)
    raise bad_request(f"{path} must be {kinds}, not {shown(value)}", path)


def _validated_object(value: dict[str, Any], schema: Schema, path: str, skip: Collection[str]) -> dict[str, Any]:
    prefix = f"{path}." if path else ""
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", False)
    # A field that is null says the same as one left out.
    value = {name: item for name, item in value.items() if item is not None or name not in properties}
    for name in schema.get("required", ()):
        if name not in value:
            raise bad_request(f"{prefix}{name} is missing", f"{prefix}{name}")
    unknown = [name for name in value if name not in properties]
    if unknown and others is False:
        names = ", ".join(prefix + name[:80] for name in unknown[:10])
        raise bad_request(f"Unrecognized request argument: {names}", prefix + unknown[0][:80], code="unknown_parameter")
    result = {}
    for name, item in value.items():
        item_schema = properties.get(name, others)
        keep = name in skip or item_schema is True
        result[name] = item if keep else validated(item, item_schema, f"{prefix}{name[:80]}")
    return result


def _check_size(size: int, schema: Schema, path: str, names: tuple[str, str], unit: str) -> None:
    low, high = schema.get(names[0], 0), schema.get(names[1], math.inf)
    if size < low:
        raise bad_request(f"{path} must have at least {low} {unit}, not {size}", path)
    if size > high:
        raise bad_request(f"{path} has {size} {unit}, at most {high} are allowed", path)


def _check_range(value: float, schema: Schema, path: str) -> None:
    # 1e999 is valid JSON and reads as infinity.
    if isinstance(value, float) and not math.isfinite(value):
        raise bad_request(f"{path} must be a finite number", path)
    if "minimum" in schema and value < schema["minimum"]:
        raise bad_request(f"{path} must be at least {schema['minimum']}, not {shown(value)}", path)
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        raise bad_request(f"{path} must be above {schema['exclusiveMinimum']}, not {shown(value)}", path)
    if "maximum" in schema and value > schema["maximum"]:
        raise bad_request(f"{path} must be at most {schema['maximum']}, not {shown(value)}", path)
