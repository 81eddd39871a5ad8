"""The oracle: what transformers computes from a checkpoint, and the checkpoints to compare on.

`oracle_logprobs` and `oracle_greedy` run transformers' classes in float32, FP8 weights dequantised, whatever the engine
does; with `int8` on what --quantization int8 makes of the weights.
`ORACLE_CASES` are tiny random models that differ in every field a config can set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.random_checkpoint import CLASSES, build_model, dequantize, one_thread, write_random_checkpoint

__all__ = [
    "ORACLE_CASES",
    "ORACLE_CONFIGS",
    "OracleCase",
    "dequantize",
    "oracle_greedy",
    "oracle_logprobs",
    "oracle_model",
    "write_random_checkpoint",
]


def oracle_model(folder: str | Path, *, int8: bool = False) -> Any:
    """The folder's model in transformers' class, float32, FP8 weights dequantised; every tensor of it filled."""
    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization_config", None)
    arch = "v2" if values["architectures"] == ["DeepseekV2ForCausalLM"] else "v3"
    config = CLASSES[arch][0].from_dict(values)
    tied, config.tie_word_embeddings = config.tie_word_embeddings, config.tie_word_embeddings and not int8
    model = build_model(arch, config)
    tensors = {
        name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    past_last = f"model.layers.{config.num_hidden_layers}."
    kept = {name: tensor for name, tensor in dequantize(tensors).items() if not name.startswith(past_last)}
    if tied:
        kept["lm_head.weight"] = kept["model.embed_tokens.weight"]
    if int8:
        kept = {name: _through_int8(name, tensor, config) for name, tensor in kept.items()}
    model.load_state_dict(_fused_experts(kept), strict=True)
    model.eval()
    return model


@torch.no_grad()
@one_thread()
def oracle_logprobs(folder: str | Path, token_ids: Sequence[int], *, int8: bool = False) -> torch.Tensor:
    """log_softmax of the next-token logits after each position: [T, V] float32."""
    logits = oracle_model(folder, int8=int8)(torch.tensor([list(token_ids)]), use_cache=False).logits
    return torch.log_softmax(logits[0].float(), dim=-1)


@torch.no_grad()
@one_thread()
def oracle_greedy(folder: str | Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The `num_tokens` most likely continuations one after another; end-of-sequence ids do not end it."""
    model = oracle_model(folder)
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _through_int8(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """What remains of a weight in int8: matrices but embedding and router, by the inputs of each output.

    kv_b_proj is absorbed into query and output by heads: the inputs of its keys' part are the elements of a key.
    """
    if tensor.dim() != 2 or not tensor.numel() or name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
        return tensor
    if not name.endswith("kv_b_proj.weight"):
        return through_int8(tensor)
    heads = tensor.view(config.num_attention_heads, -1, tensor.shape[1])
    keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    keys = through_int8(keys.transpose(1, 2)).transpose(1, 2)
    return torch.cat((keys, through_int8(values)), 1).view(tensor.shape)


def through_int8(weight: torch.Tensor) -> torch.Tensor:
    """Each 128 neighbours of the last dimension, in float32, as integers from -127 to 127 times one scale."""
    parts = []
    for block in weight.split(128, -1):
        scale = block.abs().amax(-1, keepdim=True) / 127
        parts.append((block / scale).round() * scale)
    return torch.cat(parts, -1)


def _fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-expert matrices stacked into the [E, 2 width, H] and [E, H, width] parameters of transformers 5."""
    fused = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] for name in tensors if ".mlp.experts." in name}):
        count = 1 + max(
            int(name.split(".experts.")[1].split(".")[0]) for name in tensors if name.startswith(f"{prefix}.experts.")
        )
        part = [
            {m: tensors[f"{prefix}.experts.{e}.{m}_proj.weight"] for m in ("gate", "up", "down")} for e in range(count)
        ]
        fused[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in part])
        fused[f"{prefix}.experts.down_proj"] = torch.stack([one["down"] for one in part])
    return fused


@dataclass(frozen=True, kw_only=True)
class OracleCase:
    """One model: the options of `write_random_checkpoint` and the config fields that make it different."""

    name: str
    arch: str = "v3"
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: str | Path, seed: int = 0) -> Path:
        return write_random_checkpoint(folder, seed, arch=self.arch, **self.options, **self.fields)


def _yarn(**extra: Any) -> dict[str, Any]:
    base = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
    return base | extra


ORACLE_CASES: tuple[OracleCase, ...] = (
    OracleCase(name="v3_plain"),
    OracleCase(
        name="v3_no_q_lora_two_shared_unnormalised",
        fields={"q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ),
    OracleCase(
        name="v3_yarn_mscale_old_spelling",
        options={"old_rope_spelling": True, "shards": 3},
        fields={"rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)},
    ),
    OracleCase(
        name="v3_yarn_mscales_differ_no_truncate",
        fields={"rope_parameters": _yarn(mscale=0.707, mscale_all_dim=1.3, truncate=False, rope_theta=500.0)},
    ),
    OracleCase(name="v3_yarn_attention_factor", fields={"rope_parameters": _yarn(attention_factor=0.8, beta_fast=16)}),
    OracleCase(
        name="v3_kimi_like",
        options={"old_rope_spelling": True, "dtype": "bfloat16", "mtp": True},
        fields={
            "n_group": 1,
            "topk_group": 1,
            "num_attention_heads": 2,
            "routed_scaling_factor": 2.827,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _yarn(beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, rope_theta=50000.0),
        },
    ),
    OracleCase(name="v3_halves_rotated_tied", fields={"rope_interleave": False, "tie_word_embeddings": True}),
    OracleCase(
        name="v3_attention_bias_no_shared",
        options={"shards": 2},
        fields={"attention_bias": True, "n_shared_experts": 0, "first_k_dense_replace": 0},
    ),
    OracleCase(name="v3_all_dense", fields={"first_k_dense_replace": 3}),
    OracleCase(name="v3_every_second_layer_sparse", fields={"moe_layer_freq": 2, "num_hidden_layers": 5}),
    OracleCase(
        name="v3_awkward_sizes",
        fields={
            "vocab_size": 331,
            "hidden_size": 96,
            "intermediate_size": 72,
            "moe_intermediate_size": 40,
            "num_attention_heads": 6,
            "qk_nope_head_dim": 24,
            "v_head_dim": 20,
            "n_routed_experts": 10,
            "n_group": 5,
            "topk_group": 3,
            "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-4,
        },
    ),
    OracleCase(
        name="v3_odd_heads_top_one",
        fields={"num_attention_heads": 3, "num_experts_per_tok": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 40},
    ),
    OracleCase(name="v3_float16", options={"dtype": "float16"}, fields={"q_lora_rank": None}),
    OracleCase(name="v3_bfloat16", options={"dtype": "bfloat16"}, fields={"n_shared_experts": 2}),
    OracleCase(
        name="v3_fp8",
        options={"fp8": True, "dtype": "bfloat16", "shards": 2},
        fields={
            "hidden_size": 256,
            "intermediate_size": 384,
            "moe_intermediate_size": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "q_lora_rank": 128,
        },
    ),
    OracleCase(name="v3_fp8_partial_blocks", options={"fp8": True, "dtype": "bfloat16"}, fields={"hidden_size": 160}),
    OracleCase(
        name="v2_lite_like",
        arch="v2",
        options={"old_rope_spelling": True},
        fields={
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 5120,
            "rope_parameters": _yarn(mscale=0.707, mscale_all_dim=0.707, factor=40.0),
        },
    ),
    OracleCase(
        name="v2_group_limited",
        arch="v2",
        fields={"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "moe_layer_freq": 1},
    ),
    OracleCase(
        name="v2_normalise_ignored_bfloat16",
        arch="v2",
        options={"dtype": "bfloat16"},
        fields={"norm_topk_prob": True, "topk_method": "greedy", "attention_bias": True, "tie_word_embeddings": True},
    ),
)

ORACLE_CONFIGS = {case.name: case for case in ORACLE_CASES}
