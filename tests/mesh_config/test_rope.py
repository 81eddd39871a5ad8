"""Frequencies and scales against transformers' ROPE_INIT_FUNCTIONS and attention classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from mesh_config import parse_model_config, rope_frequencies

V3 = {"architectures": ["DeepseekV3ForCausalLM"]}


def assert_as_transformers(values: dict[str, Any]) -> None:
    """Our frequencies, factor and softmax scale of the JSON `values`, and those of transformers."""
    config = parse_model_config(V3 | values)
    oracle: Any = DeepseekV3Config.from_dict(copy.deepcopy(values))  # which it changes
    frequencies, factor = rope_frequencies(config.rope, config.qk_rope_head_dim)
    rotary = DeepseekV3RotaryEmbedding(oracle)
    torch.testing.assert_close(torch.tensor(frequencies), rotary.inv_freq, rtol=6e-7, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    apply_mscale: Callable[[dict[str, Any], float], float] = yarn_apply_mscale
    expected = apply_mscale(oracle.rope_parameters, config.qk_head_dim**-0.5)
    assert config.softmax_scale == pytest.approx(expected, rel=1e-12)
    if config.rope.yarn is not None:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](oracle)
        torch.testing.assert_close(torch.tensor(frequencies), inv_freq, rtol=6e-7, atol=0)
        assert factor == pytest.approx(attention_factor, rel=1e-12)


OLD = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
NEW = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 32.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rope_theta": 1e6, "qk_rope_head_dim": 20},
        {"rope_scaling": None, "rope_theta": 500},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}},
        {"rope_parameters": {"rope_theta": 250000.0}},
        {"rope_scaling": OLD | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
        {"rope_scaling": OLD | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000},
        {"rope_scaling": OLD | {"mscale": 0.707}},
        {"rope_scaling": OLD | {"mscale": 0, "mscale_all_dim": 0}},
        {"rope_scaling": OLD | {"mscale_all_dim": 1.3}},
        {"rope_scaling": OLD | {"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": OLD | {"factor": 0.5}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 2048},
        {"rope_scaling": OLD, "original_max_position_embeddings": 1024},
        {"rope_scaling": OLD | {"rope_theta": 777.0}, "rope_theta": 10000},
        {"rope_scaling": OLD, "rope_parameters": NEW},
        {"rope_parameters": NEW | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_parameters": NEW | {"truncate": False}},
        {"rope_parameters": NEW | {"truncate": False, "beta_fast": 7, "beta_slow": 0.3}, "qk_rope_head_dim": 12},
        {"rope_parameters": NEW | {"type": "default"}},
    ],
)
def test_both_spellings_as_transformers(values: dict[str, Any]) -> None:
    assert_as_transformers(values)


def test_factor_left_out_is_the_ratio_of_the_lengths() -> None:
    yarn = parse_model_config(V3 | {"max_position_embeddings": 8192, "rope_scaling": OLD | {"factor": None}}).rope.yarn
    assert yarn is not None
    assert yarn.factor == 2.0


@given(
    theta=st.sampled_from([100.0, 10000.0, 50000.0, 1e6, 1e7]),
    dim=st.integers(1, 64).map(lambda half: 2 * half),
    factor=st.floats(1.0, 64.0),
    original=st.sampled_from([64, 128, 4096, 32768]),
    fast=st.floats(1.0, 64.0),
    slow=st.floats(0.1, 1.0),
    truncate=st.booleans(),
)
def test_any_yarn_as_transformers(
    theta: float, dim: int, factor: float, original: int, fast: float, slow: float, truncate: bool
) -> None:
    yarn = NEW | {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    yarn |= {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    assert_as_transformers({"rope_parameters": yarn, "qk_rope_head_dim": dim})
