"""What a mesh computes in, and who may be in it together."""

import pytest

from mesh_config import arithmetics_differ, settled_arithmetic
from mesh_config.arithmetic import Arithmetic


@pytest.mark.parametrize(
    ("wanted", "sets", "settled"),
    [
        ("auto", ["amx", "amx"], "bf16x3"),
        ("auto", ["amx", "avx512"], "float32"),
        ("auto", ["torch"], "float32"),
        ("bf16x3", ["avx2"], "bf16x3"),
        ("float32", ["amx"], "float32"),
    ],
)
def test_auto_takes_tiles_where_everybody_has_them(wanted: Arithmetic, sets: list[str], settled: str) -> None:
    assert settled_arithmetic(wanted, sets) == settled


def test_instruction_sets_of_the_kernels_go_together() -> None:
    assert not arithmetics_differ(["amx", "avx512", "avx2", "generic"])
    assert not arithmetics_differ(["torch", "torch"])
    assert arithmetics_differ(["torch", "avx2"])
