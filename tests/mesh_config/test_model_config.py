"""ModelConfig against transformers' own reading of the same JSON, and refusals by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

from mesh_config import ConfigError, ModelConfig, load_model_config, parse_model_config
from tests.oracle import ORACLE_CASES, OracleCase, write_random_checkpoint

V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
V2 = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_experts_per_tok": 6}

# The published config.json of DeepSeek-V3, shortened by what only training reads.
DEEPSEEK_V3: dict[str, Any] = V3 | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, values: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_deepseek_v3_as_published() -> None:
    config = parse_model_config(DEEPSEEK_V3)
    assert (config.num_layers, config.num_heads, config.hidden_size, config.vocab_size) == (61, 128, 7168, 129280)
    assert (config.q_lora_rank, config.latent_width, config.qk_head_dim) == (1536, 576, 192)
    assert config.num_logical_shards == 16
    assert config.moe_layers == tuple(range(3, 61))
    assert config.quantization is not None
    assert config.quantization.block_rows == config.quantization.block_cols == 128
    assert config.rope.yarn is not None
    assert config.softmax_scale == pytest.approx(192**-0.5 * 1.3688879**2, rel=1e-6)
    assert config.dtype == "bfloat16"


SAME_NAME = [
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "routed_scaling_factor", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "max_position_embeddings", "bos_token_id",
]  # fmt: skip
OTHER_NAME = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "first_dense_layers": "first_k_dense_replace",
}
FIELD_NAMES = {name: name for name in SAME_NAME} | OTHER_NAME


@pytest.mark.parametrize(("values", "oracle"), [(V3, DeepseekV3Config()), (V2, DeepseekV2Config())], ids=["v3", "v2"])
def test_absent_fields_take_transformers_defaults(values: dict[str, Any], oracle: Any) -> None:
    config = parse_model_config(values)
    for ours, theirs in FIELD_NAMES.items():
        assert getattr(config, ours) == getattr(oracle, theirs), ours
    assert config.eos_token_ids == (oracle.eos_token_id,)
    assert config.rope.theta == oracle.rope_parameters["rope_theta"]
    assert config.num_expert_groups == (oracle.n_group or 1)
    assert config.topk_groups == (oracle.topk_group or 1)
    assert config.norm_topk_prob == oracle.norm_topk_prob


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_every_oracle_case_is_read_as_transformers_reads_it(case: OracleCase, tmp_path: Path) -> None:
    config = load_model_config(case.write(tmp_path))
    oracle_class = DeepseekV3Config if case.arch == "v3" else DeepseekV2Config
    oracle: Any = oracle_class.from_pretrained(tmp_path)
    for ours, theirs in FIELD_NAMES.items():
        assert getattr(config, ours) == getattr(oracle, theirs), ours
    assert config.dtype == case.options.get("dtype", "float32")
    assert (config.quantization is not None) == case.options.get("fp8", False)


def test_v2_router() -> None:
    config = parse_model_config(V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3})
    assert (config.scoring, config.topk_method) == ("softmax", "group_limited_greedy")
    assert (config.num_expert_groups, config.topk_groups) == (8, 3)


def test_greedy_looks_at_no_groups_and_v2_never_normalises() -> None:
    config = parse_model_config(V2 | {"n_group": 8, "topk_group": 3, "norm_topk_prob": True})
    assert (config.num_expert_groups, config.topk_groups, config.norm_topk_prob) == (1, 1, False)


def test_null_groups_and_shared_experts() -> None:
    config = parse_model_config(V3 | {"n_group": None, "topk_group": None, "n_shared_experts": None})
    assert (config.num_expert_groups, config.topk_groups, config.num_shared_experts) == (1, 1, 0)


def test_kimi_k2_fields() -> None:
    kimi = V3 | {
        "model_type": "kimi_k2",
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "num_attention_heads": 64,
    }
    config = parse_model_config(
        kimi | {"num_key_value_heads": 64, "vocab_size": 163840, "use_cache": True, "seq_aux": True}
    )
    assert config.architecture == "DeepseekV3ForCausalLM"
    assert (config.num_experts, config.num_expert_groups) == (384, 1)


@pytest.mark.parametrize(("heads", "shards"), [(128, 16), (16, 16), (24, 8), (6, 2), (3, 1), (1, 1)])
def test_logical_shards(heads: int, shards: int) -> None:
    assert parse_model_config(V3 | {"num_attention_heads": heads}).num_logical_shards == shards


def test_moe_layer_freq_selects_layers() -> None:
    config = parse_model_config(V3 | {"num_hidden_layers": 8, "first_k_dense_replace": 1, "moe_layer_freq": 3})
    assert config.moe_layers == (3, 6)
    assert not config.is_moe_layer(0)


def test_moe_layer_freq_that_the_tensors_contradict_is_1(tmp_path: Path) -> None:
    """transformers ignores the field: a checkpoint it saved has experts in every layer."""
    folder = write_random_checkpoint(tmp_path, num_hidden_layers=3, first_k_dense_replace=0)
    values = json.loads((folder / "config.json").read_text())
    write_config(folder, values | {"moe_layer_freq": 2})
    assert load_model_config(folder).moe_layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (7, 5, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5]}, (7, 5)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, {"temperature": 0.6}, (1,)),
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_end_of_sequence_ids(
    tmp_path: Path, own: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert load_model_config(write_config(tmp_path, V3 | own, generation)).eos_token_ids == expected


def fp8(**fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]} | fields}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None, "model_type": "llama"}, "model_type"),
        ({"model_type": "deepseek_v2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"index_topk": 2048}, "index_topk"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"n_group": 7}, "n_group"),
        ({"n_group": 256}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"compression_config": {"format": "pack"}}, "compression_config"),
        (fp8(fmt="e5m2"), "fmt"),
        (fp8(activation_scheme="static"), "activation_scheme"),
        (fp8(weight_block_size=None), "weight_block_size"),
        (fp8(weight_block_size=[128]), "weight_block_size"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": -1}}, "beta_slow"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_unsupported_values_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{named} is "):
        parse_model_config(V3 | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
    ],
)
def test_v2_refusals(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named} is "):
        parse_model_config(V2 | change)


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model_config(tmp_path)
    for text, message in [("{", "not valid JSON"), ("[]", "JSON object"), ("[" * 100_000, "not valid JSON")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_model_config(tmp_path)


def test_the_configuration_is_immutable() -> None:
    config = parse_model_config(V3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3  # type: ignore[misc]
    assert isinstance(dataclasses.replace(config, num_layers=3), ModelConfig)
