"""The part of a model that one rank holds."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import kernels
from attention.mla import MultiHeadLatentAttention
from attention.rope import RotaryTable
from experts import ExpertBank
from gating import Router
from mesh_config.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """What an attention rank computes in one layer beside the routed experts.

    `router` is None in a dense layer; `local_ffn` is the dense FFN there, the shared experts in a MoE layer (None where
    the model has no shared expert).
    """

    input_norm: Tensor
    attention: MultiHeadLatentAttention
    ffn_norm: Tensor
    router: Router | None
    local_ffn: kernels.PackedExperts | None


@dataclass(frozen=True, kw_only=True)
class AttentionModel:
    """Everything an attention rank holds: rope table, embedding, its heads of every layer, the norm and the head."""

    config: ModelConfig
    rotary: RotaryTable
    embedding_VH: Tensor
    layers: tuple[AttentionLayer, ...]
    final_norm: Tensor
    head: kernels.PackedLinear

    def embed(self, token_ids: array[int]) -> Tensor:
        """Rows float32 [T, H] of int32 ids."""
        return kernels.embed(self.embedding_VH, token_ids)

    def sampler(
        self, rows: Sequence[int], draws: Sequence[kernels.Draw], *, num_rows: int, out: Tensor
    ) -> kernels.RowSampler:
        """Of some of `num_rows` rows of hidden states after the last layer: logits float32 [R, V] go into `out`, and
        the first len(draws) of them give tokens."""
        eps = self.config.rms_norm_eps
        return kernels.RowSampler(rows, self.final_norm, self.head, draws, num_rows=num_rows, eps=eps, out=out)


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """One rank's share: `attention` where it has that role, `banks` by MoE layer where it hosts experts."""

    config: ModelConfig
    attention: AttentionModel | None
    banks: Mapping[int, ExpertBank]
