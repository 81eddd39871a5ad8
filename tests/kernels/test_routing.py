"""The gate against transformers' routers and the torch reference."""

import math

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import kernels
from kernels import reference
from kernels.routing import Method, Scoring
from tests.kernels.weights import needs_native, normal, packed


def by_expert(ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.zeros(ids_TK.shape[0], num_experts).scatter_(1, ids_TK.long(), weights_TK)


@pytest.mark.parametrize(("groups", "kept", "normalize"), [(1, 1, True), (8, 3, True), (4, 2, False), (32, 16, True)])
def test_v3_router(groups: int, kept: int, normalize: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=64, num_experts_per_tok=6, n_group=groups, topk_group=kept,
        norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    bias = normal(64, seed=1) * 0.1
    router.weight.data = normal(64, 32)
    router.e_score_correction_bias.copy_(bias)
    logits, weights, ids = router(normal(200, 32, seed=2))
    got_ids, got_weights = kernels.route(
        logits.detach(), bias, num_groups=groups, topk_groups=kept, top_k=6,
        scoring="sigmoid", method="noaux_tc", normalize=normalize, scale=2.5,
    )  # fmt: skip
    assert torch.allclose(by_expert(got_ids, got_weights, 64), by_expert(ids, weights, 64), atol=2e-6)


@pytest.mark.parametrize(("method", "groups", "kept"), [("greedy", 1, 1), ("group_limited_greedy", 8, 3)])
def test_v2_router(method: Method, groups: int, kept: int) -> None:
    config = DeepseekV2Config(
        hidden_size=32, n_routed_experts=64, num_experts_per_tok=6, n_group=groups, topk_group=kept,
        topk_method=method, routed_scaling_factor=16.0,
    )  # fmt: skip
    router = DeepseekV2TopkRouter(config)
    router.weight.data = normal(64, 32)
    logits, weights, ids = router(normal(200, 32, seed=2))
    got_ids, got_weights = kernels.route(
        logits.detach(), None, num_groups=groups, topk_groups=kept, top_k=6,
        scoring="softmax", method=method, normalize=False, scale=16.0,
    )  # fmt: skip
    assert torch.allclose(by_expert(got_ids, got_weights, 64), by_expert(ids, weights, 64), atol=2e-5)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
@pytest.mark.parametrize(("num_experts", "groups"), [(7, 1), (61, 61), (64, 8)])
def test_route_agrees_with_reference_also_among_equals(
    scoring: Scoring, method: Method, num_experts: int, groups: int
) -> None:
    # Whole numbers: many equal scores. Their differences are exact, so both sides see the same ties.
    logits = torch.randint(-3, 4, (50, num_experts), generator=torch.Generator().manual_seed(0)).float()
    wanted = {"num_groups": groups, "topk_groups": max(1, groups // 2), "top_k": 3, "normalize": True, "scale": 2.0}
    ids, weights = kernels.route(logits, None, scoring=scoring, method=method, **wanted)  # type: ignore[arg-type]
    want_ids, want_weights = reference.route(logits, None, scoring=scoring, method=method, **wanted)  # type: ignore[arg-type]
    assert torch.equal(ids, want_ids)
    assert torch.allclose(weights, want_weights, atol=2e-6)


@needs_native
def test_sigmoid_is_accurate_over_the_whole_range() -> None:
    logits = torch.linspace(-110, 110, 20_000)[None]
    ids, weights = kernels.route(
        logits, None, num_groups=1, topk_groups=1, top_k=20_000,
        scoring="sigmoid", method="greedy", normalize=False, scale=1.0,
    )  # fmt: skip
    want = logits[0, ids[0].long()].double().sigmoid()
    normal_range = want > 1.2e-38
    assert ((weights[0] - want).abs() / want)[normal_range].max() < 3e-7
    assert (weights[0] - want).abs()[~normal_range].max() < 3e-39  # exp overflows: 0


@needs_native
def test_logits_that_are_no_numbers_still_give_distinct_experts() -> None:
    logits = torch.full((2, 9), math.nan)
    logits[1] = -math.inf
    ids, _ = kernels.route(
        logits, None, num_groups=3, topk_groups=1, top_k=5,
        scoring="sigmoid", method="noaux_tc", normalize=True, scale=1.0,
    )  # fmt: skip
    assert all(len(set(row)) == 5 and set(row) <= set(range(9)) for row in ids.tolist())


def test_impossible_choices_are_refused() -> None:
    def route(num_groups: int, topk_groups: int, top_k: int) -> None:
        kernels.route(
            torch.ones(1, 8), None, num_groups=num_groups, topk_groups=topk_groups, top_k=top_k,
            scoring="sigmoid", method="noaux_tc", normalize=True, scale=1.0,
        )  # fmt: skip

    with pytest.raises(ValueError, match="1 of 3 groups of 8"):
        route(3, 1, 1)
    with pytest.raises(ValueError, match="5 of 4 groups"):
        route(4, 5, 1)
    with pytest.raises(ValueError, match="top_k is 9, must be 1 to 8"):
        route(4, 2, 9)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_is_linear_and_route_to_the_bit(method: Method, dtype: torch.dtype) -> None:
    weight, x, bias = packed(64, 48, dtype), normal(100, 48), normal(64, seed=1) * 0.1
    rule = {"num_groups": 8, "topk_groups": 4, "top_k": 6, "normalize": True, "scale": 2.5}
    gate = kernels.Gate(weight=weight, bias_E=bias, scoring="sigmoid", method=method, **rule)  # type: ignore[arg-type]
    want = kernels.route(kernels.linear(x, weight), bias, scoring="sigmoid", method=method, **rule)  # type: ignore[arg-type]
    counts = torch.ones(64, dtype=torch.int64)
    assert all(torch.equal(left, right) for left, right in zip(gate.choose(x, counts), want, strict=True))
    assert torch.equal(counts, 1 + want[0].flatten().bincount(minlength=64))
