"""From a Hugging Face model folder's config.json (and generation_config.json) to a ModelConfig.

Absent fields take the defaults of transformers' DeepseekV3Config / DeepseekV2Config, which is what a checkpoint saved
without them means. A value that this engine does not compute is refused by name. `auto_map` and other remote code are
never looked at.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast

from mesh_config.errors import ConfigError
from mesh_config.fields import Fields, read_json_object
from mesh_config.model_shape import Architecture, Fp8BlockConfig, ModelConfig, StoredDtype
from mesh_config.rope_parser import parse_rope
from mesh_config.router_parser import parse_router
from mesh_config.stored_names import stored_moe_layer_freq

__all__ = ["ConfigError", "Fp8BlockConfig", "ModelConfig", "load_model_config", "parse_model_config"]

V3: Architecture = "DeepseekV3ForCausalLM"
V2: Architecture = "DeepseekV2ForCausalLM"
_ARCHITECTURE_OF_TYPE = {"deepseek_v3": V3, "kimi_k2": V3, "deepseek_v2": V2}
_STORED_DTYPES = ("float32", "bfloat16", "float16")

# transformers' defaults where the two architectures differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    V3: {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    V2: {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}

# Fields that change the arithmetic of other models, and the values under which ours is right.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "index_topk": (None,),
    "use_qk_norm": (False, None),
    "is_encoder_decoder": (False, None),
    "use_mla": (True, None),
}


def load_model_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a model folder. ConfigError where it is no model folder, or no model served here."""
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{root}: is not a folder; a model is a folder with config.json and *.safetensors in it")
    path = root / "config.json"
    if not path.is_file():
        raise ConfigError(f"{root}: has no config.json; a model is a folder with config.json and *.safetensors in it")
    config = parse_model_config(read_json_object(path), source=str(path))
    generation = root / "generation_config.json"
    if generation.is_file():
        stops = _token_ids(Fields(read_json_object(generation), str(generation)), "eos_token_id")
        own = config.eos_token_ids if Fields(read_json_object(path), str(path)).has("eos_token_id") else ()
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(stops + own)) or config.eos_token_ids)
    return dataclasses.replace(config, moe_layer_freq=stored_moe_layer_freq(root, config))


def parse_model_config(values: dict[str, Any], *, source: str = "config.json") -> ModelConfig:
    """The ModelConfig that the JSON object of a config.json describes; `source` names it in errors."""
    fields = Fields(values, source)
    architecture = _architecture(fields)
    defaults = _DEFAULTS[architecture]
    _refuse_unsupported(fields)
    num_heads = fields.integer("num_attention_heads", defaults["num_attention_heads"])
    _check_kv_heads(fields, num_heads)
    rope_dim = fields.integer("qk_rope_head_dim", 64)
    if rope_dim % 2:
        raise fields.error("qk_rope_head_dim", "rotary pairs need an even number")
    max_positions = fields.integer("max_position_embeddings", defaults["max_position_embeddings"])
    num_layers = fields.integer("num_hidden_layers", defaults["num_hidden_layers"])
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", defaults["vocab_size"]),
        hidden_size=fields.integer("hidden_size", defaults["hidden_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        q_lora_rank=fields.optional_integer("q_lora_rank", 1536, minimum=1),
        kv_lora_rank=fields.integer("kv_lora_rank", 512),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 128),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim", 128),
        intermediate_size=fields.integer("intermediate_size", defaults["intermediate_size"]),
        moe_intermediate_size=fields.integer("moe_intermediate_size", defaults["moe_intermediate_size"]),
        num_shared_experts=fields.optional_integer("n_shared_experts", defaults["n_shared_experts"]) or 0,
        **dataclasses.asdict(parse_router(fields, architecture, defaults["n_routed_experts"])),
        first_dense_layers=fields.integer("first_k_dense_replace", defaults["first_k_dense_replace"], minimum=0),
        moe_layer_freq=fields.integer("moe_layer_freq", 1),
        rms_norm_eps=_positive(fields, "rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        rope_interleave=_rope_interleave(fields, architecture),
        rope=parse_rope(fields, max_positions),
        max_position_embeddings=max_positions,
        dtype=_dtype(fields),
        quantization=_quantization(fields),
        num_mtp_layers=_num_mtp_layers(fields),
        bos_token_id=fields.optional_integer("bos_token_id", defaults["bos_token_id"]),
        eos_token_ids=_token_ids(fields, "eos_token_id", defaults["eos_token_id"]),
    )


def _architecture(fields: Fields) -> Architecture:
    named = fields.raw("architectures")
    if named is None:
        model_type = fields.raw("model_type")
        if not isinstance(model_type, str) or model_type not in _ARCHITECTURE_OF_TYPE:
            raise fields.error("model_type", f"supported here: {', '.join(_ARCHITECTURE_OF_TYPE)}")
        return _ARCHITECTURE_OF_TYPE[model_type]
    if isinstance(named, list) and len(named) == 1 and named[0] in _DEFAULTS:
        model_type = fields.raw("model_type", named[0])
        if not isinstance(model_type, str) or _ARCHITECTURE_OF_TYPE.get(model_type, named[0]) != named[0]:
            raise fields.error("model_type", f"it contradicts architectures = {named[0]}")
        return cast(Architecture, named[0])
    raise fields.error("architectures", f"supported here: {V3}, {V2}")


def _refuse_unsupported(fields: Fields) -> None:
    for name, supported in _ONLY_SUPPORTED.items():
        if not fields.has(name):
            continue
        value = fields.raw(name)
        if not any(type(value) is type(one) and value == one for one in supported):
            shown = ", ".join("null" if one is None else str(one).lower() for one in supported)
            raise fields.error(name, f"supported here: {shown}")


def _check_kv_heads(fields: Fields, num_heads: int) -> None:
    kv_heads = fields.optional_integer("num_key_value_heads", num_heads, minimum=1)
    if kv_heads not in (None, num_heads):
        raise fields.error("num_key_value_heads", f"latent attention needs num_attention_heads = {num_heads}")


def _positive(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default)
    if value <= 0:
        raise fields.error(name, "a number above 0 is required")
    return value


def _rope_interleave(fields: Fields, architecture: Architecture) -> bool:
    if fields.has("rope_interleave") and fields.raw("rope_interleave") is None:
        return False  # as transformers, which asks only whether it is true
    interleave = fields.flag("rope_interleave", True)
    if architecture == V2 and not interleave:
        raise fields.error("rope_interleave", f"{V2} always rotates interleaved pairs (true)")
    return interleave


def _dtype(fields: Fields) -> StoredDtype:
    name = "dtype" if fields.raw("dtype") is not None else "torch_dtype"
    value = fields.raw(name)
    if value is None:
        return "float32"
    value = value.removeprefix("torch.") if isinstance(value, str) else value
    if value not in _STORED_DTYPES:
        raise fields.error(name, f"supported here: {', '.join(_STORED_DTYPES)}")
    return cast(Literal["float32", "bfloat16", "float16"], value)


def _quantization(fields: Fields) -> Fp8BlockConfig | None:
    if fields.raw("compression_config") is not None:
        raise fields.error(
            "compression_config", "supported here: DeepSeek's block FP8 (quantization_config fp8), or none"
        )
    section = fields.section("quantization_config")
    if section is None:
        return None
    section.choice("quant_method", "", ("fp8",))
    section.choice("fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    section.choice("activation_scheme", "dynamic", ("dynamic",))
    block = section.raw("weight_block_size")
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in block):
        raise section.error("weight_block_size", "two whole numbers are required, such as [128, 128]")
    return Fp8BlockConfig(block_rows=block[0], block_cols=block[1])


def _num_mtp_layers(fields: Fields) -> int:
    name = "num_nextn_predict_layers" if fields.has("num_nextn_predict_layers") else "num_mtp_layers"
    return fields.optional_integer(name, 1) or 0


def _token_ids(fields: Fields, name: str, default: int | None = None) -> tuple[int, ...]:
    value = fields.raw(name, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise fields.error(name, "a token id, or a list of token ids, is required")
    return tuple(ids)
