"""Which tensors a checkpoint has, by the headers of its files alone: opening closes the first book.

Every tensor of the model is there, whole, with the right shape and a dtype that is served, and no tensor is there that
nobody reads. No data is read and no torch is needed: the frontend refuses a model by this before it starts a rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mesh_config import ConfigError, Fp8BlockConfig, ModelConfig
from mesh_config.fields import read_json_object
from moemesh.shard_file import CheckpointError, TensorInfo, read_shard_header
from moemesh.weight_names import HEAD, SCALE_SUFFIX, can_be_fp8, expected_tensors, set_aside

INDEX_NAME = "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "BF16", "F16")
FP8_DTYPE = "F8_E4M3"


@dataclass(frozen=True, kw_only=True)
class CheckpointIndex:
    """The tensors of a model folder, by name.

    `tensors`: all that is served, scales included; `set_aside`: names recognised and not served; `tied_head`: a head
    beside the embedding that the configuration says is the head too, and that must then be equal to it.
    """

    tensors: Mapping[str, TensorInfo]
    set_aside: frozenset[str]
    tied_head: TensorInfo | None


def read_index(folder: str | Path, config: ModelConfig) -> CheckpointIndex:
    """Reads the headers only. CheckpointError names file and tensor of everything that is wrong."""
    found = _find_tensors(Path(folder))
    unserved = frozenset(set_aside(config, {name: info.shape for name, info in found.items()}))
    tied_head = found.get(HEAD) if config.tie_word_embeddings else None
    if tied_head is not None:
        unserved |= {HEAD}
    tensors = {name: info for name, info in found.items() if name not in unserved}
    problems = _compare(tensors, config)
    if problems:
        raise CheckpointError(tuple(problems))
    return CheckpointIndex(tensors=tensors, set_aside=unserved, tied_head=tied_head)


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the folder's safetensors files, by the index where there is one."""
    index = folder / INDEX_NAME
    if index.is_file():
        return _indexed_tensors(folder, index)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = " (pickled weights, *.bin or *.pt, are not read: convert them)" if _has_pickles(folder) else ""
        raise CheckpointError((f"{folder}: has no *.safetensors file{pickled}",))
    return _merge_shards(paths)


def _has_pickles(folder: Path) -> bool:
    return any(folder.glob(pattern) for pattern in ("*.bin", "*.pt", "*.pth"))


def _indexed_tensors(folder: Path, index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError((str(error),)) from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError((f"{index}: weight_map must map tensor names to file names",))
    outside = [file for file in weight_map.values() if Path(file).name != file]
    if outside:
        raise CheckpointError((f"{index}: {json.dumps(outside[0])} is no file name inside the model folder",))
    found = _merge_shards([folder / file for file in sorted(set(weight_map.values()))])
    problems = [
        f"{folder / file}: {name} is missing in it, {index.name} places it there"
        for name, file in weight_map.items()
        if name not in found or found[name].path.name != file
    ]
    if problems:
        raise CheckpointError(tuple(problems))
    return found


def _merge_shards(paths: Iterable[Path]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for path in paths:
        try:
            header = read_shard_header(path)
        except CheckpointError as error:
            problems += error.problems
            continue
        problems += [f"{path}: {name} is in {found[name].path.name} too" for name in header if name in found]
        found |= header
    if problems:
        raise CheckpointError(tuple(problems))
    return found


def _compare(found: Mapping[str, TensorInfo], config: ModelConfig) -> list[str]:
    """One line for each tensor that is missing, unknown, or of the wrong shape or dtype."""
    expected = expected_tensors(config)
    problems = [f"{name}: is missing, shape {list(shape)}" for name, shape in expected.items() if name not in found]
    scales: set[str] = set()
    for name, shape in expected.items():
        if name not in found:
            continue
        problems += _tensor_problems(name, found[name], shape, config)
        if found[name].dtype == FP8_DTYPE and config.quantization is not None:
            scales.add(name + SCALE_SUFFIX)
            problems += _scale_problems(name, found, shape, config.quantization)
    unknown = found.keys() - expected.keys() - scales
    return problems + [f"{found[name].path}: {name} is read by nothing in this model" for name in sorted(unknown)]


def _tensor_problems(name: str, info: TensorInfo, shape: tuple[int, ...], config: ModelConfig) -> list[str]:
    problems = []
    if info.shape != shape:
        problems.append(f"{info.path}: {name} has shape {list(info.shape)}, config.json needs {list(shape)}")
    supported = FLOAT_DTYPES + ((FP8_DTYPE,) if config.quantization is not None and can_be_fp8(name) else ())
    if info.dtype not in supported:
        hint = " (FP8 needs quantization_config)" if info.dtype == FP8_DTYPE and config.quantization is None else ""
        problems.append(f"{info.path}: {name} has dtype {info.dtype}, supported are {', '.join(supported)}{hint}")
    return problems


def _scale_problems(
    name: str, found: Mapping[str, TensorInfo], shape: tuple[int, ...], block: Fp8BlockConfig
) -> list[str]:
    scale = found.get(name + SCALE_SUFFIX)
    needed = (-(-shape[0] // block.block_rows), -(-shape[1] // block.block_cols))
    if scale is None:
        return [f"{name}{SCALE_SUFFIX}: is missing, shape {list(needed)}: {name} is stored in FP8"]
    problems = []
    if scale.shape != needed:
        problems.append(f"{scale.path}: {name}{SCALE_SUFFIX} has shape {list(scale.shape)}, needs {list(needed)}")
    if scale.dtype not in FLOAT_DTYPES:
        problems.append(f"{scale.path}: {name}{SCALE_SUFFIX} has dtype {scale.dtype}, needs F32")
    return problems
