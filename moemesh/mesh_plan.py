"""From options to the mesh they describe, decided once, by the frontend, before anything is started or loaded."""

import os
from dataclasses import dataclass, replace
from typing import cast

from mesh_config import (
    ConfigError,
    MemoryPlan,
    MeshConfig,
    ModelConfig,
    Placement,
    available_memory,
    cache_bytes_per_token,
    check_fits,
    even_placement,
    expert_bytes,
    load_model_config,
    make_mesh,
    plan_memory,
)
from mesh_config.model_shape import Quantization, StoredDtype
from moemesh.checkpoint_index import read_index
from moemesh.cuda_detection import cuda_is_usable
from moemesh.options import EngineOptions

CACHE_SHARE = 0.25
"""Share of the memory left beside the weights that the latent caches of a host take by default."""


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """What is served, on which mesh, with which expert where. `mesh.num_cache_blocks` is decided.

    `expert_bytes` are those of one expert as it is held.
    """

    model: ModelConfig
    mesh: MeshConfig
    placement: Placement
    expert_bytes: int


def plan_mesh(options: EngineOptions, machines: tuple[str, ...] = ()) -> MeshPlan:
    """Check model folder, mesh shape and memory, before any loading. Raises ConfigError or CheckpointError, with
    numbers.

    `machines` of each rank, where there are several; this one is the first rank's, and the memory of all is taken to be
    like its.
    """
    model = load_model_config(options.model_folder)
    check_quantization(options, model)
    mesh = mesh_of(options, model, device=_device(options.device), machines=machines)
    placement = placement_of(model, mesh)
    read_index(options.model_folder, model)
    mesh = replace(mesh, num_cache_blocks=_cache_blocks(options, model, mesh, placement))
    if mesh.device == "cpu":
        check_fits([memory_of(options, model, mesh, placement, rank) for rank in mesh.beside(0)], available_memory())
    return MeshPlan(model=model, mesh=mesh, placement=placement, expert_bytes=expert_bytes_of(options, model))


def mesh_of(options: EngineOptions, model: ModelConfig, *, device: str, machines: tuple[str, ...] = ()) -> MeshConfig:
    """The shape of the mesh; the size of its caches is not decided. `machines`: see MeshConfig. Raises ConfigError."""
    return make_mesh(
        model,
        machines=machines,
        num_ranks=options.ranks,
        attention_tp=options.attention_tp,
        attention_ranks=options.attention_ranks,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        redundant_experts=options.redundant_experts,
        combine=options.combine,
        expert_hold=options.expert_hold,
        micro_batches=options.micro_batches,
        credit_window=options.credit_window,
        prefix_caching=options.enable_prefix_caching,
        prefill_attention=options.prefill_attention,
        arithmetic=options.arithmetic,
        device=device,
    )


def placement_of(model: ModelConfig, mesh: MeshConfig) -> Placement:
    """Experts and their copies spread evenly over the ranks that host any: the same answer at every rank."""
    return even_placement(
        model.num_experts,
        model.moe_layers,
        mesh.expert_ranks,
        mesh.num_ranks,
        redundant=mesh.redundant_experts,
        machine_of=dict(enumerate(mesh.machines)),
    )


def threads_per_rank(options: EngineOptions, ranks_on_host: int) -> int:
    """Kernel threads of one rank: what was asked for, else its share of the cores this process may use."""
    return options.threads or max(1, len(os.sched_getaffinity(0)) // ranks_on_host)


def quantization(options: EngineOptions) -> Quantization | None:
    """What weights are converted to while they are loaded; None keeps them."""
    return cast("Quantization | None", options.quantization)


def check_quantization(options: EngineOptions, model: ModelConfig) -> None:
    """ConfigError where the weights cannot be converted as asked."""
    if options.quantization is not None and model.quantization is not None:
        raise ConfigError(
            f"--quantization {options.quantization}: the checkpoint in {options.model_folder} is FP8 already, and is "
            "served in that format: leave --quantization away"
        )


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if cuda_is_usable() else "cpu"


def memory_of(
    options: EngineOptions, model: ModelConfig, mesh: MeshConfig, placement: Placement, rank: int
) -> MemoryPlan:
    """What one rank of the planned mesh holds."""
    return plan_memory(
        model, mesh, placement, rank, weight_dtype=_held_dtype(options), quantization=quantization(options)
    )


def expert_bytes_of(options: EngineOptions, model: ModelConfig) -> int:
    """Bytes of one routed expert as it is held."""
    return expert_bytes(model, weight_dtype=_held_dtype(options), quantization=quantization(options))


def _held_dtype(options: EngineOptions) -> StoredDtype | None:
    return None if options.dtype == "auto" else cast(StoredDtype, options.dtype)


def _cache_blocks(options: EngineOptions, model: ModelConfig, mesh: MeshConfig, placement: Placement) -> int:
    if options.num_gpu_blocks_override is not None:
        return options.num_gpu_blocks_override
    per_block = mesh.block_size * cache_bytes_per_token(model)
    if options.kv_cache_memory_bytes is not None:
        blocks = options.kv_cache_memory_bytes // per_block
        if blocks < 1:
            raise ConfigError(
                f"kv-cache-memory-bytes = {options.kv_cache_memory_bytes} holds no block of {mesh.block_size} tokens: "
                f"at least {per_block} bytes are needed"
            )
        return blocks
    per_sequence = -(-mesh.max_model_len // mesh.block_size)
    smallest = replace(mesh, num_cache_blocks=1)
    needed = sum(memory_of(options, model, smallest, placement, rank).total for rank in mesh.beside(0))
    left = max(0, available_memory() - needed)
    attending = sum(rank < mesh.num_attention_ranks for rank in mesh.beside(0))
    affordable = int(left * CACHE_SHARE) // per_block // max(1, attending)
    return max(per_sequence, min(mesh.max_num_seqs * per_sequence, affordable))
