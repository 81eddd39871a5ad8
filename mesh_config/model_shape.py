"""What a model is: the normalised form of a Hugging Face config.json.

The dataclass holds one spelling of every fact; `model_config` knows all the spellings of the outside world.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mesh_config.rope import RopeConfig, yarn_mscale

Architecture = Literal["DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"]
Scoring = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]
StoredDtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8"]  # what weights may be converted to while they are loaded

MAX_LOGICAL_SHARDS = 16


@dataclass(frozen=True, kw_only=True)
class Fp8BlockConfig:
    """DeepSeek's FP8: float8_e4m3fn weights, one float32 `weight_scale_inv` per block of block_rows x block_cols."""

    block_rows: int
    block_cols: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V2 or -V3 class model. All sizes are numbers of elements.

    `norm_topk_prob` is always False for V2: transformers, the oracle, ignores the field for softmax routers and
    multiplies the chosen probabilities by `routed_scaling_factor` in every case.
    `num_expert_groups` and `topk_groups` are 1 where the router does not look at groups.
    `q_lora_rank` is None where queries are projected directly. `dtype` is the checkpoint's declared one; the tensors
    themselves may be mixed. `num_mtp_layers` layers after the last are recognised and not served.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    num_expert_groups: int
    topk_groups: int
    scoring: Scoring
    topk_method: TopkMethod
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_dense_layers: int
    moe_layer_freq: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    rope_interleave: bool
    rope: RopeConfig
    max_position_embeddings: int
    dtype: StoredDtype
    quantization: Fp8BlockConfig | None
    num_mtp_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """The same for equal configurations, whoever asks, and for no others."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def latent_norm_eps(self) -> float:
        """Epsilon of q_a_layernorm and kv_a_layernorm: both oracles leave it at 1e-6, whatever rms_norm_eps says."""
        return 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values cached per token and layer: the latent (C) and the rotary key shared by all heads (R)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_logical_shards(self) -> int:
        """Pieces that every tensor-parallel sum is cut into, whatever the degree: see the design, "Logical shards"."""
        shards = 1
        while 2 * shards <= MAX_LOGICAL_SHARDS and self.num_heads % (2 * shards) == 0:
            shards *= 2
        return shards

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(qk_head_dim), times the square of YaRN's mscale for `mscale_all_dim`."""
        scale = self.qk_head_dim**-0.5
        yarn = self.rope.yarn
        if yarn is not None and yarn.mscale_all_dim:
            scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return float(scale)

    @property
    def shared_width(self) -> int:
        """Width of the shared experts, which the checkpoint stores as one FFN; 0 where there are none."""
        return self.num_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        return layer >= self.first_dense_layers and layer % self.moe_layer_freq == 0

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if self.is_moe_layer(layer))
