"""Fill a rank's share of the model from a checkpoint: only what the rank hosts is read.

Shape legend: N heads, C latent rank, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import kernels
from attention.mla import MultiHeadLatentAttention
from attention.rope import RotaryTable
from experts import ExpertBank
from gating import Router
from mesh_config.mesh import MeshConfig
from mesh_config.placement import Placement
from moemesh.checkpoint import Checkpoint, LoadLedger, StoredWeight
from moemesh.model import AttentionLayer, AttentionModel, RankModel
from moemesh.weight_names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    attention_rank_tensors,
    expert_prefix,
    expert_tensors,
    layer_prefix,
)
from transport.shards import maximal_subtrees, owned_shards

_STORED_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}

Report = Callable[[int, int], None]
"""Called with (tensors read, tensors to read) as loading goes on."""


class ModelLoader:
    """Loads one rank's share. `weight_dtype` None keeps the format that the checkpoint has."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        mesh: MeshConfig,
        placement: Placement,
        rank: int,
        device: torch.device,
        weight_dtype: torch.dtype | None,
        report: Report,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._mesh = mesh
        self._placement = placement
        self._rank = rank
        self._device = device
        self._weight_dtype = weight_dtype
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
        prefixes = [expert_prefix(layer, expert) for expert in hosted]
        every = [expert_prefix(layer, expert) for expert in range(self._config.num_experts)]
        packed = self._pack_experts(prefixes, self._config.moe_intermediate_size, same_format_as=every)
        return ExpertBank(hosted, self._config.num_experts, packed)

    def _load_ffn(self, prefix: str, width: int) -> kernels.PackedExperts:
        return self._pack_experts([prefix], width, same_format_as=[prefix])

    def _pack_experts(self, prefixes: list[str], width: int, *, same_format_as: Iterable[str]) -> kernels.PackedExperts:
        """A bank holds one format. Where the checkpoint mixes them within a layer all of it is held in float32, on
        every rank, so that the arithmetic does not depend on who hosts what."""
        dtype = self._common_dtype(same_format_as)
        block = self._config.quantization if dtype is torch.float8_e4m3fn else None
        packed = kernels.PackedExperts.empty(
            len(prefixes),
            self._config.hidden_size,
            width,
            dtype=dtype,
            block=None if block is None else (block.block_rows, block.block_cols),
            device=self._device,
        )
        for slot, prefix in enumerate(prefixes):
            gate, up, down = (self._matrix(f"{prefix}{name}_proj.weight", dtype) for name in ("gate", "up", "down"))
            scales = None
            if gate.scale_inv is not None and up.scale_inv is not None and down.scale_inv is not None:
                scales = (gate.scale_inv, up.scale_inv, down.scale_inv)
            packed.load(slot, gate.values, up.values, down.values, scales=scales)
            self._report(*self._books.progress)
        return packed

    def _common_dtype(self, prefixes: Iterable[str]) -> torch.dtype:
        names = [f"{prefix}{name}_proj.weight" for prefix in prefixes for name in ("gate", "up", "down")]
        stored = {self._checkpoint.tensors[name].dtype for name in names}
        if stored == {_STORED_NAMES[torch.float8_e4m3fn]}:
            return torch.float8_e4m3fn
        if self._weight_dtype is not None:
            return self._weight_dtype
        held = [dtype for dtype, name in _STORED_NAMES.items() if stored == {name}]
        return held[0] if held else torch.float32

    def _matrix(self, name: str, dtype: torch.dtype) -> StoredWeight:
        if self._checkpoint.tensors[name].dtype == _STORED_NAMES[dtype]:
            return self._books.weight(name)
        return StoredWeight(values=self._books.float32(name).to(dtype))

    # --- attention

    def _load_attention_model(self) -> AttentionModel:
        config = self._config
        embedding = self._cast(self._books.tensor(EMBEDDING))
        layers = tuple(self._load_layer(layer) for layer in range(config.num_layers))
        head = embedding if config.tie_word_embeddings else self._cast(self._books.tensor(HEAD))
        return AttentionModel(
            config=config,
            rotary=RotaryTable(config, self._mesh.max_model_len, self._device),
            embedding_VH=embedding.to(self._device, copy=True),
            layers=layers,
            final_norm=self._vector(FINAL_NORM),
            head=kernels.pack_linear(head, device=self._device),
        )

    def _load_layer(self, layer: int) -> AttentionLayer:
        config, prefix = self._config, layer_prefix(layer)
        moe = config.is_moe_layer(layer)
        if not moe:
            local_ffn = self._load_ffn(f"{prefix}mlp.", config.intermediate_size)
        elif config.shared_width:
            local_ffn = self._load_ffn(f"{prefix}mlp.shared_experts.", config.shared_width)
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
        keys, values = self._load_key_value_up(f"{prefix}kv_b_proj.weight", heads)
        expands = self._mesh.prefill_attention == "expanded"
        weights = kernels.MlaWeights(
            query_down=self._linear(f"{prefix}q_a_proj.weight") if compressed else None,
            query_down_bias=self._bias(f"{prefix}q_a_proj.bias") if compressed else None,
            query_norm=self._vector(f"{prefix}q_a_layernorm.weight") if compressed else None,
            query_up=self._linear(query_up, rows=_scaled(heads, config.qk_head_dim)),
            latent_down=self._linear(f"{prefix}kv_a_proj_with_mqa.weight"),
            latent_down_bias=self._bias(f"{prefix}kv_a_proj_with_mqa.bias"),
            latent_norm=self._vector(f"{prefix}kv_a_layernorm.weight"),
            key_up=kernels.pack_heads(keys.mT.contiguous(), device=self._device),
            value_up=kernels.pack_heads(values, device=self._device),
            key_expand=kernels.pack_heads(keys, device=self._device) if expands else None,
            output=tuple(
                self._load_output(f"{prefix}o_proj.weight", subtree, heads_per_shard)
                for subtree in maximal_subtrees(low, high, shards)
            ),
            eps=config.latent_norm_eps,
            interleave=config.rope_interleave,
            scale=config.softmax_scale,
        )
        return MultiHeadLatentAttention(weights, self._bias(f"{prefix}o_proj.bias"))

    def _load_key_value_up(self, name: str, heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """kv_b_proj cut into heads, [heads, width, latent rank] each: the keys' part and the values'.

        FP8 blocks cut across the two parts, so FP8 is held as float32 here.
        """
        config = self._config
        per_head = config.qk_nope_head_dim + config.v_head_dim
        rows = _scaled(heads, per_head)
        if self._checkpoint.tensors[name].dtype == _STORED_NAMES[torch.float8_e4m3fn]:
            weight = self._books.float32(name, rows=rows)
        else:
            weight = self._cast(self._books.rows(name, *rows))
        weight_NPC = weight.view(heads[1] - heads[0], per_head, config.kv_lora_rank)
        return weight_NPC[:, : config.qk_nope_head_dim], weight_NPC[:, config.qk_nope_head_dim :]

    def _load_output(self, name: str, subtree: tuple[int, int], heads_per_shard: int) -> kernels.PackedLinear:
        unit = heads_per_shard * self._config.v_head_dim
        stored = self._books.weight(name, columns=_scaled(subtree, unit))
        return self._pack(stored, num_shards=subtree[1] - subtree[0])

    def _linear(self, name: str, *, rows: tuple[int, int] | None = None) -> kernels.PackedLinear:
        return self._pack(self._books.weight(name, rows=rows))

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
