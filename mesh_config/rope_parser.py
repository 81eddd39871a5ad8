"""Both spellings of RoPE in a config.json: `rope_scaling` beside `rope_theta`, and the newer `rope_parameters`."""

from __future__ import annotations

from mesh_config.fields import Fields
from mesh_config.rope import RopeConfig, YarnConfig

_ROPE_KEYS = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_YARN_KEYS = _ROPE_KEYS | {
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
}


def parse_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """The RopeConfig of a config.json. Precedence as in transformers: `rope_scaling` over `rope_parameters`, the base
    wavelength inside them over the one beside them, `original_max_position_embeddings` the other way round."""
    section = fields.section("rope_scaling") or fields.section("rope_parameters")
    if section is None:
        return RopeConfig(theta=_theta(fields, 10_000.0))
    beside = _theta(fields, 10_000.0) if fields.raw("rope_theta") is not None else 10_000.0
    theta = _theta(section, beside) if section.raw("rope_theta") is not None else beside
    if section.raw("partial_rotary_factor") not in (None, 1, 1.0):
        raise section.error("partial_rotary_factor", "supported here: 1")
    type_name = "rope_type" if section.has("rope_type") else "type"
    kind = section.raw(type_name) or "default"
    if kind not in ("default", "yarn"):
        raise section.error(type_name, "supported here: default, yarn")
    known = _YARN_KEYS if kind == "yarn" else _ROPE_KEYS
    for name in sorted(section.names() - known):
        raise section.error(name, f"rope type {kind} has no such field")
    yarn = _parse_yarn(section, fields, max_position_embeddings) if kind == "yarn" else None
    if yarn is not None and theta <= 1:
        raise section.error("rope_theta", "YaRN needs a base above 1")
    return RopeConfig(theta=theta, yarn=yarn)


def _theta(fields: Fields, default: float) -> float:
    theta = fields.number("rope_theta", default)
    if theta <= 0:
        raise fields.error("rope_theta", "a number above 0 is required")
    return theta


def _parse_yarn(section: Fields, fields: Fields, max_position_embeddings: int) -> YarnConfig:
    holder = fields if fields.has("original_max_position_embeddings") else section
    original = holder.integer("original_max_position_embeddings", max_position_embeddings)
    factor = section.optional_number("factor")
    factor = max_position_embeddings / original if factor is None else factor
    if factor <= 0:
        raise section.error("factor", "a number above 0 is required")
    for name in ("beta_fast", "beta_slow"):
        if (section.optional_number(name) or 0) < 0:
            raise section.error(name, "a number above 0 is required")
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=section.optional_number("beta_fast") or 32.0,
        beta_slow=section.optional_number("beta_slow") or 1.0,
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        attention_factor=section.optional_number("attention_factor"),
        truncate=section.flag("truncate", True),
    )
