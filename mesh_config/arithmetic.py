"""In which arithmetic a mesh computes: the same on all its ranks, or tokens would depend on who computes them.

What the names stand for is said in kernels/runtime.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

Arithmetic = Literal["auto", "float32", "bf16x3"]

_TILES = "amx"
_TORCH = "torch"


def settled_arithmetic(wanted: Arithmetic, instruction_sets: Collection[str]) -> Arithmetic:
    """`wanted`, or if that is auto the one that is faster with the instruction sets of all ranks."""
    if wanted != "auto":
        return wanted
    return "bf16x3" if all(name == _TILES for name in instruction_sets) else "float32"


def arithmetics_differ(instruction_sets: Collection[str]) -> bool:
    """Whether ranks with these would not get the same bits: the C kernels give the same with every instruction set."""
    return _TORCH in instruction_sets and len(set(instruction_sets)) > 1
