"""The least work that a step takes: bytes to read for a decode step, operations for a prompt. From shapes alone.

A lower bound to compare measurements with: every weight that is needed is read once by every rank that needs it, and
nothing else is moved. Activations, which caches hold, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mesh_config import MemoryPlan, MeshConfig, ModelConfig, cache_bytes_per_token, count_parameters


def touched_experts(routed: Mapping[int, Sequence[int]], experts_per_token: int, batch_size: int) -> float:
    """Distinct experts, over all layers, that a step of `batch_size` tokens is expected to need.

    `routed` has the tokens that each expert of each layer was given: tokens are taken to choose independently, with
    these frequencies.
    """
    touched = 0.0
    for tokens_per_expert in routed.values():
        num_tokens = sum(tokens_per_expert) / experts_per_token
        touched += sum(1 - (1 - min(1.0, count / num_tokens)) ** batch_size for count in tokens_per_expert if count)
    return touched


def even_routing(model: ModelConfig) -> dict[int, list[int]]:
    """What `touched_experts` takes where nothing was observed: every expert equally often."""
    return {layer: [1] * model.num_experts for layer in model.moe_layers}


def decode_bytes(
    model: ModelConfig,
    mesh: MeshConfig,
    weights: Sequence[MemoryPlan],
    *,
    batch_size: int,
    context: float,
    num_touched: float,
) -> float:
    """Bytes that all ranks together must read for one decode step of `batch_size` sequences of `context` tokens.

    `weights` has every rank's memory plan, `num_touched` the distinct experts needed in all layers together.
    """
    num_experts = model.num_experts * len(model.moe_layers)
    total = num_touched * sum(plan.experts for plan in weights) / max(1, num_experts)
    groups = mesh.groups
    for index, group in enumerate(groups):
        sequences = batch_size // len(groups) + (index < batch_size % len(groups))
        if not sequences:
            continue
        total += sum(weights[rank].attention for rank in group)
        total += len(group) * sequences * context * cache_bytes_per_token(model)
        # Everything but attention is computed by the owner of a row, and is whole on every rank.
        for rank in group[:sequences]:
            plan = weights[rank]
            total += plan.dense + plan.shared + plan.router + plan.head
    return total


def prefill_operations(model: ModelConfig, mesh: MeshConfig, prompt_tokens: int) -> float:
    """Multiplications and additions for one prompt and its one row of logits.

    Both forms of attention use kv_b once per position: on its query and its result, or on its latent (a prompt that is
    read in several steps is expanded again in each; that is not counted).
    """
    counts = count_parameters(model)
    head = counts.head or counts.embedding
    products = 2 * (counts.active - head) * prompt_tokens + 2 * head
    pairs = prompt_tokens * (prompt_tokens + 1) / 2
    if mesh.prefill_attention == "expanded":
        widths = model.qk_head_dim + model.v_head_dim  # scores, then the weighted values
    else:
        widths = model.latent_width + model.kv_lora_rank  # the same with latents
    return products + 2 * pairs * model.num_layers * model.num_heads * widths
