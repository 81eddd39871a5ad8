"""Checkpoints that something has happened to: what is done to a copy, and what a refusal must then name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from moemesh.options import DEMO_MODEL
from moemesh.shard_file import read_shard_header
from tests.chaos.scenario import Damage

SHARD = "model.safetensors"
TENSOR = "model.layers.2.mlp.experts.77.up_proj.weight"


def copy_of_demo(folder: Path) -> Path:
    """The bundled model, to be damaged."""
    return Path(shutil.copytree(DEMO_MODEL, folder))


def damage(folder: Path, how: Damage) -> tuple[str, ...]:
    """Do it; the words by which a refusal names it."""
    return _WAYS[how](folder)


def _truncate(folder: Path) -> tuple[str, ...]:
    shard = folder / SHARD
    os.truncate(shard, shard.stat().st_size // 2)
    return (SHARD, "truncated")


def _flip_a_byte(folder: Path) -> tuple[str, ...]:
    """In place, in the middle of an expert's weights: nothing but a checksum can tell."""
    shard = folder / SHARD
    tensors = read_shard_header(shard)
    info = tensors[TENSOR]
    data_begins = shard.stat().st_size - max(tensor.end for tensor in tensors.values())
    with shard.open("r+b") as file:
        file.seek(data_begins + info.begin + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return (TENSOR,)


def _drop_a_tensor(folder: Path) -> tuple[str, ...]:
    _rewrite(folder, lambda tensors: tensors.pop(TENSOR))
    return (TENSOR, "missing")


def _other_weights(folder: Path) -> tuple[str, ...]:
    """Well formed and of the same shapes, but not the model that is being served."""
    name = TENSOR.replace("experts.77", "experts.78")
    _rewrite(folder, lambda tensors: tensors.update({TENSOR: tensors[name].clone()}))
    return (TENSOR,)


def _other_config(folder: Path) -> tuple[str, ...]:
    """All tensors are the same, and yet it is another model."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rope_theta": 2 * config["rope_theta"]}))
    return ("config.json", "not those that the mesh serves by")


def _unlink(folder: Path) -> tuple[str, ...]:
    (folder / SHARD).unlink()
    return (SHARD,)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A new file in place of the old one, which whoever has it open keeps."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / "new", metadata={"format": "pt"})
    os.replace(folder / "new", folder / SHARD)


_WAYS: dict[Damage, Callable[[Path], tuple[str, ...]]] = {
    "truncated shard": _truncate,
    "flipped byte": _flip_a_byte,
    "missing tensor": _drop_a_tensor,
    "another checkpoint": _other_weights,
    "another config": _other_config,
    "unlinked": _unlink,
}
