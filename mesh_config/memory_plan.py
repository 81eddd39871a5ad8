"""How much memory a rank needs, said before anything is loaded.

Sizes follow from the shapes alone: what a rank hosts (attention shards, dense and shared FFNs, experts, embedding,
head), the latent cache and the buffers of one step. CPU ranks of one host share its memory, so their needs add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh_config.errors import ConfigError
from mesh_config.mesh import MeshConfig
from mesh_config.model_shape import Fp8BlockConfig, ModelConfig, Quantization, StoredDtype
from mesh_config.parameters import ParameterCounts, count_parameters
from mesh_config.placement import Placement

FLOAT32_BYTES = 4
PROCESS_BYTES = 160 * 2**20  # private memory of a process that has imported torch and the transports (146 MiB measured)
INT8_BLOCK = Fp8BlockConfig(block_rows=1, block_cols=128)  # what --quantization int8 has a scale for
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes one rank needs, by component."""

    embedding: int = 0
    attention: int = 0
    key_expand: int = 0
    dense: int = 0
    shared: int = 0
    router: int = 0
    experts: int = 0
    head: int = 0
    cache: int
    workspace: int

    @property
    def weights(self) -> int:
        attention = self.attention + self.key_expand
        return self.embedding + attention + self.dense + self.shared + self.router + self.experts + self.head

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def cache_bytes_per_token(model: ModelConfig) -> int:
    """Bytes of latent cache one token takes in all layers, on every rank of its attention group (float32)."""
    return model.num_layers * model.latent_width * FLOAT32_BYTES


def expert_bytes(
    model: ModelConfig, *, weight_dtype: StoredDtype | None = None, quantization: Quantization | None = None
) -> int:
    """Bytes of one routed expert, in the format that `plan_memory` is told."""
    return _sizes(model, weight_dtype, quantization).matrix(count_parameters(model).one_expert)


def plan_memory(
    model: ModelConfig,
    mesh: MeshConfig,
    placement: Placement,
    rank: int,
    *,
    cache_tokens: int | None = None,
    weight_dtype: StoredDtype | None = None,
    quantization: Quantization | None = None,
) -> MemoryPlan:
    """The MemoryPlan of `rank`.

    `cache_tokens` is the room for cached tokens to plan with: by default the mesh's `num_cache_blocks`, else what one
    sequence of `max_model_len` takes, the least that can serve every request. `weight_dtype` is the format that 16- and
    32-bit weights are held in, by default the checkpoint's; FP8 stays FP8. With `quantization` all
    matrices but embedding and router are int8.
    """
    counts = count_parameters(model)
    sizes = _sizes(model, weight_dtype, quantization)
    attends = "attention" in mesh.roles(rank)
    hosted = sum(len(placement.experts_on(layer, rank)) for layer in placement.moe_layers)
    experts, workspace = sizes.matrix(hosted * counts.one_expert), _workspace_bytes(model, mesh, attends=attends)
    if not attends:
        return MemoryPlan(experts=experts, cache=0, workspace=workspace)
    if cache_tokens is None:
        blocks = mesh.num_cache_blocks or -(-mesh.max_model_len // mesh.block_size)
        cache_tokens = blocks * mesh.block_size
    return MemoryPlan(
        embedding=counts.embedding * sizes.plain,
        attention=sizes.attention(counts, mesh.attention_tp),
        key_expand=sizes.key_expand(model, mesh.attention_tp) if mesh.prefill_attention == "expanded" else 0,
        dense=sizes.matrix(counts.dense),
        shared=sizes.matrix(counts.shared),
        router=counts.router * FLOAT32_BYTES,
        experts=experts,
        head=sizes.head(counts.head or counts.embedding),
        cache=cache_tokens * cache_bytes_per_token(model),
        workspace=workspace,
    )


def _sizes(model: ModelConfig, weight_dtype: StoredDtype | None, quantization: Quantization | None) -> _WeightSizes:
    block = model.quantization if quantization is None else INT8_BLOCK
    return _WeightSizes(block, _DTYPE_BYTES[weight_dtype or model.dtype])


@dataclass(frozen=True)
class _WeightSizes:
    block: Fp8BlockConfig | None  # of a weight of one byte; None: no weights are
    plain: int  # bytes of other weights

    def matrix(self, parameters: int) -> int:
        """Bytes of `parameters` weights of the projections, which FP8 checkpoints and --quantization have in bytes."""
        if self.block is None:
            return parameters * self.plain
        return parameters + -(-parameters * FLOAT32_BYTES // (self.block.block_rows * self.block.block_cols))

    def head(self, parameters: int) -> int:
        """FP8 checkpoints keep it as it is; --quantization does not."""
        return self.matrix(parameters) if self.block is INT8_BLOCK else parameters * self.plain

    def key_expand(self, model: ModelConfig, tp: int) -> int:
        """The keys' part of kv_b once more, for the expanded form: float32 where kv_b is int8."""
        parameters = model.num_layers * model.num_heads * model.qk_nope_head_dim * model.kv_lora_rank
        whole = parameters * FLOAT32_BYTES if self.block is INT8_BLOCK else self.matrix(parameters)
        return -(-whole // tp)

    def attention(self, counts: ParameterCounts, tp: int) -> int:
        """One rank's part; norms are float32."""
        split = self.matrix(counts.query_output) + self.matrix(counts.key_value_up)
        return -(-split // tp) + self.matrix(counts.attention_replicated) + counts.norms * FLOAT32_BYTES


def _workspace_bytes(model: ModelConfig, mesh: MeshConfig, *, attends: bool) -> int:
    """The largest live tensors of one step, float32, both micro-batches together; an upper estimate."""
    tokens, slots = mesh.max_num_batched_tokens, mesh.max_num_batched_tokens * model.experts_per_token
    expert_rows = slots * (model.hidden_size + 2 * model.moe_intermediate_size)
    if not attends:
        return PROCESS_BYTES + FLOAT32_BYTES * expert_rows
    heads = model.num_heads * (model.qk_head_dim + model.latent_width + model.kv_lora_rank)
    rows = tokens * (6 * model.hidden_size + heads + 2 * max(model.intermediate_size, model.shared_width))
    logits = 2 * min(tokens, mesh.max_num_seqs) * model.vocab_size
    return PROCESS_BYTES + FLOAT32_BYTES * (expert_rows + rows + logits)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: free memory of the machine, and what its control groups (v1 or v2) leave.

    `root` is where /proc and /sys are found. Page cache counts as free, since the kernel gives it back.
    """
    limits = [_meminfo_available(root / "proc/meminfo"), *_cgroup_headrooms(root)]
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ConfigError(f"{root / 'proc/meminfo'}: cannot be read, so the free memory is unknown")
    return max(min(known), 0)


def check_fits(plans: Sequence[MemoryPlan], available: int) -> None:
    """ConfigError, with the numbers, where the ranks of one host need more than its `available` bytes."""
    need = sum(plan.total for plan in plans)
    if need <= available:
        return
    parts = ((part, sum(getattr(plan, part) for plan in plans)) for part in ("weights", "cache", "workspace"))
    shown = ", ".join(f"{part} {format_bytes(num_bytes)}" for part, num_bytes in parts)
    raise ConfigError(
        f"too little memory: {len(plans)} rank{'s' * (len(plans) > 1)} on this host need {format_bytes(need)} "
        f"({shown}), {format_bytes(available)} are available: lower max-model-len or max-num-batched-tokens, "
        "use fewer ranks on this host or a smaller model"
    )


def format_bytes(num_bytes: int) -> str:
    """A number of bytes for people, in GiB, MiB or KiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.2f} {unit}"
    return f"{num_bytes / 2**10:.2f} KiB"


def _meminfo_available(path: Path) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_headrooms(root: Path) -> list[int | None]:
    """limit - usage + reclaimable cache of this process's memory group and of all its parents."""
    headrooms: list[int | None] = []
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        v2 = hierarchy == "0" and not controllers
        if not v2 and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup" if v2 else "sys/fs/cgroup/memory")
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            headrooms.append(_headroom(folder, *names))
            if folder == base:
                break
    return headrooms


def _headroom(folder: Path, limit_name: str, usage_name: str) -> int | None:
    limit, usage = _lines(folder / limit_name), _lines(folder / usage_name)
    if not limit or not usage or not limit[0].isdigit():
        return None  # "max", or no such group in this namespace
    cached = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            cached = max(cached, int(value))
    return int(limit[0]) - int(usage[0]) + cached


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
