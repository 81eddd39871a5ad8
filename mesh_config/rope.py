"""Rotary position embedding: its parameters and its frequencies, plain and YaRN.

Source: YaRN (arXiv 2309.00071) as `transformers.modeling_rope_utils._compute_yarn_parameters` computes it. Every step
is rounded to float32 where transformers holds a float32 tensor, so that the frequencies agree with its to the last bit
or two: an angle is position times frequency, and an error in the frequency grows with the position.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN's parameters; `factor` is resolved, None elsewhere means "not given"."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Base wavelength, and YaRN's parameters where the context was extended."""

    theta: float
    yarn: YarnConfig | None = None


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature for a context extended `factor` times."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(rope: RopeConfig, rope_dim: int) -> tuple[tuple[float, ...], float]:
    """(rope_dim / 2 inverse frequencies in radians per position, the factor on cos and sin)."""
    wavelengths = [_float32(rope.theta ** _float32(i / rope_dim)) for i in range(0, rope_dim, 2)]
    if rope.yarn is None:
        return tuple(_float32(1.0 / w) for w in wavelengths), 1.0
    return _yarn_frequencies(rope.theta, rope.yarn, wavelengths), _attention_factor(rope.yarn)


def _attention_factor(yarn: YarnConfig) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor)


def _yarn_frequencies(theta: float, yarn: YarnConfig, wavelengths: list[float]) -> tuple[float, ...]:
    low, high = _correction_range(theta, yarn, 2 * len(wavelengths))
    if low == high:
        high += 0.001
    frequencies = []
    for i, wavelength in enumerate(wavelengths):
        ramp = _float32(_float32(i - _float32(low)) / _float32(high - low))
        kept = _float32(1.0 - min(max(ramp, 0.0), 1.0))
        extrapolated = _float32(1.0 / wavelength)
        interpolated = _float32(1.0 / _float32(yarn.factor * wavelength))
        mixed = _float32(interpolated * _float32(1.0 - kept)) + _float32(extrapolated * kept)
        frequencies.append(_float32(mixed))
    return tuple(frequencies)


def _correction_range(theta: float, yarn: YarnConfig, dim: int) -> tuple[float, float]:
    def dimension(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
