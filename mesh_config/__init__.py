"""What the mesh is: model and mesh configuration, expert placement, memory plan. No torch, no I/O but reading files."""

from mesh_config.arithmetic import arithmetics_differ, settled_arithmetic
from mesh_config.coverage import Loss, coverage
from mesh_config.errors import ConfigError
from mesh_config.memory_plan import (
    MemoryPlan,
    available_memory,
    cache_bytes_per_token,
    check_fits,
    expert_bytes,
    plan_memory,
)
from mesh_config.mesh import MeshConfig, default_attention_tp, make_mesh
from mesh_config.model_config import Fp8BlockConfig, ModelConfig, load_model_config, parse_model_config
from mesh_config.parameters import ParameterCounts, count_parameters
from mesh_config.placement import Placement, even_placement, take_over
from mesh_config.rope import RopeConfig, YarnConfig, rope_frequencies

__all__ = [
    "ConfigError",
    "Fp8BlockConfig",
    "Loss",
    "MemoryPlan",
    "MeshConfig",
    "ModelConfig",
    "ParameterCounts",
    "Placement",
    "RopeConfig",
    "YarnConfig",
    "arithmetics_differ",
    "available_memory",
    "cache_bytes_per_token",
    "check_fits",
    "count_parameters",
    "coverage",
    "default_attention_tp",
    "even_placement",
    "expert_bytes",
    "load_model_config",
    "make_mesh",
    "parse_model_config",
    "plan_memory",
    "rope_frequencies",
    "settled_arithmetic",
    "take_over",
]
