"""Which layers of a checkpoint hold experts, asked of its tensor names where config.json leaves it open.

`moe_layer_freq` above 1 is read in two ways: DeepSeek's own code makes only every freq-th layer sparse, transformers
ignores the field. Both write checkpoints, and only the names in them tell which; nothing is guessed and no weight is
read.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from mesh_config.errors import ConfigError
from mesh_config.fields import read_json_object
from mesh_config.model_shape import ModelConfig

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def stored_moe_layer_freq(folder: Path, config: ModelConfig) -> int:
    """`config.moe_layer_freq`, or 1 where the folder's tensors show experts in a layer that it would make dense."""
    layers = range(config.first_dense_layers, config.num_layers)
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in layers if not config.is_moe_layer(layer)}
    if gates and gates <= tensor_names(folder):
        return 1
    return config.moe_layer_freq


def tensor_names(folder: Path) -> frozenset[str]:
    """The names of all tensors in the folder's safetensors files; empty where there are no such files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index}: weight_map is missing; it must map tensor names to files")
        return frozenset(weight_map)
    return frozenset(name for path in sorted(folder.glob("*.safetensors")) for name in _header_names(path))


def _header_names(path: Path) -> frozenset[str]:
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        text = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: is no safetensors file, or its header is truncated") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: its safetensors header is no JSON object")
    return frozenset(header) - {"__metadata__"}
