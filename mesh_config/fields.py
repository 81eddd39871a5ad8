"""Typed reading of one JSON object: every wrong type is refused by the name of its field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh_config.errors import ConfigError

MISSING = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ConfigError where it cannot be read, is no JSON, or is no object."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


class Fields:
    """One JSON object and where it came from; each getter checks the type and names the field.

    `default` is used where the field is absent. A field that is present but null is returned as None by the
    `optional_` getters and refused by the others: null is not "use the default".
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def has(self, name: str) -> bool:
        return name in self._values

    def names(self) -> frozenset[str]:
        return frozenset(self._values)

    def raw(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def error(self, name: str, supported: str) -> ConfigError:
        """The refusal of a field's value, for the caller to raise."""
        value = self._values.get(name, MISSING)
        shown = "is missing" if value is MISSING else f"is {json.dumps(value, default=str)}"
        return ConfigError(f"{self.source}: {name} {shown}; {supported}")

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.optional_integer(name, default, minimum=minimum)
        if value is None:
            raise self.error(name, f"a whole number of at least {minimum} is required")
        return value

    def optional_integer(self, name: str, default: int | None = None, *, minimum: int = 0) -> int | None:
        value = self._values.get(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"a whole number of at least {minimum} is required")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional_number(name, default)
        if value is None:
            raise self.error(name, "a number is required")
        return value

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        value = self._values.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, "a finite number is required")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false is required")
        return value

    def choice(self, name: str, default: str, supported: tuple[str, ...]) -> str:
        value = self._values.get(name, default)
        if value not in supported:
            raise self.error(name, f"supported here: {', '.join(supported)}")
        return str(value)

    def section(self, name: str) -> Fields | None:
        """The nested object `name`, or None where it is absent, null or empty."""
        value = self._values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "a JSON object is required")
        return Fields(value, f"{self.source}: {name}")
