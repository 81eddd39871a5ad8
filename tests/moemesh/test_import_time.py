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


def test_a_rank_loads_less_of_torch() -> None:
    """What is put off is there for whoever asks; a torch that has been loaded already stays as it is."""
    code = """
import sys
from moemesh.light_torch import put_off_unused
put_off_unused()
import moemesh.rank_startup, torch
assert "torch._decomp" not in sys.modules
torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
from torch.export import export
from torch.export.graph_signature import ExportGraphSignature
assert torch.export.export is export
assert torch.ones(2, 3, device="meta").sum(0).shape == (3,)
loaded = sys.modules["torch.export"]
put_off_unused()
assert sys.modules["torch.export"] is loaded
"""
    assert "torch" in loaded_by(code)


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
