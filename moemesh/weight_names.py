"""The names and shapes of a checkpoint's tensors, as DeepSeek publishes them.

`expected_tensors` is the whole inventory of a model: nothing else is read, and nothing of it may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from mesh_config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
SCALE_SUFFIX = "_scale_inv"

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_prefix(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}."


def ffn_shapes(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    """gate, up and down projection of one FFN; the same names for dense, shared and routed ones."""
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor that a checkpoint of `config` must hold; scales of FP8 tensors are not in it."""
    shapes = attention_rank_tensors(config)
    for layer in config.moe_layers:
        shapes |= expert_tensors(config, layer, range(config.num_experts))
    return shapes


def attention_rank_tensors(config: ModelConfig) -> dict[str, Shape]:
    """All that is no routed expert: what attention ranks read, whole or their part of it."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size), FINAL_NORM: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        shapes |= _attention_shapes(config, f"{layer_prefix(layer)}self_attn.")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer_prefix(layer)}{norm}.weight"] = (config.hidden_size,)
        shapes |= _ffn_of_layer(config, layer)
    return shapes


def expert_tensors(config: ModelConfig, layer: int, experts: Iterable[int]) -> dict[str, Shape]:
    """The tensors of some routed experts of a MoE layer."""
    shapes: dict[str, Shape] = {}
    for expert in experts:
        shapes |= ffn_shapes(expert_prefix(layer, expert), config.hidden_size, config.moe_intermediate_size)
    return shapes


def _attention_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    h, n, q_rank = config.hidden_size, config.num_heads, config.q_lora_rank
    shapes: dict[str, Shape] = {
        f"{prefix}kv_a_proj_with_mqa.weight": (config.latent_width, h),
        f"{prefix}kv_a_layernorm.weight": (config.kv_lora_rank,),
        f"{prefix}kv_b_proj.weight": (n * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        f"{prefix}o_proj.weight": (h, n * config.v_head_dim),
    }
    if q_rank is None:
        shapes[f"{prefix}q_proj.weight"] = (n * config.qk_head_dim, h)
    else:
        shapes[f"{prefix}q_a_proj.weight"] = (q_rank, h)
        shapes[f"{prefix}q_a_layernorm.weight"] = (q_rank,)
        shapes[f"{prefix}q_b_proj.weight"] = (n * config.qk_head_dim, q_rank)
    if config.attention_bias:
        shapes[f"{prefix}kv_a_proj_with_mqa.bias"] = (config.latent_width,)
        shapes[f"{prefix}o_proj.bias"] = (h,)
        if q_rank is not None:
            shapes[f"{prefix}q_a_proj.bias"] = (q_rank,)
    return shapes


def _ffn_of_layer(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Dense FFN, or router and shared experts."""
    prefix = f"{layer_prefix(layer)}mlp."
    if not config.is_moe_layer(layer):
        return ffn_shapes(prefix, config.hidden_size, config.intermediate_size)
    shapes: dict[str, Shape] = {f"{prefix}gate.weight": (config.num_experts, config.hidden_size)}
    if config.scoring == "sigmoid":
        shapes[f"{prefix}gate.e_score_correction_bias"] = (config.num_experts,)
    if config.shared_width:
        shapes |= ffn_shapes(f"{prefix}shared_experts.", config.hidden_size, config.shared_width)
    return shapes


def can_be_fp8(name: str) -> bool:
    """Whether DeepSeek's FP8 format quantises the tensor: the projections, never norms, router, embedding or head."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


def set_aside(config: ModelConfig, shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The tensors of a checkpoint that are known and not served.

    They are the layers of multi-token prediction (after the last layer, recognised by their `eh_proj`), rotary
    frequencies, which follow from the configuration, and tensors with no element (transformers saves shared experts
    of width 0).
    """
    mtp = _mtp_layers(config, shapes)
    return frozenset(
        name
        for name, shape in shapes.items()
        if name.endswith("rotary_emb.inv_freq") or 0 in shape or _layer_of(name) in mtp
    )


def _mtp_layers(config: ModelConfig, names: Collection[str]) -> frozenset[int]:
    last = config.num_layers + max(config.num_mtp_layers, 1)
    return frozenset(n for n in range(config.num_layers, last) if f"{layer_prefix(n)}eh_proj.weight" in names)


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None
