from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_config import ConfigError, MeshConfig, default_attention_tp, make_mesh, parse_model_config

MODEL = parse_model_config({"architectures": ["DeepseekV3ForCausalLM"], "num_attention_heads": 12})  # 4 shards


def mesh(**fields: Any) -> MeshConfig:
    return MeshConfig(**{"max_model_len": 128} | fields)


def test_one_rank_has_both_roles() -> None:
    assert mesh().roles(0) == {"attention", "expert"}
    assert mesh().groups == ((0,),)


def test_groups_are_consecutive_ranks() -> None:
    four = mesh(num_ranks=4, attention_tp=2)
    assert four.groups == ((0, 1), (2, 3))
    assert [four.group_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert four.expert_ranks == (0, 1, 2, 3)


def test_separate_attention_and_expert_ranks() -> None:
    separate = mesh(num_ranks=6, attention_ranks=2)
    assert separate.groups == ((0,), (1,))
    assert [separate.roles(rank) for rank in (1, 2)] == [{"attention"}, {"expert"}]
    assert separate.expert_ranks == (2, 3, 4, 5)
    assert separate.group_of(2) is None


@given(ranks=st.integers(1, 16), data=st.data())
def test_every_attention_rank_is_in_one_group(ranks: int, data: st.DataObject) -> None:
    attention = data.draw(st.none() | st.integers(1, ranks - 1)) if ranks > 1 else None
    count = ranks if attention is None else attention
    tp = data.draw(st.sampled_from([t for t in range(1, count + 1) if count % t == 0]))
    built = mesh(num_ranks=ranks, attention_ranks=attention, attention_tp=tp)
    assert [rank for group in built.groups for rank in group] == list(range(count))
    for rank in range(ranks):
        group = built.group_of(rank)
        assert ("attention" in built.roles(rank)) == (group is not None)
        assert group is None or rank in built.groups[group]
        assert built.roles(rank)


@pytest.mark.parametrize(
    ("attention_ranks", "on_host", "tp"),
    [(1, 1, 1), (4, 4, 4), (16, 16, 4), (6, 6, 2), (3, 3, 1), (4, 2, 2), (8, 3, 2)],
)
def test_default_tp(attention_ranks: int, on_host: int, tp: int) -> None:
    assert default_attention_tp(MODEL, attention_ranks, on_host) == tp


def test_make_mesh_fills_in_what_is_none() -> None:
    made = make_mesh(MODEL, num_ranks=4, attention_tp=None, max_model_len=None)
    assert (made.attention_tp, made.max_model_len) == (4, MODEL.max_position_embeddings)
    assert make_mesh(MODEL, num_ranks=4, machines=tuple("aabb")).attention_tp == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_ranks": 0}, "ranks = 0"),
        ({"num_ranks": 4, "attention_ranks": 4}, "attention-ranks = 4 of 4 ranks leaves no rank for the experts"),
        ({"num_ranks": 4, "attention_ranks": 0}, "leaves no rank for attention"),
        ({"num_ranks": 6, "attention_tp": 4}, "does not divide the 6 attention ranks: choose one of 1, 2, 3, 6"),
        ({"num_ranks": 2, "attention_tp": 0}, "attention-tp = 0"),
        ({"max_model_len": 0}, "max_model_len = 0"),
        ({"max_num_seqs": 0}, "max_num_seqs = 0"),
        ({"num_cache_blocks": 0}, "num_cache_blocks = 0"),
        ({"combine": "lossy"}, "combine = lossy: supported here: exact, compact"),
        ({"micro_batches": 3}, "micro_batches = 3"),
        ({"block_size": 16}, "block_size = 16"),
        ({"device": "tpu"}, "device = tpu"),
    ],
)
def test_refusals_name_the_numbers(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mesh(**fields)


def test_refusals_that_need_the_model() -> None:
    with pytest.raises(
        ConfigError, match=r"attention-tp = 8 does not divide the 4 shards .* 12 attention heads: .* 1, 2, 4$"
    ):
        make_mesh(MODEL, num_ranks=8, attention_tp=8)
    with pytest.raises(ConfigError, match=r"max-model-len = 5000 is above .* 4096"):
        make_mesh(MODEL, max_model_len=5000)


def test_dict_round_trip_refuses_unknown_keys() -> None:
    built = mesh(num_ranks=4, attention_tp=2)
    assert MeshConfig.from_dict(built.to_dict()) == built
    assert set(built.to_dict()) == {field.name for field in dataclasses.fields(built)}
    with pytest.raises(ConfigError, match="unknown field attention_pt"):
        MeshConfig.from_dict({"attention_pt": 2})
