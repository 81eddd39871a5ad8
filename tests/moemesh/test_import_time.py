"""What a frontend and the help texts load: no torch, whose import takes more than a second and 200 MB."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "safetensors", "mpi4py", "kernels")


def loaded_by(code: str) -> set[str]:
    """Those of HEAVY that a new Python has loaded after running `code`."""
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import moemesh.serve, moemesh.frontend, moemesh.mesh_plan",
        "import moemesh.llm",
        "import moemesh.keeper",
        "from moemesh.mesh_plan import plan_mesh; from moemesh.options import ServeOptions; "
        "plan_mesh(ServeOptions(ranks=4, device='cpu'))",
    ],
)
def test_a_frontend_loads_nothing_that_computes(code: str) -> None:
    assert loaded_by(code) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["bench", "serve", "--help"], ["--version"]])
def test_help_waits_for_nothing(arguments: list[str]) -> None:
    code = f"""
import moemesh.cli
try:
    moemesh.cli.main({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert loaded_by(code) == set()
