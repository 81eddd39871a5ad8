"""Random checkpoints, written by transformers in the layout that DeepSeek publishes: per-expert tensors, FP8 by blocks.

Weights are scaled so that activations stay near 1, the router spreads and logits have a deviation near 1: a wrong
scale, order or mask anywhere shows in the log-probabilities.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

FP8_BLOCK = 128
FP8_MAX = 448.0

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}

CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3MLP),
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV2MLP),
}

BASE_FIELDS: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other, the longer the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def write_random_checkpoint(
    folder: str | Path,
    seed: int = 0,
    *,
    arch: str = "v3",
    dtype: str = "float32",
    fp8: bool = False,
    shards: int = 1,
    old_rope_spelling: bool = False,
    mtp: bool = False,
    **config_fields: Any,
) -> Path:
    """Writes config.json and safetensors of a random model into `folder` (made if missing) and returns it.

    `config_fields` override BASE_FIELDS. `dtype` is how weights are stored; the correction bias stays float32. With
    `fp8` the projections are float8_e4m3fn with a float32 scale per 128x128 block. More than one shard brings an index.
    `mtp` adds the tensors of one multi-token-prediction layer, which nobody serves.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**BASE_FIELDS, **config_fields}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    config = CLASSES[arch][0](**fields)
    model = build_model(arch, config)
    _randomize(model, seed)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch) / "model.safetensors")
        written = json.loads((Path(scratch) / "config.json").read_text())
    tensors = _stored(tensors, getattr(torch, dtype), fp8=fp8)
    if mtp:
        tensors |= _mtp_tensors(config, tensors)
    written |= {"dtype": dtype}
    if fp8:
        written["quantization_config"] = QUANTIZATION
    if old_rope_spelling:
        _spell_rope_the_old_way(written)
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    _write_shards(folder, tensors, shards)
    return folder


def dequantize(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors in float32; FP8 ones times the scale of their block, the scales themselves left out."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.float()
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            grid = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            value = value * grid[: value.shape[0], : value.shape[1]]
        result[name] = value
    return result


def build_model(arch: str, config: Any) -> Any:
    """The model; layers that `moe_layer_freq` makes dense are dense, which transformers alone would not do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = CLASSES[arch][1]._from_config(config, attn_implementation="eager", dtype=torch.float32)
    freq = getattr(config, "moe_layer_freq", 1)
    for index, layer in enumerate(model.model.layers):
        if index >= config.first_k_dense_replace and index % freq:
            layer.mlp = CLASSES[arch][2](config)
    return model


@torch.no_grad()
def _randomize(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for name, tensor in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and tied:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif name.endswith("e_score_correction_bias"):
            value = 0.1 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            value = noise * (tensor.shape[-1] ** -0.5 if tied else 1.0)
        else:
            value = noise / math.sqrt(max(tensor.shape[-1], 1))
        if name.endswith("mlp.gate.weight"):
            value *= 1.5
        tensor.copy_(value)


def _is_quantized(name: str) -> bool:
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))


def _stored(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, fp8: bool) -> dict[str, torch.Tensor]:
    stored = {}
    for name, tensor in tensors.items():
        if fp8 and _is_quantized(name) and tensor.numel():
            stored[name], stored[f"{name}_scale_inv"] = quantize_blocks(tensor)
        elif name.endswith("e_score_correction_bias"):
            stored[name] = tensor
        else:
            stored[name] = tensor.to(dtype)
    return stored


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn weight, float32 scale per 128x128 block), DeepSeek's FP8; edge blocks are smaller."""
    rows, cols = (-(-size // FP8_BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * FP8_BLOCK, cols * FP8_BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, FP8_BLOCK, cols, FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
    quantized = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return quantized.to(torch.float8_e4m3fn).contiguous(), scale


def _mtp_tensors(config: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    last, extra = (f"model.layers.{config.num_hidden_layers - offset}." for offset in (1, 0))
    copied = {
        extra + name.removeprefix(last): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)
    }
    hidden = config.hidden_size
    own = {"eh_proj.weight": (hidden, 2 * hidden), "enorm.weight": (hidden,), "hnorm.weight": (hidden,)}
    return copied | {extra + name: torch.ones(shape) for name, shape in own.items()}


def _spell_rope_the_old_way(values: dict[str, Any]) -> None:
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    values["torch_dtype"] = values.pop("dtype")


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        names = sorted(tensors)[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
