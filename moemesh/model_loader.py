"""Fill a rank's share of the model from a checkpoint: only what the rank hosts is read.

Shape legend: H hidden, V vocabulary.
"""

from collections.abc import Callable

import torch

import kernels
from attention.rope import RotaryTable
from experts import ExpertBank
from gating import Router
from mesh_config.mesh import MeshConfig
from mesh_config.model_shape import Quantization
from mesh_config.placement import Placement
from moemesh.checkpoint import Checkpoint, LoadLedger, StoredWeight
from moemesh.ffn_loader import FfnLoader, quantized
from moemesh.mla_loader import MlaLoader, Shards
from moemesh.model import AttentionLayer, AttentionModel, RankModel
from moemesh.weight_names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    attention_rank_tensors,
    expert_tensors,
    layer_prefix,
)
from transport.shards import owned_shards

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
        assert mesh.arithmetic != "auto", "the frontend settles it"
        self._arithmetic = mesh.arithmetic
        self.ffns = FfnLoader(
            self._config,
            checkpoint.tensors,
            device=device,
            weight_dtype=weight_dtype,
            quantized=self._quantized,
            arithmetic=self._arithmetic,
        )
        """Loads experts; also those that the rank takes over later."""
        self.mla = MlaLoader(
            self._config,
            checkpoint.tensors,
            device=device,
            weight_dtype=weight_dtype,
            quantize=self._quantized,
            expand=mesh.prefill_attention == "expanded",
            arithmetic=self._arithmetic,
        )
        """Loads attention layers; also the heads that the rank takes over later."""
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
        tp = self._mesh.attention_tp
        shards = owned_shards(config.num_logical_shards, tp, self._rank % tp)
        layers = tuple(self._load_layer(layer, shards) for layer in range(config.num_layers))
        head = embedding if config.tie_word_embeddings else self._books.tensor(HEAD)
        return AttentionModel(
            config=config,
            rotary=RotaryTable(config, self._mesh.max_model_len, self._device),
            embedding_VH=self.mla.cast(embedding).to(self._device, copy=True),
            layers=layers,
            final_norm=self.mla.vector(self._books, FINAL_NORM),
            head=self.mla.pack(quantized(head) if self._quantized else StoredWeight(values=head)),
        )

    def _load_layer(self, layer: int, shards: Shards) -> AttentionLayer:
        config, prefix = self._config, layer_prefix(layer)
        moe = config.is_moe_layer(layer)
        if not moe:
            local_ffn = self.ffns.ffn(self._books, f"{prefix}mlp.", config.intermediate_size)
        elif config.shared_width:
            local_ffn = self.ffns.ffn(self._books, f"{prefix}mlp.shared_experts.", config.shared_width)
        else:
            local_ffn = None
        loaded = AttentionLayer(
            input_norm=self.mla.vector(self._books, f"{prefix}input_layernorm.weight"),
            attention=self.mla.load(self._books, layer, shards),
            ffn_norm=self.mla.vector(self._books, f"{prefix}post_attention_layernorm.weight"),
            router=self._load_router(f"{prefix}mlp.gate.") if moe else None,
            local_ffn=local_ffn,
        )
        self._report(*self._books.progress)
        return loaded

    def _load_router(self, prefix: str) -> Router:
        # As stored, whatever --dtype says: the kernel widens to float32, and half the bytes are the same numbers.
        stored = self._books.weight(f"{prefix}weight").values
        weight = kernels.pack_linear(stored, arithmetic=self._arithmetic, device=self._device)
        bias = (
            self.mla.vector(self._books, f"{prefix}e_score_correction_bias")
            if self._config.scoring == "sigmoid"
            else None
        )
        return Router(self._config, weight, bias)
