"""Fill a rank's share of the model from a checkpoint: only what the rank hosts is read.

Shape legend: N heads, C latent rank, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kernels
from attention.mla import MultiHeadLatentAttention
from attention.rope import RotaryTable
from experts import ExpertBank
from gating import Router
from mesh_config.mesh import MeshConfig
from mesh_config.model_shape import Quantization
from mesh_config.placement import Placement
from moemesh.checkpoint import Checkpoint, LoadLedger, StoredWeight
from moemesh.ffn_loader import FfnLoader, quantized, read_quantized
from moemesh.model import AttentionLayer, AttentionModel, RankModel
from moemesh.weight_names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    attention_rank_tensors,
    expert_tensors,
    layer_prefix,
)
from transport.shards import maximal_subtrees, owned_shards

Report = Callable[[int, int], None]
"""Called with (tensors read, tensors to read) as loading goes on."""


class ModelLoader:
    """Loads one rank's share. `weight_dtype` None keeps the format that the checkpoint has.

    `quantization` converts all matrices but embedding and router, whose checkpoint must not be FP8. Its blocks are laid
    over whole matrices (over each head's in kv_b), so that a slice holds the same numbers whoever loads it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        mesh: MeshConfig,
        placement: Placement,
        rank: int,
        device: torch.device,
        weight_dtype: torch.dtype | None,
        quantization: Quantization | None,
        report: Report,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._mesh = mesh
        self._placement = placement
        self._rank = rank
        self._device = device
        self._weight_dtype = weight_dtype
        self._quantized = quantization == "int8"
        self.ffns = FfnLoader(
            self._config,
            checkpoint.tensors,
            device=device,
            weight_dtype=weight_dtype,
            quantized=self._quantized,
        )
        """Loads further experts as it has loaded the rank's own."""
        self._report = report
        self._books = LoadLedger(checkpoint, self._hosted_tensors())

    def load(self) -> RankModel:
        """Read, pack and close the books. Raises CheckpointError."""
        roles = self._mesh.roles(self._rank)
        hosting = [layer for layer in self._config.moe_layers if self._placement.experts_on(layer, self._rank)]
        banks = {layer: self._load_bank(layer) for layer in hosting}
        attention = self._load_attention_model() if "attention" in roles else None
        self._books.close()
        return RankModel(config=self._config, attention=attention, banks=banks)

    def _hosted_tensors(self) -> set[str]:
        names: set[str] = set()
        roles = self._mesh.roles(self._rank)
        if "attention" in roles:
            names |= attention_rank_tensors(self._config).keys()
        for layer in self._config.moe_layers:
            names |= expert_tensors(self._config, layer, self._placement.experts_on(layer, self._rank)).keys()
        return names

    # --- experts

    def _load_bank(self, layer: int) -> ExpertBank:
        hosted = self._placement.experts_on(layer, self._rank)
        packed = self.ffns.expert_bank(layer, len(hosted))
        for slot, expert in enumerate(hosted):
            self.ffns.load_experts(packed, [slot], self._books, layer, [expert])
            self._report(*self._books.progress)
        return ExpertBank(hosted, self._config.num_experts, packed)

    # --- attention

    def _load_attention_model(self) -> AttentionModel:
        config = self._config
        embedding = self._books.tensor(EMBEDDING)
        layers = tuple(self._load_layer(layer) for layer in range(config.num_layers))
        head = embedding if config.tie_word_embeddings else self._books.tensor(HEAD)
        return AttentionModel(
            config=config,
            rotary=RotaryTable(config, self._mesh.max_model_len, self._device),
            embedding_VH=self._cast(embedding).to(self._device, copy=True),
            layers=layers,
            final_norm=self._vector(FINAL_NORM),
            head=self._pack(quantized(head) if self._quantized else StoredWeight(values=head)),
        )

    def _load_layer(self, layer: int) -> AttentionLayer:
        config, prefix = self._config, layer_prefix(layer)
        moe = config.is_moe_layer(layer)
        if not moe:
            local_ffn = self.ffns.ffn(self._books, f"{prefix}mlp.", config.intermediate_size)
        elif config.shared_width:
            local_ffn = self.ffns.ffn(self._books, f"{prefix}mlp.shared_experts.", config.shared_width)
        else:
            local_ffn = None
        loaded = AttentionLayer(
            input_norm=self._vector(f"{prefix}input_layernorm.weight"),
            attention=self._load_mla(f"{prefix}self_attn."),
            ffn_norm=self._vector(f"{prefix}post_attention_layernorm.weight"),
            router=self._load_router(f"{prefix}mlp.gate.") if moe else None,
            local_ffn=local_ffn,
        )
        self._report(*self._books.progress)
        return loaded

    def _load_router(self, prefix: str) -> Router:
        # As stored, whatever --dtype says: the kernel widens to float32, and half the bytes are the same numbers.
        weight = kernels.pack_linear(self._books.weight(f"{prefix}weight").values, device=self._device)
        bias = self._vector(f"{prefix}e_score_correction_bias") if self._config.scoring == "sigmoid" else None
        return Router(self._config, weight, bias)

    def _load_mla(self, prefix: str) -> MultiHeadLatentAttention:
        config = self._config
        shards, members = config.num_logical_shards, self._mesh.attention_tp
        low, high = owned_shards(shards, members, self._rank % members)
        heads_per_shard = config.num_heads // shards
        heads = (low * heads_per_shard, high * heads_per_shard)
        compressed = config.q_lora_rank is not None
        query_up = f"{prefix}q_b_proj.weight" if compressed else f"{prefix}q_proj.weight"
        weights = kernels.MlaWeights(
            query_down=self._linear(f"{prefix}q_a_proj.weight") if compressed else None,
            query_down_bias=self._bias(f"{prefix}q_a_proj.bias") if compressed else None,
            query_norm=self._vector(f"{prefix}q_a_layernorm.weight") if compressed else None,
            query_up=self._linear(query_up, rows=_scaled(heads, config.qk_head_dim)),
            latent_down=self._linear(f"{prefix}kv_a_proj_with_mqa.weight"),
            latent_down_bias=self._bias(f"{prefix}kv_a_proj_with_mqa.bias"),
            latent_norm=self._vector(f"{prefix}kv_a_layernorm.weight"),
            **self._load_key_value_up(f"{prefix}kv_b_proj.weight", heads),
            output=tuple(
                self._load_output(f"{prefix}o_proj.weight", subtree, heads_per_shard)
                for subtree in maximal_subtrees(low, high, shards)
            ),
            eps=config.latent_norm_eps,
            interleave=config.rope_interleave,
            scale=config.softmax_scale,
        )
        return MultiHeadLatentAttention(weights, self._bias(f"{prefix}o_proj.bias"))

    def _load_key_value_up(self, name: str, heads: tuple[int, int]) -> dict[str, kernels.PackedHeads]:
        """kv_b_proj cut into heads: the keys' part transposed (it is absorbed into the query), the values' as it is,
        and the keys' part as it is where prompts are expanded."""
        config = self._config
        keys_end, per_head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
        stored = self._books.weight(name, rows=_scaled(heads, per_head))
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
        if self._mesh.prefill_attention == "expanded" and self._quantized:  # the same numbers; blocks lie across here
            packed["key_expand"] = kernels.pack_heads(packed["key_up"].dense().mT, device=self._device)
        elif self._mesh.prefill_attention == "expanded":
            packed["key_expand"] = self._pack_heads(keys, key_scales)
        return packed

    def _pack_heads(self, weight_nNK: Tensor, scales: Sequence[kernels.BlockScale]) -> kernels.PackedHeads:
        if scales:
            return kernels.pack_heads(weight_nNK, scales=scales, device=self._device)
        if not self._quantized:
            return kernels.pack_heads(self._cast(weight_nNK), device=self._device)
        values, scale_inv = kernels.quantize(weight_nNK.flatten(0, 1))
        scales = [
            kernels.BlockScale(scale_inv=of_head, rows=1, cols=kernels.INT8_BLOCK)
            for of_head in scale_inv.view(*weight_nNK.shape[:2], -1)
        ]
        return kernels.pack_heads(values.view(weight_nNK.shape), scales=scales, device=self._device)

    def _load_output(self, name: str, subtree: tuple[int, int], heads_per_shard: int) -> kernels.PackedLinear:
        unit = heads_per_shard * self._config.v_head_dim
        columns = _scaled(subtree, unit)
        if self._quantized:
            stored = read_quantized(self._books, name, self._checkpoint.tensors[name].shape[1], columns)
        else:
            stored = self._books.weight(name, columns=columns)
        return self._pack(stored, num_shards=subtree[1] - subtree[0])

    def _linear(self, name: str, *, rows: tuple[int, int] | None = None) -> kernels.PackedLinear:
        stored = self._books.weight(name, rows=rows)
        return self._pack(quantized(stored.values) if self._quantized else stored)

    def _pack(self, stored: StoredWeight, *, num_shards: int = 1) -> kernels.PackedLinear:
        if stored.scale_inv is None:
            return kernels.pack_linear(self._cast(stored.values), num_shards=num_shards, device=self._device)
        return kernels.pack_linear(
            stored.values,
            scale_inv=stored.scale_inv,
            block=stored.block,
            offset=stored.offset,
            num_shards=num_shards,
            device=self._device,
        )

    def _cast(self, values: Tensor) -> Tensor:
        return values if self._weight_dtype is None else values.to(self._weight_dtype)

    def _vector(self, name: str) -> Tensor:
        return self._books.float32(name).to(self._device, copy=True)

    def _bias(self, name: str) -> Tensor | None:
        return self._vector(name) if self._config.attention_bias else None


def _scaled(part: tuple[int, int], factor: int) -> tuple[int, int]:
    return part[0] * factor, part[1] * factor


def _scale_of_rows(stored: StoredWeight, start: int, stop: int) -> kernels.BlockScale:
    """The scales of rows [start, stop) of the matrix that `stored` is part of."""
    assert stored.scale_inv is not None
    block, skipped = stored.block[0], stored.offset[0] // stored.block[0]
    rows = stored.scale_inv[start // block - skipped : -(-stop // block) - skipped]
    return kernels.BlockScale(scale_inv=rows, rows=block, cols=stored.block[1], row_phase=start % block)
