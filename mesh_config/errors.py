"""The error every refused configuration raises."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be served: names the field, its value, and what is supported."""
