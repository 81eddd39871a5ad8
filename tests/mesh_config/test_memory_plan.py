from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from mesh_config import (
    ConfigError,
    MemoryPlan,
    MeshConfig,
    ModelConfig,
    available_memory,
    cache_bytes_per_token,
    check_fits,
    count_parameters,
    even_placement,
    load_model_config,
    make_mesh,
    parse_model_config,
    plan_memory,
)
from mesh_config.memory_plan import format_bytes
from tests.mesh_config.test_model_config import DEEPSEEK_V3
from tests.oracle import ORACLE_CASES, OracleCase, oracle_model

FULL = parse_model_config(DEEPSEEK_V3)


def plans(model: ModelConfig, mesh: MeshConfig) -> list[MemoryPlan]:
    placement = even_placement(model.num_experts, model.moe_layers, mesh.expert_ranks, mesh.num_ranks)
    return [plan_memory(model, mesh, placement, rank) for rank in range(mesh.num_ranks)]


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_parameters_are_those_of_transformers(case: OracleCase, tmp_path: Path) -> None:
    config = load_model_config(case.write(tmp_path))
    state = oracle_model(tmp_path).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert count_parameters(config).total == sum(math.prod(tensor.shape) for tensor in state.values())


def test_full_size_numbers() -> None:
    """The numbers of DeepSeek-V3's report: 671B parameters, 37B active; 40.9 GB of experts per rank of 16 in FP8."""
    counts = count_parameters(FULL)
    assert counts.total == pytest.approx(671e9, rel=0.001)
    assert counts.active == pytest.approx(37e9, rel=0.02)
    mesh = make_mesh(FULL, num_ranks=16, machines=("a",) * 8 + ("b",) * 8, max_model_len=4096)
    assert mesh.attention_tp == 8
    experts = {plan.experts for plan in plans(FULL, mesh)}
    assert len(experts) == 1
    assert experts.pop() == pytest.approx(40.9e9, rel=0.001)
    assert cache_bytes_per_token(FULL) == 61 * 576 * 4


def test_ranks_share_the_experts_and_roles_decide() -> None:
    small = dataclasses.replace(FULL, num_layers=5, num_experts=10, num_expert_groups=1, topk_groups=1)
    separate = plans(small, make_mesh(small, num_ranks=4, attention_ranks=1, max_model_len=64))
    assert separate[0].experts == 0
    assert all(plan.weights == plan.experts > 0 and plan.cache == 0 for plan in separate[1:])
    one = plans(small, make_mesh(small, max_model_len=64))[0]
    assert sum(plan.experts for plan in separate) == pytest.approx(one.experts, rel=1e-6)
    assert one.total == one.weights + one.cache + one.workspace


def test_cache_follows_the_blocks() -> None:
    model = dataclasses.replace(FULL, num_layers=3)
    assert plans(model, make_mesh(model, max_model_len=33))[0].cache == 64 * cache_bytes_per_token(model)
    assert plans(model, make_mesh(model, num_cache_blocks=7))[0].cache == 7 * 32 * cache_bytes_per_token(model)


def test_attention_is_split_by_heads() -> None:
    counts = count_parameters(FULL)
    whole, eighth = (
        plans(FULL, make_mesh(FULL, num_ranks=8, attention_tp=tp, max_model_len=64))[0].attention for tp in (1, 8)
    )
    split = counts.query_output + counts.key_value_up
    assert whole - eighth == pytest.approx(split * 7 / 8, rel=0.001)
    assert whole == pytest.approx(split + counts.attention_replicated + 4 * counts.norms, rel=0.001)


def test_the_expanded_form_takes_the_keys_of_kv_b_once_more() -> None:
    absorbed, expanded = (
        plans(FULL, make_mesh(FULL, num_ranks=8, attention_tp=8, max_model_len=64, prefill_attention=form))[0]
        for form in ("absorbed", "expanded")
    )
    assert expanded.weights - absorbed.weights == expanded.key_expand == pytest.approx(61 * 16 * 128 * 512, rel=0.001)


def test_weights_may_be_held_in_another_format() -> None:
    model = dataclasses.replace(FULL, num_layers=4, quantization=None)
    mesh = make_mesh(model, max_model_len=64)
    placement = even_placement(model.num_experts, model.moe_layers, (0,), 1)
    stored = plan_memory(model, mesh, placement, 0)
    wide = plan_memory(model, mesh, placement, 0, weight_dtype="float32")
    assert wide.experts == 2 * stored.experts
    assert wide.head == 2 * stored.head


def test_int8_is_a_byte_a_weight_and_its_scales() -> None:
    model = dataclasses.replace(FULL, num_layers=4, quantization=None)
    mesh = make_mesh(model, max_model_len=64)
    placement = even_placement(model.num_experts, model.moe_layers, (0,), 1)
    stored = plan_memory(model, mesh, placement, 0)
    eight = plan_memory(model, mesh, placement, 0, quantization="int8")
    for part in ("experts", "dense", "shared", "head"):
        assert getattr(eight, part) == pytest.approx(getattr(stored, part) * (1 + 4 / 128) / 2, rel=1e-6)
    assert eight.attention == pytest.approx(stored.attention * (1 + 4 / 128) / 2, rel=1e-3)  # norms are no matrices
    assert (eight.embedding, eight.router) == (stored.embedding, stored.router)


def test_too_little_memory_is_said_with_the_numbers() -> None:
    plan = MemoryPlan(experts=3 * 2**30, cache=2**30, workspace=2**29)
    check_fits([plan, plan], 9 * 2**30)
    with pytest.raises(
        ConfigError, match=r"2 ranks on this host need 9\.00 GiB .*weights 6\.00 GiB.*8\.00 GiB are available"
    ):
        check_fits([plan, plan], 8 * 2**30)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = "MemTotal:       8000 kB\nMemAvailable:   4000 kB\n"


def test_available_memory_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert available_memory(tmp_path) == 4000 * 1024
    assert available_memory() > 0
    with pytest.raises(ConfigError, match="meminfo"):
        available_memory(tmp_path / "empty")


def test_available_memory_within_control_groups(tmp_path: Path) -> None:
    v2 = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/pod/box\n",
        "sys/fs/cgroup/pod/box/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": "1000000\n",
        "sys/fs/cgroup/pod/memory.current": "600000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 100000\n",
    }
    write(tmp_path, v2)
    assert available_memory(tmp_path) == 500_000


def test_available_memory_within_control_groups_v1(tmp_path: Path) -> None:
    v1 = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/box\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2500000\n",
    }
    write(tmp_path, v1)
    assert available_memory(tmp_path) == 0


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (512, 3 * 2**20, 5 * 2**29)] == ["0.50 KiB", "3.00 MiB", "2.50 GiB"]
