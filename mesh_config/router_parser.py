"""The router's fields of a config.json, checked against each other.

V3 scores by sigmoid, adds a correction bias to choose, and looks at groups (`noaux_tc`, DeepSeek-V3 report, section
2.1.2); V2 scores by softmax and chooses greedily, from all experts or from the best groups (`group_limited_greedy`,
DeepSeek-V2 report, section 2.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from mesh_config.fields import Fields
from mesh_config.model_shape import Architecture, Scoring, TopkMethod


@dataclass(frozen=True, kw_only=True)
class RouterFields:
    """The part of ModelConfig that says where a token goes; same names."""

    num_experts: int
    experts_per_token: int
    num_expert_groups: int
    topk_groups: int
    scoring: Scoring
    topk_method: TopkMethod
    norm_topk_prob: bool
    routed_scaling_factor: float


def parse_router(fields: Fields, architecture: Architecture, default_experts: int) -> RouterFields:
    """The router of a config.json; ConfigError where its numbers do not fit together."""
    is_v3 = architecture == "DeepseekV3ForCausalLM"
    if is_v3:
        scoring, method = "sigmoid", fields.choice("topk_method", "noaux_tc", ("noaux_tc",))
    else:
        scoring, method = "softmax", fields.choice("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    fields.choice("scoring_func", scoring, (scoring,))
    experts_name = next((n for n in ("num_local_experts", "num_experts") if fields.has(n)), "n_routed_experts")
    num_experts = fields.integer(
        "n_routed_experts" if fields.has("n_routed_experts") else experts_name, default_experts
    )
    num_groups, topk_groups = _groups(fields, num_experts, method, is_v3=is_v3)
    top_k = fields.integer("num_experts_per_tok", 8 if is_v3 else None)
    eligible = num_experts // num_groups * topk_groups
    if top_k > eligible:
        raise fields.error("num_experts_per_tok", f"a token can choose from {eligible} experts: lower it to that")
    normalize = fields.flag("norm_topk_prob", is_v3) if fields.raw("norm_topk_prob", is_v3) is not None else False
    return RouterFields(
        num_experts=num_experts,
        experts_per_token=top_k,
        num_expert_groups=num_groups,
        topk_groups=topk_groups,
        scoring=cast(Scoring, scoring),
        topk_method=cast(TopkMethod, method),
        norm_topk_prob=normalize and is_v3,
        routed_scaling_factor=fields.number("routed_scaling_factor", 2.5 if is_v3 else 1.0),
    )


def _groups(fields: Fields, num_experts: int, method: str, *, is_v3: bool) -> tuple[int, int]:
    num_groups = fields.optional_integer("n_group", 8 if is_v3 else None, minimum=1) or 1
    topk_groups = fields.optional_integer("topk_group", 4 if is_v3 else None, minimum=1) or num_groups
    if method == "greedy":
        return 1, 1
    if num_experts % num_groups:
        raise fields.error("n_group", f"it must divide the number of experts, {num_experts}")
    if topk_groups > num_groups:
        raise fields.error("topk_group", f"there are only n_group = {num_groups} groups")
    if is_v3 and num_experts // num_groups < 2:
        raise fields.error("n_group", f"a group is scored by its best two experts, {num_experts} experts give it fewer")
    return num_groups, topk_groups
