"""Attention layers from a checkpoint: whole projections down, and a share of the heads.

Shape legend: N heads, C latent rank, H hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kernels
from attention.mla import MultiHeadLatentAttention
from mesh_config.model_config import ModelConfig
from moemesh.checkpoint import StoredWeight
from moemesh.ffn_loader import Reader, quantized, read_quantized
from moemesh.shard_file import TensorInfo
from moemesh.weight_names import layer_prefix
from transport.shards import maximal_subtrees

Shards = tuple[int, int]
"""The logical shards from the first to before the second: so many times the same number of heads."""


class MlaLoader:
    """Reads and packs attention layers. `weight_dtype` None keeps the format of the checkpoint; `quantize`: int8;
    `expand`: what the expanded form of attention takes as well."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        device: torch.device,
        weight_dtype: torch.dtype | None,
        quantize: bool,
        expand: bool,
        arithmetic: kernels.Arithmetic,
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._device = device
        self._weight_dtype = weight_dtype
        self._quantized = quantize
        self._expand = expand
        self._arithmetic = arithmetic

    def load(self, reader: Reader, layer: int, shards: Shards) -> MultiHeadLatentAttention:
        """One layer with the heads of `shards`."""
        config, prefix = self._config, f"{layer_prefix(layer)}self_attn."
        compressed = config.q_lora_rank is not None
        weights = kernels.MlaWeights(
            query_down=self._linear(reader, f"{prefix}q_a_proj.weight") if compressed else None,
            query_down_bias=self._bias(reader, f"{prefix}q_a_proj.bias") if compressed else None,
            query_norm=self.vector(reader, f"{prefix}q_a_layernorm.weight") if compressed else None,
            latent_down=self._linear(reader, f"{prefix}kv_a_proj_with_mqa.weight"),
            latent_down_bias=self._bias(reader, f"{prefix}kv_a_proj_with_mqa.bias"),
            latent_norm=self.vector(reader, f"{prefix}kv_a_layernorm.weight"),
            **self._load_heads(reader, prefix, shards),
            eps=config.latent_norm_eps,
            interleave=config.rope_interleave,
            scale=config.softmax_scale,
        )
        return MultiHeadLatentAttention(weights, self._bias(reader, f"{prefix}o_proj.bias"))

    def with_heads(
        self, loaded: MultiHeadLatentAttention, reader: Reader, layer: int, shards: Shards
    ) -> MultiHeadLatentAttention:
        """A layer that is there already, with the heads of other shards; what is whole is shared."""
        heads = self._load_heads(reader, f"{layer_prefix(layer)}self_attn.", shards)
        return MultiHeadLatentAttention(replace(loaded.weights, **heads), loaded.output_bias)

    def num_bytes(self, layer: int, shards: Shards) -> int:
        """What the heads of `shards` take in the checkpoint, about as much as in memory."""
        prefix, whole = f"{layer_prefix(layer)}self_attn.", self._config.num_logical_shards
        names = ("q_b_proj", "q_proj", "kv_b_proj", "o_proj")
        sizes = (self._tensors[f"{prefix}{n}.weight"].nbytes for n in names if f"{prefix}{n}.weight" in self._tensors)
        return sum(sizes) * (shards[1] - shards[0]) // whole

    def _load_heads(self, reader: Reader, prefix: str, shards: Shards) -> dict[str, Any]:
        config, heads_per_shard = self._config, self._config.num_heads // self._config.num_logical_shards
        heads = _scaled(shards, heads_per_shard)
        query_rows = _scaled(heads, config.qk_head_dim)
        query_up = f"{prefix}{'q_proj' if config.q_lora_rank is None else 'q_b_proj'}.weight"
        subtrees = maximal_subtrees(*shards, config.num_logical_shards)
        return {
            "query_up": self._linear(reader, query_up, rows=query_rows, unit=heads_per_shard * config.qk_head_dim),
            **self._load_key_value_up(reader, f"{prefix}kv_b_proj.weight", heads),
            "output": tuple(self._load_output(reader, f"{prefix}o_proj.weight", subtree) for subtree in subtrees),
        }

    def _load_key_value_up(self, reader: Reader, name: str, heads: tuple[int, int]) -> dict[str, kernels.PackedHeads]:
        """kv_b_proj cut into heads: the keys' part transposed (it is absorbed into the query), the values' as it is,
        and the keys' part as it is where prompts are expanded."""
        config = self._config
        keys_end, per_head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
        unit = config.num_heads // config.num_logical_shards * per_head
        stored = reader.weight(name, rows=_scaled(heads, per_head), unit=unit)
        weight_NPC = stored.values.view(heads[1] - heads[0], per_head, config.kv_lora_rank)
        keys, values = weight_NPC[:, :keys_end], weight_NPC[:, keys_end:]
        key_scales, value_scales = [], []
        if stored.scale_inv is not None:
            firsts = range(*_scaled(heads, per_head), per_head)
            key_scales = [_scale_of_rows(stored, first, first + keys_end) for first in firsts]
            value_scales = [_scale_of_rows(stored, first + keys_end, first + per_head) for first in firsts]
        packed = {
            "key_up": self._pack_heads(keys.mT, [scale.transposed() for scale in key_scales]),
            "value_up": self._pack_heads(values, value_scales),
        }
        if self._expand and self._quantized:  # the same numbers; blocks lie across here
            packed["key_expand"] = kernels.pack_heads(packed["key_up"].dense().mT, device=self._device)
        elif self._expand:
            packed["key_expand"] = self._pack_heads(keys, key_scales)
        return packed

    def _pack_heads(self, weight_nNK: Tensor, scales: Sequence[kernels.BlockScale]) -> kernels.PackedHeads:
        if scales:
            return kernels.pack_heads(weight_nNK, scales=scales, device=self._device)
        if not self._quantized:
            return kernels.pack_heads(self.cast(weight_nNK), arithmetic=self._arithmetic, device=self._device)
        values, scale_inv = kernels.quantize(weight_nNK.flatten(0, 1))
        scales = [
            kernels.BlockScale(scale_inv=of_head, rows=1, cols=kernels.INT8_BLOCK)
            for of_head in scale_inv.view(*weight_nNK.shape[:2], -1)
        ]
        return kernels.pack_heads(values.view(weight_nNK.shape), scales=scales, device=self._device)

    def _load_output(self, reader: Reader, name: str, subtree: Shards) -> kernels.PackedLinear:
        config = self._config
        columns = _scaled(subtree, config.num_heads // config.num_logical_shards * config.v_head_dim)
        if self._quantized:
            stored = read_quantized(reader, name, self._tensors[name].shape[1], columns)
        else:
            stored = reader.weight(name, columns=columns)
        return self.pack(stored, num_shards=subtree[1] - subtree[0])

    def _linear(
        self, reader: Reader, name: str, *, rows: Shards | None = None, unit: int | None = None
    ) -> kernels.PackedLinear:
        stored = reader.weight(name, rows=rows, unit=unit)
        return self.pack(quantized(stored.values) if self._quantized else stored)

    def pack(self, stored: StoredWeight, *, num_shards: int = 1) -> kernels.PackedLinear:
        if stored.scale_inv is None:
            return kernels.pack_linear(
                self.cast(stored.values), num_shards=num_shards, arithmetic=self._arithmetic, device=self._device
            )
        return kernels.pack_linear(
            stored.values,
            scale_inv=stored.scale_inv,
            block=stored.block,
            offset=stored.offset,
            num_shards=num_shards,
            device=self._device,
        )

    def cast(self, values: Tensor) -> Tensor:
        return values if self._weight_dtype is None else values.to(self._weight_dtype)

    def vector(self, reader: Reader, name: str) -> Tensor:
        return reader.float32(name).to(self._device, copy=True)

    def _bias(self, reader: Reader, name: str) -> Tensor | None:
        return self.vector(reader, name) if self._config.attention_bias else None


def _scaled(part: tuple[int, int], factor: int) -> tuple[int, int]:
    return part[0] * factor, part[1] * factor


def _scale_of_rows(stored: StoredWeight, start: int, stop: int) -> kernels.BlockScale:
    """The scales of rows [start, stop) of the matrix that `stored` is part of."""
    assert stored.scale_inv is not None
    block, skipped = stored.block[0], stored.offset[0] // stored.block[0]
    rows = stored.scale_inv[start // block - skipped : -(-stop // block) - skipped]
    return kernels.BlockScale(scale_inv=rows, rows=block, cols=stored.block[1], row_phase=start % block)
