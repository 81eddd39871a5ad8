"""The least work of a step, against sums worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_config import MemoryPlan, cache_bytes_per_token, count_parameters, make_mesh
from moemesh.bench.work import decode_bytes, even_routing, prefill_operations, touched_experts
from tests.moemesh.gateway.fake_engine import model_config


def test_a_token_touches_its_experts() -> None:
    assert touched_experts({1: [4, 4, 0, 0], 2: [1, 2, 3, 2]}, 2, 1) == pytest.approx(4)


def test_tokens_that_all_choose_alike_touch_no_more() -> None:
    assert touched_experts({1: [9, 9, 0, 0]}, 2, 100) == pytest.approx(2)


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), st.integers(1, 64))
def test_more_tokens_touch_more_but_never_more_than_were_seen(counts: list[int], batch_size: int) -> None:
    few, many = (touched_experts({1: counts}, 1, size) for size in (batch_size, batch_size + 1))
    assert few <= many + 1e-9
    assert many <= sum(count > 0 for count in counts) + 1e-9


def test_even_routing_is_the_expectation_of_uniform_draws() -> None:
    model = model_config()
    assert touched_experts(even_routing(model), model.experts_per_token, 2) == pytest.approx(8 * (1 - (6 / 8) ** 2))


def test_one_rank_reads_its_weights_once_and_the_cache_of_every_sequence() -> None:
    model = model_config()
    plan = MemoryPlan(
        attention=1000, key_expand=9, dense=200, shared=30, router=4, experts=800, head=50, cache=0, workspace=0
    )
    read = decode_bytes(model, make_mesh(model), [plan], batch_size=3, context=10, num_touched=4)
    assert read == 1000 + 200 + 30 + 4 + 50 + 400 + 3 * 10 * cache_bytes_per_token(model)


def test_ranks_without_rows_read_only_attention_and_idle_groups_nothing() -> None:
    model = model_config()
    plans = [MemoryPlan(attention=100, head=7, cache=0, workspace=0)] * 4
    together = make_mesh(model, num_ranks=4, attention_tp=4)
    cached = cache_bytes_per_token(model)
    assert decode_bytes(model, together, plans, batch_size=1, context=1, num_touched=0) == 400 + 7 + 4 * cached
    apart = make_mesh(model, num_ranks=4, attention_tp=1)
    assert decode_bytes(model, apart, plans, batch_size=2, context=1, num_touched=0) == 200 + 14 + 2 * cached


def test_operations_of_a_prompt() -> None:
    model = model_config()
    mesh, counts = make_mesh(model), count_parameters(model)
    one = 2 * counts.active + 2 * model.num_layers * model.num_heads * (model.latent_width + model.kv_lora_rank)
    assert prefill_operations(model, mesh, 1) == one
    assert prefill_operations(model, mesh, 2) > 2 * one - 2 * counts.head
    expanded = make_mesh(model, prefill_attention="expanded")
    pairs = 2 * model.num_layers * model.num_heads * (model.qk_head_dim + model.v_head_dim)
    assert prefill_operations(model, expanded, 1) == 2 * counts.active + pairs
