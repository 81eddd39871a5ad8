"""How many parameters a model has, by component; from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh_config.model_shape import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters of the whole model; MTP layers are not in them.

    Tensor parallelism splits by heads `query_output` (query and output projections) and `key_value_up` (kv_b);
    `attention_replicated` are the latent projections that every rank of a group holds. `head` is 0 where the embedding
    is used for it.
    """

    embedding: int
    query_output: int
    key_value_up: int
    attention_replicated: int
    norms: int
    dense: int
    shared: int
    router: int
    one_expert: int
    experts: int
    head: int
    active: int

    @property
    def total(self) -> int:
        attention = self.query_output + self.key_value_up + self.attention_replicated + self.norms
        return self.embedding + attention + self.dense + self.shared + self.router + self.experts + self.head


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """The ParameterCounts of `model`; `active` is what one token is multiplied with, the embedding lookup apart."""
    h, n, layers, moe_layers = model.hidden_size, model.num_heads, model.num_layers, len(model.moe_layers)
    q_rank = model.q_lora_rank
    replicated = h * model.latent_width + h * (q_rank or 0)
    if model.attention_bias:
        replicated += model.latent_width + h + (q_rank or 0)
    one_expert = 3 * h * model.moe_intermediate_size
    head = 0 if model.tie_word_embeddings else model.vocab_size * h
    bias = model.num_experts if model.scoring == "sigmoid" else 0
    counts = ParameterCounts(
        embedding=model.vocab_size * h,
        query_output=layers * n * (model.qk_head_dim * (q_rank or h) + h * model.v_head_dim),
        key_value_up=layers * n * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank,
        attention_replicated=layers * replicated,
        norms=layers * (2 * h + model.kv_lora_rank + (q_rank or 0)) + h,
        dense=(layers - moe_layers) * 3 * h * model.intermediate_size,
        shared=moe_layers * 3 * h * model.shared_width,
        router=moe_layers * (model.num_experts * h + bias),
        one_expert=one_expert,
        experts=moe_layers * model.num_experts * one_expert,
        head=head,
        active=0,
    )
    idle = moe_layers * (model.num_experts - model.experts_per_token) * one_expert
    active = counts.total - idle - (counts.embedding if head else 0)
    return replace(counts, active=active)
